"""Fewer gradients in training: shared attack, curriculum, carried perturbations, kept teacher logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import image_sets, random_supernet, tiny_config, tiny_space
from training_runs import EPS, phase_run, same, step_of, take, teacher_run

from proard.attacks import pgd
from proard.config import ConfigError, Threat, TrainingAttack, UserError
from proard.data import Augmenter, Views
from proard.losses import OBJECTIVES
from proard.nets import extract, fold
from proard.training import Drawn, Interrupted, Plan, StepTally
from proard.training.attacker import Attacker, pgd_options, steps_at, weakest
from proard.training.carried import CarriedPerturbations
from proard.training.teacher_table import TeacherTable

SPACE = tiny_space()


@pytest.fixture(scope="module")
def train_set(tmp_path_factory):
    return image_sets(tmp_path_factory.mktemp("images"), train=48, val=12)["train"]


def attack_of(**settings):
    return TrainingAttack(num_steps=3, step_size=0.03, **settings)


def batch(count=6):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    return images, torch.arange(count) % 3


class Recorded:
    """Inputs and results of every subnet's attack of one step, in the order of the attacks."""

    def __init__(self):
        self.seen = []

    def __call__(self, predict, objective, images, *, generator, steps, **options):
        adversarial = pgd(predict, objective, images, generator=generator, steps=steps, **options)
        self.seen.append((options, adversarial.clone()))
        return adversarial


def step_with(attack, drawn):
    """One training step on given subnets: its work, and what was recorded."""
    (phase,) = tiny_config().train_phase.phases
    phase = phase.model_copy(update={"attack": attack})
    recorded = Recorded()
    net = random_supernet(SPACE, dtype=torch.float32)
    step = step_of(net, phase, Plan(lambda seed, step, data_pass: drawn), search=recorded)
    recorded.order = step.attacker.begin(drawn, SPACE, step=0, data_pass=0, views=None)
    return take(step, *batch(), lr=0.01, seed=1).work.forwards, recorded


def at(arch, **changes):
    return Drawn(arch, OBJECTIVES["pgd_at"], {}, **changes)


# One attack for all subnets of a step.


@pytest.mark.parametrize(("shared", "first"), [("smallest", 1), ("largest", 2)])
def test_one_subnet_crafts_and_the_others_start_from_its_images(shared, first):
    archs = [SPACE.arch(row) for row in SPACE.sample(1, np.random.default_rng(3))] + [SPACE.smallest, SPACE.largest]
    drawn = [at(arch) for arch in archs]
    attack = attack_of(shared=shared, own_steps=1)
    work, inner = step_with(attack, drawn)
    assert inner.order[0] is drawn[first]
    assert [subnet for subnet in drawn if subnet is not drawn[first]] == inner.order[1:]
    source, others = inner.seen[0], inner.seen[1:]
    assert source[0]["num_steps"] == 3
    assert "initial" not in source[0]
    for options, _ in others:
        assert options["num_steps"] == 1
        assert torch.equal(options["initial"], source[1])
    assert work == 3 * (1 + 3) + 2 * (3 + 1 + 1)  # pgd_at: clean statistics, adversarial pass; five gradients in all


def test_without_own_steps_every_subnet_trains_on_the_shared_images():
    work, inner = step_with(attack_of(shared="largest", own_steps=0), [at(SPACE.smallest), at(SPACE.largest)])
    assert torch.equal(inner.seen[0][1], inner.seen[1][1])
    assert work == 2 * (1 + 3) + 2 * 3


def test_own_steps_continue_the_same_attack_on_the_same_subnet():
    """k shared and m own steps on one subnet are k + m steps of its attack."""
    _, inner = step_with(attack_of(shared="smallest", own_steps=2), [at(SPACE.smallest), at(SPACE.smallest)])
    _, longer = step_with(attack_of().model_copy(update={"num_steps": 5}), [at(SPACE.smallest)])
    assert torch.equal(inner.seen[1][1], longer.seen[0][1])
    assert not torch.equal(inner.seen[0][1], longer.seen[0][1])


def test_own_steps_may_be_longer_than_the_shared_ones():
    drawn = [at(SPACE.largest), at(SPACE.smallest)]
    _, inner = step_with(attack_of(shared="smallest", own_steps=2, own_step_size=0.1), drawn)
    assert [options["step_size"] for options, _ in inner.seen] == [0.03, 0.1]
    _, alike = step_with(attack_of(shared="smallest", own_steps=2, own_step_size=0.03), drawn)
    _, unset = step_with(attack_of(shared="smallest", own_steps=2), drawn)
    assert torch.equal(unset.seen[1][1], alike.seen[1][1])
    assert not torch.equal(unset.seen[1][1], inner.seen[1][1])


def test_one_subnet_alone_shares_with_nobody(train_set, tmp_path):
    changes = {"sampling": "uniform", "archs_per_step": 1, "epochs": 1}
    plain = phase_run(train_set, tmp_path, **changes)
    attack = {"num_steps": 2, "step_size": 0.05, "shared": "smallest", "own_steps": 2}
    shared = phase_run(train_set, tmp_path, attack=attack, **changes)
    assert same(plain.net.state_dict(), shared.net.state_dict())
    assert plain.rows[-1]["forward_equivalents"] == shared.rows[-1]["forward_equivalents"]


@pytest.mark.parametrize(("shared", "steps"), [("smallest", [3, 3, 1]), ("largest", [3, 1, 1])])
def test_a_dynamic_teacher_stays_first(shared, steps):
    """The dynamic teacher's output is the others' target; under `smallest` it has its own attack."""
    guide = Drawn(SPACE.largest, OBJECTIVES["trades"], {"beta": 6.0}, guides=True)
    middle = SPACE.arch(SPACE.sample(1, np.random.default_rng(3))[0])
    students = [Drawn(arch, OBJECTIVES["rslad"], {"adv_weight": 0.5}) for arch in (middle, SPACE.smallest)]
    _, inner = step_with(attack_of(shared=shared), [guide, *students])
    assert inner.order[0] is guide
    assert [options["num_steps"] for options, _ in inner.seen] == steps
    assert (inner.order[1] is students[1]) == (shared == "smallest")


def test_phase_with_a_shared_attack_counts_its_work(train_set, tmp_path):
    attack = {"num_steps": 2, "step_size": 0.05, "shared": "smallest", "own_steps": 1}
    run = phase_run(train_set, tmp_path, epochs=1, attack=attack)
    assert run.rows[-1]["forward_equivalents"] == 48 * (1 + 3 * 6 + 2 * (2 + 1 + 1))


# A growing number of steps.


def test_curriculum_gives_every_count_an_equal_share():
    attack = TrainingAttack(num_steps=5, first_steps=2)
    assert [steps_at(attack, step, 12) for step in range(12)] == [2] * 3 + [3] * 3 + [4] * 3 + [5] * 3
    assert steps_at(TrainingAttack(num_steps=5), 0, 12) == 5


def test_fewer_steps_still_cross_the_ball():
    attack = TrainingAttack(num_steps=10, step_size=2 / 255, first_steps=1)
    sizes = [pgd_options(attack, eps=8 / 255, norm="linf", num_steps=k)["step_size"] * 255 for k in (1, 2, 4, 6, 10)]
    assert sizes == pytest.approx([10, 5, 2.5, 2, 2])
    assert weakest(attack, eps=8 / 255, norm="linf")["num_steps"] == 1


def test_curriculum_spends_what_its_steps_cost(train_set, tmp_path):
    attack = {"num_steps": 2, "step_size": 0.05, "first_steps": 1}
    run = teacher_run(train_set, tmp_path, epochs=2, attack=attack)
    assert [row["forward_equivalents"] for row in run.rows] == [48 * (3 + 2 + 3), 48 * 8 + 48 * (3 + 4 + 3)]


# Perturbations carried over epochs.


def test_view_pixels_read_and_write_exactly_what_the_augmenter_shows():
    images = torch.arange(5 * 8 * 8 * 3, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(5, 8, 8, 3)
    augmenter = Augmenter(images, padding=2)
    indices = torch.tensor([3, 0, 4])
    views = augmenter.draw(indices, torch.Generator().manual_seed(5))
    assert views.mirrored.any()
    assert not views.mirrored.all()
    padded = torch.nn.functional.pad(images, (0, 0, 2, 2, 2, 2))
    shown = augmenter(indices, torch.Generator().manual_seed(5))
    assert torch.equal((shown * 255).round().to(torch.uint8), padded[views.pixels(8, 8)].permute(0, 3, 1, 2))
    written = torch.zeros_like(padded)
    written[views.pixels(8, 8)] = padded[views.pixels(8, 8)]
    for index, top, left in zip(views.indices, views.top, views.left, strict=True):
        window = (index, slice(top, top + 8), slice(left, left + 8))
        assert torch.equal(written[window], padded[window])
        written[window] = 0
    assert not written.any()


def carried(images=4, *, norm="linf", start="zero", passes=2):
    attack = TrainingAttack(carry_passes=passes, start=start)
    return CarriedPerturbations(attack, (images, 10, 10, 1), eps=EPS, norm=norm, seed=0)


def test_a_perturbation_follows_crop_and_flip_to_another_view():
    """Written through one view, read through another: each pixel of the padded image keeps its value."""
    store = carried()
    one, other = (
        Views(torch.tensor([1]), torch.tensor([top]), torch.tensor([left]), torch.tensor([mirrored]))
        for top, left, mirrored in ((0, 2, True), (1, 1, False))
    )
    values = torch.linspace(-EPS, EPS, 64).reshape(1, 1, 8, 8)
    store.write(one, values)
    rounded = (values * 127 / EPS).round() * EPS / 127
    torch.testing.assert_close(store.read(one, 8, 8), rounded)
    seen = store.read(other, 8, 8)[0, 0]
    expected = torch.zeros(8, 8)
    expected[:7, 1:] = rounded[0, 0].flip(1)[1:, :7]  # rows 1-7, columns 2-8 of the padded image are in both views
    torch.testing.assert_close(seen, expected)
    assert store.store[[0, 2, 3]].count_nonzero() == 0
    assert (values - rounded).abs().max() <= EPS / 254 + 1e-7


def test_perturbations_are_drawn_anew_every_so_many_passes():
    store, drawn = carried(start="uniform", passes=2), []
    for data_pass in range(5):
        store.refresh(data_pass)
        drawn.append(store.store.clone())
        store.store.fill_(7) if data_pass in (0, 2) else None
    assert drawn[0].float().mul(EPS / 127).std() == pytest.approx(EPS / 3**0.5, rel=0.1)
    assert (drawn[1] == 7).all()
    assert not torch.equal(drawn[2], drawn[0])
    assert (drawn[3] == 7).all()
    assert int(store.period) == 2
    again = carried(start="uniform", passes=2)
    again.refresh(2)
    assert torch.equal(again.store, drawn[2]), "a function of seed and pass alone"


def test_carried_l2_perturbations_start_inside_the_ball():
    store = carried(norm="l2", start="uniform")
    store.refresh(0)
    lengths = store.store.float().mul(EPS / 127).flatten(1).norm(dim=1)
    assert (lengths < EPS * 1.05).all()
    assert lengths.max() > EPS / 2


def test_attack_starts_where_the_last_pass_left_it():
    attack = attack_of(carry_passes=9, start="zero")
    inner = Attacker(
        attack,
        StepTally(),
        threat=Threat(eps=EPS),
        carried=CarriedPerturbations(attack, (6, 8, 8, 1), eps=EPS, norm="linf", seed=0),
    )
    zeros = torch.zeros(6, dtype=torch.int64)
    views, (images, _) = Views(torch.arange(6), zeros, zeros, zeros.bool()), batch()
    drawn = [at(SPACE.smallest), at(SPACE.largest)]
    inner.begin(drawn, SPACE, step=0, data_pass=0, views=views)
    assert torch.equal(inner.options(images)["initial"], images)
    inner._keep(drawn[0], images, images + EPS)
    inner._keep(drawn[1], images, images - EPS)
    inner.begin(drawn, SPACE, step=1, data_pass=0, views=views)
    assert torch.equal(inner.options(images)["initial"], images), "an uncommitted step leaves nothing"
    inner._keep(drawn[0], images, images + EPS)
    inner._keep(drawn[1], images, images - EPS)
    inner.commit(torch.zeros(()))
    inner.begin(drawn, SPACE, step=2, data_pass=1, views=views)
    torch.testing.assert_close(inner.options(images)["initial"], images + EPS)


LEVERS = {
    "attack": {
        "num_steps": 2,
        "step_size": 0.05,
        "shared": "smallest",
        "first_steps": 1,
        "carry_passes": 2,
    },
    "teacher_logits": "float16",
    "augment": {"crop_padding": 1, "flip": True},
}


def test_stopped_and_continued_training_with_all_levers_equals_an_uninterrupted_one(train_set, tmp_path):
    whole = phase_run(train_set, tmp_path / "whole", epochs=3, archs_per_step=2, **LEVERS)
    for _ in range(20):
        run = phase_run(train_set, tmp_path / "parts", epochs=3, archs_per_step=2, fit_now=False, **LEVERS)
        run.state.path.parent.mkdir(exist_ok=True)
        run.state.request_path.touch()
        try:
            run.fit()
            break
        except Interrupted:
            continue
    assert same(run.net.state_dict(), whole.net.state_dict())


def test_a_loss_that_is_not_finite_leaves_the_perturbations(train_set, tmp_path):
    states = []
    for poisoned in (True, False):
        run = phase_run(train_set, tmp_path / str(poisoned), epochs=2, fit_now=False, **LEVERS)
        run.state.path.parent.mkdir()
        if poisoned:
            run.source.poison_at = 4
        else:
            given = run.source.batch

            def batch_then_stop(indices, generator, run=run, given=given):
                if len(run.source.given) == 3:
                    run.state.request_path.touch()
                return given(indices, generator)

            run.source.batch = batch_then_stop
        with pytest.raises(ValueError, match="the loss is nan at step 4" if poisoned else "after step 4"):
            run.fit()
        states.append(run.state.load()[0])
    kept = [{name: state[name] for name in state if name.startswith("inner.")} for state in states]
    assert set(kept[0]) == {"inner.perturbations", "inner.period"}
    assert same(*kept)
    assert kept[0]["inner.perturbations"].count_nonzero() > 0


# A frozen teacher's logits, kept.


def views_of(*rows):
    image, top, left, mirrored = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Views(image, top, left, mirrored.bool())


def test_every_view_is_computed_once_and_has_a_place_of_its_own():
    table = TeacherTable(2, padding=1, flip=True, classes=3, dtype=torch.float32)
    assert table.bytes == 2 * 9 * 2 * 3 * 4
    every = [(i, top, left, m) for i in range(2) for top in range(3) for left in range(3) for m in range(2)]
    asked = []

    def teacher(images):
        asked.append(len(images))
        return images.flatten(1)[:, :3]

    images = torch.rand(len(every), 1, 2, 2)
    logits, computed = table(teacher, images, views_of(*every))
    assert computed == sum(asked) == 36 + 16 + 32 + 36, "the search for sizes, then the batch"
    assert torch.equal(logits, images.flatten(1)[:, :3])
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    again, computed = table(teacher, torch.zeros_like(images), views_of(*(every[i] for i in order)))
    assert computed == 0
    assert torch.equal(again, logits[order])
    assert len(asked) == 4


def teacher_net():
    net = fold(extract(random_supernet(SPACE, dtype=torch.float32).eval(), SPACE.largest))
    return torch.no_grad()(net.forward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_known_and_new_views_mix(dtype):
    """40 of 64 views are cached: the 24 others are computed in a batch of 32, with equal results."""
    table = TeacherTable(99, padding=0, flip=False, classes=3, dtype=dtype)
    teacher, (images, _) = teacher_net(), batch(99)
    for start, computed in ((0, 64 + 16 + 32 + 48 + 64), (24, 32), (35, 16), (30, 0)):
        images_now = images[start : start + 64]
        logits, asked = table(teacher, images_now, views_of(*[(start + i, 0, 0, 0) for i in range(64)]))
        assert asked == computed
        assert torch.equal(logits, teacher(images_now).to(dtype).float())


def test_sizes_at_which_the_teacher_rounds_differently_are_not_asked():
    table = TeacherTable(99, padding=0, flip=False, classes=3, dtype=torch.float32)

    def teacher(images):
        return images.flatten(1)[:, :3] * (1 + 1e-6 * (len(images) in (16, 48)))

    images, _ = batch(99)
    for start in (0, 5, 40):
        logits, _ = table(teacher, images[start : start + 56], views_of(*[(start + i, 0, 0, 0) for i in range(56)]))
        assert torch.equal(logits, images[start : start + 56].flatten(1)[:, :3])
    assert table.sizes == [32, 56]


def test_training_with_kept_logits_is_bit_equal_and_cheaper(train_set, tmp_path):
    changes = {"epochs": 4, "augment": {"crop_padding": 0, "flip": False}}
    plain = phase_run(train_set, tmp_path, **changes)
    kept = phase_run(train_set, tmp_path, teacher_logits="float32", **changes)
    assert same(plain.net.state_dict(), kept.net.state_dict())
    work = [run.rows[-1]["forward_equivalents"] for run in (plain, kept)]
    assert work[0] - work[1] == 4 * 48 - (48 + 16), "one epoch, and one batch of 16 for the search for sizes"
    half = phase_run(train_set, tmp_path, teacher_logits="float16", **changes)
    assert not same(plain.net.state_dict(), half.net.state_dict())


def test_training_with_views_known_in_part_is_bit_equal(train_set, tmp_path):
    changes = {"epochs": 3, "batch_size": 48, "augment": {"crop_padding": 0, "flip": True}}
    plain = phase_run(train_set, tmp_path, **changes)
    kept = phase_run(train_set, tmp_path, teacher_logits="float32", **changes)
    assert same(plain.net.state_dict(), kept.net.state_dict())
    search = 48 + 16 + 32
    work = [run.rows[-1]["forward_equivalents"] for run in (plain, kept)]
    assert 16 <= work[0] - (work[1] - search) <= 96


@pytest.mark.parametrize("loss", ["akd", "adaad", "mtard"])
def test_logits_that_a_loss_does_not_read_are_not_kept(train_set, tmp_path, loss):
    with pytest.raises(UserError, match=f"teacher_logits keeps logits at clean images; loss {loss} reads none there"):
        phase_run(train_set, tmp_path, teacher_logits="float32", loss=loss)


# Settings.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"phase__attack": {"start_scale": 2}},
            r"start_scale is a setting of an earlier version; .* n_fgsm",
        ),
        ({"phase__attack": {"clip_to_ball": False}}, r"remove it, or write start: n_fgsm for clip_to_ball: false"),
        ({"phase__attack": {"carry_passes": 2, "start": "n_fgsm"}}, "carry_passes stores perturbations inside"),
        ({"phase__attack": {"num_steps": 2, "first_steps": 3}}, "first_steps is 3; expected: at most"),
        ({"phase__teacher": "dynamic", "phase__teacher_logits": "float32"}, "teacher_logits stores logits of a frozen"),
        ({"threat": {"norm": "linf", "eps": 1.5}}, r"threat.eps is 1.5; .* write 1.5/255"),
        ({"threat": {"norm": "l2", "eps": 1.5}}, r"validation: 2 steps .* cannot cross an l2 ball"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


def test_levers_are_off_by_default():
    attack = TrainingAttack()
    options = pgd_options(attack, eps=EPS, norm="linf", num_steps=steps_at(attack, 7, 9))
    assert options == {
        "eps": EPS,
        "norm": "linf",
        "step_size": 2 / 255,
        "num_steps": 10,
        "start": "uniform",
    }
    assert (attack.shared, attack.first_steps, attack.carry_passes) == (None, None, None)
    drawn = [at(SPACE.largest), at(SPACE.smallest)]
    inner = Attacker(attack, StepTally(), threat=Threat(eps=EPS))
    assert inner.begin(drawn, SPACE, step=0, data_pass=0, views=None) is drawn
    assert inner.tensors() == {}
