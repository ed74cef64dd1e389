"""Subnets that recur are trained by replaying their passes: equal weights, equal counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import random_images, random_supernet, tiny_config, tiny_space
from training_runs import same, step_of, take

from proard.kernels import CapturedCalls
from proard.losses import OBJECTIVES, Batch
from proard.nets import extract, fold
from proard.training import phase_plan, single_plan
from proard.training.recurring import _of_tensors

IMAGES, LABELS = random_images(tiny_space(), 6, dtype=torch.float32), torch.arange(6) % 3


class Capture:
    """Counts captures and replays; a replay runs the function again."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, body):
        self.captures += 1

        def replay():
            self.replays += 1
            body()

        return replay


def trained(settings, plan, *, capture=None, steps=5, teacher=None):
    """State and results after some steps; batch and noise are others in every step."""
    net = random_supernet(tiny_space(), dtype=torch.float32)
    step = step_of(net, settings, plan, capture=capture, teacher=teacher)
    results = []
    for number in range(steps):
        images = IMAGES.roll(number, 0) * (1 - 0.05 * number)
        results.append(take(step, images, LABELS.roll(number), number=number, seed=number))
    return net.state_dict(), results, step


def require_equal(ends, others):
    assert same(ends[0], others[0])
    for found, expected in zip(ends[1], others[1], strict=True):
        assert (found.work, found.gradients) == (expected.work, expected.gradients)
        for name in ("loss", "clean", "robust"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("objective", ["plain", "pgd_at", "trades", "mart"])
@pytest.mark.parametrize("start", ["uniform", "n_fgsm", "zero"])
def test_a_network_alone_is_replayed_from_its_third_step_on(objective, start):
    attack = {"num_steps": 2, "step_size": 0.05, "start": start}
    settings = tiny_config(
        train_teacher__attack=attack, train_teacher__objective=objective, train_teacher__optimizer="muon"
    ).train_teacher
    plan, capture = single_plan(tiny_space().largest, settings.objective, settings), Capture()
    require_equal(trained(settings, plan, capture=capture), trained(settings, plan))
    assert (capture.captures, capture.replays) == (1, 3)


@pytest.mark.parametrize("teacher", ["dynamic", "frozen", "both"])
def test_a_sandwich_replays_its_ends_beside_subnets_that_never_recur(teacher):
    (phase,) = tiny_config(
        phase__teacher=teacher, phase__sampling="sandwich", phase__archs_per_step=3, phase__loss="rslad"
    ).train_phase.phases
    space, capture = tiny_space(), Capture()
    frozen = None
    if teacher != "dynamic":
        frozen = fold(extract(random_supernet(space, dtype=torch.float32, seed=3).eval(), space.largest))
    plan = phase_plan(space, phase)
    ends = trained(phase, plan, capture=capture, teacher=frozen)
    require_equal(ends, trained(phase, plan, teacher=frozen))
    assert capture.captures >= 2
    assert capture.replays >= 6


def test_what_steps_cannot_replay_runs_as_ever():
    attack = {"num_steps": 2, "step_size": 0.05}
    for changed in ({"awp": {"gamma": 0.01}}, {"attack": attack | {"shared": "largest"}}, {"objective": "ikl"}):
        settings = tiny_config(
            **{f"train_teacher__{name}": value for name, value in ({"attack": attack} | changed).items()}
        ).train_teacher
        capture = Capture()
        trained(settings, single_plan(tiny_space().largest, settings.objective, settings), capture=capture)
        assert capture.captures == 0, changed


def test_a_capture_that_fails_leaves_the_training_as_it_was():
    settings = tiny_config().train_teacher
    plan = single_plan(tiny_space().largest, settings.objective, settings)

    def fails(_body):
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.warns(UserWarning, match=r"training steps run eagerly.*not permitted"):
        found = trained(settings, plan, capture=fails)
    require_equal(found, trained(settings, plan))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_train_as_eager_steps_do():
    settings = tiny_config(train_teacher__objective="trades", train_teacher__optimizer="muon").train_teacher
    plan, ends = single_plan(tiny_space().largest, settings.objective, settings), []
    for graphs in (True, False):
        net = random_supernet(tiny_space(), dtype=torch.float32).cuda()
        step = step_of(net, settings, plan)
        step.recurring = step.recurring if graphs else None
        for number in range(6):
            take(step, IMAGES.cuda(), LABELS.cuda(), number=number, lr=0.01, seed=number)
        assert not graphs or len(step.recurring.calls.graphs) == 1
        ends.append(net.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-2, atol=1e-3)


class Told(Batch):
    """A batch that notices who reads what a graph would keep."""

    def __getattribute__(self, name):
        if name in ("progress", "data_pass", "memory"):
            raise AssertionError(f"the loss reads {name}")
        return super().__getattribute__(name)


def test_losses_that_are_replayed_read_tensors_alone():
    replayed = {name: objective for name, objective in OBJECTIVES.items() if _of_tensors(objective)}
    assert {"plain", "pgd_at", "trades", "rslad", "ard", "kd"} <= set(replayed)
    assert not {"adr", "ikl", "iad", "absld", "mtard", "adaad"} & set(replayed)
    logits = {name: torch.randn(6, 3) for name in ("clean", "adv", "teacher", "mirrored", "beyond")}
    for name in ("plain", "pgd_at", "trades", "mart"):
        loss = tiny_config(train_teacher__objective=name).train_teacher.objective
        assert torch.isfinite(replayed[name].loss(Told(LABELS, **logits), **loss.options)), name
    for name in sorted({"kd", "ard", "rslad", "alpha", "fast_edge"} & set(replayed)):
        (phase,) = tiny_config(phase__loss=name).train_phase.phases
        assert torch.isfinite(replayed[name].loss(Told(LABELS, **logits), **phase.loss.options)), name
    for name, objective in replayed.items():
        assert {field.name for field in dataclasses.fields(Batch)} >= objective.needs, name


def test_calls_are_recorded_once_and_read_their_arguments_where_they_were_copied():
    capture = Capture()
    calls = CapturedCalls(capture=capture, capacity=2)
    total = torch.zeros(())

    def body(given):
        total.add_(given["x"].sum())
        return {"twice": 2 * given["x"]}

    for number in range(1, 5):
        (found,) = calls("key", body, {"x": torch.full((2,), float(number))}).values()
        assert found.tolist() == [2.0 * number] * 2
    assert (capture.captures, capture.replays) == (1, 3)
    assert float(total) == 2 * (1 + 2 + 3 + 4)
    for other in ("second", "third"):
        calls(other, body, {"x": torch.ones(2)})
    assert list(calls.graphs) == ["second", "third"]
