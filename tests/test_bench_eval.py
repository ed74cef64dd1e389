from dataclasses import replace

import pytest
import torch
from helpers import image_sets, random_archs, random_supernet, tiny_space

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
    """Predictions of the recalibrated largest subnet."""
    import eval_rows

    arch = problem.supernet.space.largest
    net = eval_rows.plain_recalibrate(problem.supernet, arch, problem.recalibration, batch_size=problem.batch_size)
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


@pytest.mark.parametrize(
    ("quantity", "fault"),
    [
        ("clean", lambda problem: {"recalibration": problem.recalibration[:30]}),
        ("last_iterate", lambda problem: {"attack": problem.attack.model_copy(update={"num_steps": 1})}),
    ],
    ids=["statistics of too few images", "an attack of one step"],
)
def test_a_label_of_another_problem_is_noticed(problem, quantity, fault):
    import eval_rows

    def wrong(exact, arch, **how):
        return eval_rows.measure_as_package(replace(exact, **fault(exact)), arch, **how)

    with pytest.raises(SystemExit, match=f"{quantity}: "):
        eval_rows.require_equal(eval_rows.equality(problem, archs_of(problem), wrong))


def test_sweep_ranks_the_full_label_perfectly(problem, tmp_path):
    import bench_eval
    import eval_rows

    sets = image_sets(tmp_path / "sweep", train=90, val=40)

    def problem_of(**how):
        return eval_rows.make_problem(problem.supernet, sets["train"], sets["val"], eps=EPS, batch_size=30, **how)

    cells = [(1, images, 30, dtype) for images in (20, 1000) for dtype in ("float32", "bfloat16")]
    archs = random_archs(problem.supernet.space, 5)
    rows = bench_eval.sweep(problem_of, archs, cells, problem, plain_archs=2)
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
