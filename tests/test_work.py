"""The cost of a training is computed before its first step, for every loss, teacher, sampling and attack."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import image_sets, random_images, random_supernet, tiny_config, tiny_space
from training_runs import phase_run, plain_network, same, step_of, take

from proard.config import Phase
from proard.losses.distillation import alpha_loss
from proard.training import Drawn, phase_plan, planned_work, within_budget
from proard.training.plan import pace

IMAGES = 96  # of the stripes: six batches of 16


@pytest.fixture(scope="module")
def train_set(tmp_path_factory):
    return image_sets(tmp_path_factory.mktemp("images"))["train"]


def phase_of(**changes: object) -> Phase:
    (phase,) = tiny_config(**{f"phase__{key}": value for key, value in changes.items()}).train_phase.phases
    return phase


LOSSES = [{"loss": loss} for loss in ("rslad", "kd", "akd", "ard", "iad", "adaad", "adaiad", "mtard", "absld", "alpha")]
TERMS = [
    {"alignment": "igdm"},
    {"alignment": "kdiga"},
    {"alignment": {"name": "kdiga", "at": "adv"}},
    {"awp": {"gamma": 0.01}},
    {"loss": "kd", "alignment": "kdiga", "awp": {"gamma": 0.01}},
    {"loss": "mtard", "alignment": "igdm"},
]
TEACHERS = [
    {"teacher": teacher, "teacher_objective": objective}
    for teacher in ("dynamic", "both")
    for objective in ("pgd_at", "trades", "mart", "hat")
]
ATTACKS = [
    {"attack": {"num_steps": 3, "bn_mode": mode, "objective": objective}}
    for mode in ("running", "batch", "clean_batch")
    for objective in ("ce", "kl_clean", "kl_teacher_adv")
]
SHARED = [
    {"attack": {"num_steps": 4, "shared": shared, "own_steps": own}, "teacher": teacher}
    for shared in ("smallest", "largest")
    for own in (0, 1)
    for teacher in ("frozen", "dynamic")
]
SAMPLINGS = [{"sampling": name} for name in ("per_pass", "uniform", "sandwich", "progressive", "pareto")]


@pytest.mark.parametrize("changes", LOSSES + TERMS + TEACHERS + ATTACKS + SHARED + SAMPLINGS, ids=str)
def test_the_plan_foretells_what_the_trainer_counts(train_set, tmp_path, changes):
    run = phase_run(train_set, tmp_path, epochs=1, **changes)
    phase = phase_of(epochs=1, **changes)
    work = planned_work(tiny_space(), phase, images=IMAGES, seed=0)
    assert run.rows[-1]["forward_equivalents"] == round(work.forwards * run.rows[-1]["images"])


def test_macs_weigh_every_pass_by_its_network():
    space, both_ends = tiny_space(), phase_of(sampling="sandwich", archs_per_step=2)
    largest, smallest = (space.spec(arch).macs for arch in (space.largest, space.smallest))
    per_subnet = 3 + 2 * 2 + 3  # clean pass, two attack steps, adversarial pass
    work = planned_work(space, both_ends, images=IMAGES, seed=0, teacher_macs=1000)
    assert work.forwards == 2 * per_subnet + 1
    assert work.macs == per_subnet * (largest + smallest) + 1000
    attack = {"num_steps": 4, "shared": "smallest", "own_steps": 1}
    shared = planned_work(space, phase_of(sampling="sandwich", archs_per_step=2, attack=attack), images=IMAGES, seed=0)
    assert shared.forwards == (3 + 8 + 3) + (3 + 2 + 3) + 1
    assert shared.macs == (3 + 8 + 3) * smallest + (3 + 2 + 3) * largest


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": "per_pass", "archs_per_step": 2},
        {"sampling": "uniform"},
        {"sampling": "sandwich", "archs_per_step": 4},
        {"sampling": "pareto", "archs_per_step": 4},
        {"sampling": "progressive", "loss": "adaad"},
    ],
    ids=str,
)
def test_strategies_spend_equally_much_within_a_step(train_set, tmp_path, changes):
    budget = 40_000
    phase = within_budget(
        tiny_space(),
        phase_of(forward_equivalents=budget, epochs=10, warmup_epochs=1, **changes),
        images=IMAGES,
        seed=0,
    )
    assert phase.warmup_epochs == pytest.approx(phase.epochs / 10)
    run = phase_run(
        train_set, tmp_path, fit_now=False, epochs=phase.epochs, warmup_epochs=phase.warmup_epochs, **changes
    )
    run.fit()
    step = planned_work(tiny_space(), phase, images=IMAGES, seed=0).forwards * 16
    assert abs(run.rows[-1]["forward_equivalents"] - budget) <= 0.5 * step


def test_a_curriculum_is_counted_at_its_mean_and_a_phase_without_a_budget_is_left_alone():
    attack = {"num_steps": 4, "first_steps": 1}
    phase = phase_of(sampling="uniform", archs_per_step=1, attack=attack, epochs=8)
    work = planned_work(tiny_space(), phase, images=IMAGES, seed=0)
    assert work.forwards == pytest.approx(1 + 6 + 2 * 2.5)
    assert within_budget(tiny_space(), phase, images=IMAGES, seed=0) is phase


# The complexity-aware learning rate.


def test_pace_falls_from_the_largest_to_the_smallest_subnet_with_the_training():
    space = tiny_space()
    paces = [pace(space, arch, progress=0.5, decay=2) for arch in (space.largest, space.smallest)]
    assert paces == [1, 0.25]  # (1 - 0.5)^0 and (1 - 0.5)^2
    middle = pace(space, space.arch([0] + [1] * (len(space.choices) - 1)), progress=0.5, decay=2)
    assert 0.25 < middle < 1
    assert pace(space, space.smallest, progress=0.0, decay=2) == 1
    assert pace(space, space.smallest, progress=0.9, decay=0) == 1


def gradients(phase: Phase, *, progress: float) -> dict[str, torch.Tensor]:
    """Gradients of one step at a share of the training."""
    space = tiny_space()
    net = random_supernet(space, dtype=torch.float32)
    plan = phase_plan(space, phase)
    step = step_of(net, phase, plan, teacher=plain_network(seed=0), total_steps=100)
    images = random_images(space, 8, dtype=torch.float32)
    labels = torch.arange(8) % 3
    take(step, images, labels, number=round(100 * progress), lr=0.0)
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


def test_gradients_of_a_small_subnet_shrink_by_its_pace():
    ends = {"width": [0.5], "depth": [0], "expand": [0.5], "sampling": "uniform", "archs_per_step": 1}
    plain, paced = (gradients(phase_of(complexity_decay=decay, **ends), progress=0.75) for decay in (0, 1.5))
    factor = pace(tiny_space(), tiny_space().smallest, progress=0.75, decay=1.5)
    assert factor == 0.25**1.5
    assert any(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(paced[name], factor * gradient, rtol=1e-5, atol=1e-9)


def test_the_option_changes_a_training_of_several_subnets_and_not_one_of_the_largest_alone(train_set, tmp_path):
    def ended(name: str, **changes: object):
        return phase_run(train_set, tmp_path / name, epochs=1, **changes).net.state_dict()

    assert not same(ended("a", complexity_decay=0), ended("b", complexity_decay=2))
    alone = {"width": [1.0], "depth": [1], "expand": [1.0], "archs_per_step": 1}
    assert same(ended("c", complexity_decay=0, **alone), ended("d", complexity_decay=2, **alone))


def test_the_pace_at_the_end_is_finite():
    assert np.isfinite(pace(tiny_space(), tiny_space().smallest, progress=1.0, decay=10))


# In-place distillation by alpha-divergence.


def test_alpha_divergence_distils_from_the_largest_subnet_of_the_same_step():
    space, seen = tiny_space(), []
    net = random_supernet(space, dtype=torch.float32)
    phase = phase_of(loss="alpha", teacher="dynamic", teacher_objective="pgd_at", archs_per_step=3)
    plan = phase_plan(space, phase)

    def watched(drawn: Drawn) -> Drawn:
        def loss(batch, **options):
            seen.append((drawn, batch, drawn.objective.loss(batch, **options)))
            return seen[-1][2]

        return replace(drawn, objective=replace(drawn.objective, loss=loss))

    subnets = [watched(drawn) for drawn in plan.draw(0, 0, 0)]
    step = step_of(net, phase, replace(plan, draw=lambda seed, step, data_pass: subnets))
    labels = torch.arange(8) % 3
    images = random_images(space, 8, dtype=torch.float32)
    take(step, images, labels, lr=0.0)
    (guide, guide_batch, guide_loss), *students = seen
    assert guide.guides
    assert guide.arch == space.largest
    assert students[0][0].arch == space.smallest
    torch.testing.assert_close(guide_loss, F.cross_entropy(guide_batch.adv, labels))
    for _, batch, value in students:
        assert torch.equal(batch.teacher, guide_batch.clean.detach())
        assert not batch.teacher.requires_grad
        torch.testing.assert_close(value, alpha_loss(batch.clean, batch.adv, guide_batch.clean))
        assert value > 0
