"""What a training will spend: some of its steps are run beforehand on two images, through a layer that costs little."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proard.config import Phase, Threat, TrainTeacher
from proard.config.losses import Loss
from proard.space import Arch, NetSpec, SearchSpace, Work
from proard.training.plan import Plan, phase_plan, single_plan
from proard.training.step import StepBatch, training_step

SAMPLES = 256  # steps, evenly spread, that stand for all
IMAGES, SIDE = 2, 2  # of noise: how many, how large and which, changes no count


class PricedNet(nn.Module):
    """One linear layer in place of every subnet of a space; a pass counts with the multiply-accumulates of the arch.

    Parameters
    ----------
    space : SearchSpace
        The space whose subnets are priced.
    """

    mean: Tensor

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space = space
        self.register_buffer("mean", torch.zeros(space.settings.image_channels))
        self.head = nn.Linear(space.settings.image_channels * SIDE**2, space.settings.classes)

    def view(self, arch: Arch, *, total: Callable[[Tensor], Tensor] | None = None) -> _PricedView:
        """The layer, at the price of a subnet."""
        return _PricedView(self, self.space.spec(arch))


class _PricedView:
    """The layer with the calls of a `SubnetView`."""

    def __init__(self, net: PricedNet, spec: NetSpec) -> None:
        self.spec, self.weights = spec, [net.head.weight.detach().requires_grad_()]

    def __call__(self, images: Tensor, *, frozen: bool = False, **how: Any) -> Tensor:
        (weight,) = self.weights
        return F.linear(images.flatten(1), weight.detach() if frozen else weight)

    def running_statistics(self) -> dict[str, Any]:
        return {}

    def folded(self, statistics: dict[str, Any], *, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
        return lambda images: self(images, frozen=True)

    def scatter_gradients(self) -> None:
        self.weights[0].grad = None


class _PricedTeacher:
    """The layer as a frozen network of a given size."""

    def __init__(self, net: PricedNet, macs: float) -> None:
        self.layer, self.spec = net.head, _Size(macs)

    def __call__(self, images: Tensor) -> Tensor:
        return F.linear(images.flatten(1), self.layer.weight.detach())


class _Size:
    """All that counting reads of a spec."""

    def __init__(self, macs: float) -> None:
        self.macs = macs


def price(
    space: SearchSpace,
    settings: Phase | TrainTeacher,
    plan: Plan,
    *,
    seed: int,
    steps_per_pass: int,
    total_steps: int,
    teacher_macs: float = 0.0,
) -> Work:
    """Mean work of a step for one image.

    Parameters
    ----------
    space : SearchSpace
        The space of the plan's archs.
    settings : Phase or TrainTeacher
        Loss and attack.
    plan : Plan
        Subnets and objectives of every step.
    seed : int
        Seed of the plan's draws.
    steps_per_pass, total_steps : int
        Steps of a pass over the data, and of the training; at most `SAMPLES` of them are run, evenly spread.
    teacher_macs : float
        Multiply-accumulates of teacher and control for one image.

    Notes
    -----
    Views are not kept, so a table of teacher outputs saves nothing here: with one less is spent.
    """
    generator = torch.Generator().manual_seed(0)
    channels, classes = space.settings.image_channels, space.settings.classes
    with torch.random.fork_rng(devices=[]):
        net = PricedNet(space)
    other = _PricedTeacher(net, teacher_macs)
    teacher = None if getattr(settings, "teacher", "frozen") == "dynamic" else other
    settings = settings.model_copy(update={"dtype": "float32", "optimizer": "sgd"})
    threat = Threat(eps=1 / 255)
    step_on = training_step(
        net, settings, plan, threat=threat, seed=seed, total_steps=total_steps, teacher=teacher, control=other
    )
    images = torch.rand((IMAGES, channels, SIDE, SIDE), generator=generator)
    batch = StepBatch(images, torch.arange(IMAGES) % classes, generator)
    steps = np.unique(np.linspace(0, total_steps - 1, min(SAMPLES, total_steps)).round().astype(int)).tolist()
    works = [step_on(replace(batch, step=step, data_pass=step // steps_per_pass)).work for step in steps]
    return sum(works, start=Work()) * (1 / len(works))


def planned_work(space: SearchSpace, phase: Phase, *, images: int, seed: int, teacher_macs: float = 0.0) -> Work:
    """Mean work of a phase's steps for one image; arguments as in `price`, `images` those of the training set."""
    plan = phase_plan(space, phase)
    per_pass = max(images // phase.batch_size, 1)
    total = max(round(phase.epochs * per_pass * plan.passes_per_epoch), 1)
    steps = {"steps_per_pass": per_pass, "total_steps": total}
    return price(space, phase, plan, seed=seed, teacher_macs=teacher_macs, **steps)


def passes_alone(space: SearchSpace, settings: Phase | TrainTeacher, loss: Loss) -> tuple[float, float]:
    """Passes of one image in a step that trains one arch by itself with the loss and the attack of `settings`.

    Alone, an arch has a frozen teacher, also where a phase's teacher is trained with its subnets. A growing number of
    attack steps is averaged over its equal parts. Adversarial weight perturbation counts from the first epoch, teacher
    outputs from tables as passes.

    Returns
    -------
    own, others : float
        Forward-equivalents through the trained network, and through the frozen teacher and the control.
    """
    first = settings.attack.first_steps
    levels = 1 if first is None else settings.attack.num_steps - first + 1
    if settings.awp is not None:
        settings = settings.model_copy(update={"awp": settings.awp.model_copy(update={"warmup_epochs": 0})})
    if isinstance(settings, Phase):
        settings = settings.model_copy(update={"teacher": "frozen"})
    plan = single_plan(space.smallest, loss, settings)
    work = price(space, settings, plan, seed=0, steps_per_pass=levels, total_steps=levels)
    own = work.macs / space.spec(space.smallest).macs
    return own, work.forwards - own


def within_budget(space: SearchSpace, phase: Phase, *, images: int, seed: int) -> Phase:
    """The phase with `epochs` and `warmup_epochs` stretched so that it spends its `forward_equivalents`.

    Without that key it is the phase as it is. What is spent differs from the budget by less than one step where every
    step costs the same, and by the scatter of the steps otherwise.
    """
    if phase.forward_equivalents is None:
        return phase
    work = planned_work(space, phase, images=images, seed=seed).forwards
    per_pass = max(images // phase.batch_size, 1)
    passes = phase.archs_per_step if phase.sampling == "per_pass" else 1
    steps = max(round(phase.forward_equivalents / (work * min(phase.batch_size, images))), 1)
    epochs = steps / (per_pass * passes)
    stretched = {"epochs": epochs, "warmup_epochs": phase.warmup_epochs * epochs / phase.epochs}
    return phase.model_copy(update=stretched)
