import pytest
import torch
from helpers import image_sets, random_archs, random_supernet, tiny_space

import proard.nets.subnet
from proard.config import Attack

EPS = 0.1


@pytest.fixture
def problem(tmp_path):
    import eval_rows

    supernet = random_supernet(tiny_space(), dtype=torch.float32).eval()
    sets = image_sets(tmp_path, train=90, val=40)
    attack = Attack(num_steps=4, step_size=EPS / 4)
    options = {"recalibration": 90, "images": 40, "attack": attack, "eps": EPS, "batch_size": 30}
    made = eval_rows.make_problem(supernet, sets["train"], sets["val"], **options)
    made.labels = predicted(made)  # right before the next line, so that there is something to attack
    made.labels[::7] = (made.labels[::7] + 1) % 3
    return made


def predicted(problem):
    """What the recalibrated largest subnet says."""
    import plain_eval

    arch = problem.supernet.space.largest
    net = plain_eval.plain_recalibrate(problem.supernet, arch, problem.recalibration, batch_size=problem.batch_size)
    with torch.no_grad():
        return net(problem.images, arch).argmax(1)


def archs_of(problem):
    return [problem.supernet.space.largest, *random_archs(problem.supernet.space, 2)]


def test_plain_and_package_labels_agree_in_float64(problem):
    import eval_rows

    found = eval_rows.equality(problem, archs_of(problem))
    eval_rows.require_equal(found)
    assert found["statistics"] < 1e-10
    assert problem.supernet.head.weight.dtype is torch.float32
    label = eval_rows.measure_plainly(problem, problem.supernet.space.largest)
    assert 0 < label.robust.sum() < label.clean.sum() < len(label.clean)
    last = eval_rows.measure_as_package(problem, problem.supernet.space.largest, accounting="last_iterate")
    assert last.gradients == problem.attack.num_steps * label.clean.sum()
    assert eval_rows.measure_as_package(problem, problem.supernet.space.largest).gradients <= last.gradients


def test_plain_and_package_labels_agree_on_mobilenet_blocks():
    """Depthwise convolutions, squeeze-and-excitation, transformed kernels."""
    import eval_rows
    import plain_step
    import step_rows

    given = step_rows.make_problem(
        step_rows.scaled_space("mobilenet_digits", 1),
        recipe=plain_step.Recipe(),
        num_archs=2,
        batch_size=60,
        dtype=torch.float32,
    )
    attack, images = Attack(num_steps=3, step_size=EPS / 4), given.images
    net = given.student.eval()
    made = eval_rows.Problem(net, images[:40], images[40:], given.labels[40:], attack, EPS, batch_size=20)
    found = eval_rows.equality(made, given.archs)
    eval_rows.require_equal(found)
    assert found["statistics"] < 1e-10


def test_statistics_of_too_few_images_are_noticed(problem, monkeypatch):
    import eval_rows

    recalibrate = eval_rows.recalibrate
    monkeypatch.setattr(eval_rows, "recalibrate", lambda net, images, **how: recalibrate(net, images[:60], **how))
    with pytest.raises(SystemExit, match="statistics"):
        eval_rows.require_equal(eval_rows.equality(problem, archs_of(problem)))


def test_a_wrongly_folded_norm_is_noticed(problem, monkeypatch):
    import eval_rows

    folded = proard.nets.subnet.folded_layer

    def forgets_the_mean(weight, scale, shift, mean, var):
        return folded(weight, scale, shift, torch.zeros_like(mean), var)

    monkeypatch.setattr(proard.nets.subnet, "folded_layer", forgets_the_mean)
    with pytest.raises(SystemExit, match="clean"):
        eval_rows.require_equal(eval_rows.equality(problem, archs_of(problem)))


def test_an_attack_one_step_short_is_noticed(problem, monkeypatch):
    import eval_rows

    attack_images = eval_rows.attack_images

    def shorter(*args, attack, **options):
        return attack_images(*args, attack=attack.model_copy(update={"num_steps": 1}), **options)

    monkeypatch.setattr(eval_rows, "attack_images", shorter)
    with pytest.raises(SystemExit, match="last_iterate"):
        eval_rows.require_equal(eval_rows.equality(problem, archs_of(problem)))


def test_sweep_ranks_the_full_label_perfectly(problem, tmp_path, monkeypatch):
    import bench_eval

    monkeypatch.setattr("proard.space.sampling.POOL", 500)

    sets = image_sets(tmp_path / "sweep", train=90, val=40)
    rows = bench_eval.sweep(
        problem.supernet,
        sets["train"],
        sets["val"],
        bench_eval.spread_archs(problem.supernet.space, 5, seed=0),
        steps=[1],
        images=[20, 1000],
        recalibrations=[30],
        dtypes=["float32", "bfloat16"],
        full=problem,
        plain_archs=2,
    )
    assert [(row["steps"], row["images"], row["recalibration"], row["dtype"]) for row in rows] == [
        (4, 40, 90, "float32"),
        (1, 20, 30, "float32"),
        (1, 20, 30, "bfloat16"),
        (1, 40, 30, "float32"),
        (1, 40, 30, "bfloat16"),
    ]
    assert rows[0]["spearman"] == rows[0]["ratio_full"] == 1
    assert all(row["ratio_plain"] > 0 and row["archs"] == 5 for row in rows)
    assert rows[0]["mean_robust_acc"] <= rows[3]["mean_robust_acc"] + 0.2
