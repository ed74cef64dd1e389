"""What a training step costs, counted by running one: for trainings that were never made or never counted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from proard.config import Phase, TrainTeacher
from proard.nets import Supernet, extract, fold
from proard.space import SearchSpace, Work
from proard.training import Plan, phase_plan, single_plan
from proard.training.inner import Inner
from proard.training.trainer import Trainer

IMAGES = 2  # of noise: how many, and which, changes no count
PROBES = 3


@dataclass(frozen=True)
class StepPasses:
    """Passes of one image in a step that trains one network by itself.

    Attributes
    ----------
    own : float
        Forward-equivalents through the network that is trained.
    others : float
        Through the frozen networks that its loss asks: teacher and control, which have one size.
    """

    own: float
    others: float

    def macs(self, own: float, others: float) -> float:
        """Multiply-accumulates per image and step, given those of one image through each network."""
        return self.own * own + self.others * others


class _FreeNetwork:
    """A network that is asked and costs nothing: its passes stay apart from those of the trained one."""

    def __init__(self, net: Supernet) -> None:
        self.net = fold(extract(net, net.space.smallest))

    def __call__(self, images: Tensor) -> Tensor:
        return self.net(images)


def _trainer(space: SearchSpace, settings: Phase | TrainTeacher, plan: Plan, *, levels: int) -> Trainer:
    """A trainer on random weights for the space's images."""
    channels = space.settings.image_channels
    generator = torch.Generator().manual_seed(0)
    net = Supernet(space, mean=[0.5] * channels, std=[0.25] * channels, generator=generator)
    asked = _FreeNetwork(net)
    inner = Inner(settings.attack, eps=1 / 255, total_steps=levels)
    trainer = Trainer(net, settings, plan, 1 / 255, asked, 0, asked, inner=inner)
    trainer.total_steps = levels
    return trainer


def _step(trainer: Trainer, step: int) -> Work:
    """The work per image of one step on noise."""
    settings = trainer.net.space.settings
    shape = (IMAGES, settings.image_channels, settings.image_size, settings.image_size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(step))
    labels = torch.arange(IMAGES) % settings.classes
    *_, work = trainer.step(images, labels, step, 0, 0.0, torch.Generator().manual_seed(step))
    return work


def passes_alone(space: SearchSpace, settings: Phase | TrainTeacher, objective: str) -> StepPasses:
    """Passes of a step that trains one arch by itself with the loss and the attack of `settings`.

    A curriculum of attack steps is averaged over its equal parts. Adversarial weight perturbation counts from the first
    epoch, logits kept from earlier passes as asked for anew.
    """
    curriculum = settings.attack.curriculum
    levels = 1 if curriculum is None else settings.attack.num_steps - curriculum.first_steps + 1
    settings = settings.model_copy(update={"awp_warmup_epochs": 0})
    arch = space.smallest
    trainer = _trainer(space, settings, single_plan(arch, objective, settings), levels=levels)
    work = sum((_step(trainer, step) for step in range(levels)), start=Work()) * (1 / levels)
    own = work.macs / space.spec(arch).macs
    return StepPasses(own, work.forwards - own)


def recount_phase(
    space: SearchSpace, phase: Phase, *, seed: int, steps: int, images: int, forwards: int, teacher_macs: int
) -> float | None:
    """Multiply-accumulates of a phase whose history counts passes only; None where they cannot be told.

    The subnets of every step are drawn again. What a step takes is linear in their number and in their MACs; the
    coefficients are read off a few steps that are run, and the passes found this way must be those of the history.

    Parameters
    ----------
    space : SearchSpace
        The run's.
    seed : int
        The phase's.
    steps, images, forwards : int
        Optimizer steps, training images and forward-equivalents of the history.
    teacher_macs : int
        Of the frozen teacher.
    """
    plan = phase_plan(space, phase)
    trainer = _trainer(space, phase, plan, levels=1)
    if phase.teacher == "dynamic":
        trainer.teacher = None
    per_pass = max(round(steps / (phase.epochs * plan.passes_per_epoch)), 1)
    drawn = [[one for one in plan.draw(seed, step, step // per_pass) if not one.guides] for step in range(steps)]
    students = np.asarray([[len(archs), sum(space.spec(one.arch).macs for one in archs)] for archs in drawn], float)
    probes = np.unique([np.argmin(students[:, 0]), np.argmax(students[:, 0]), *range(min(PROBES, steps))])
    probed = [_step(trainer, int(step)) for step in probes]
    per_step, per_student = _line(students[probes, 0], [work.forwards for work in probed])
    fixed, passes = _line(students[probes, 1], [work.macs for work in probed])
    found = per_step * steps + per_student * students[:, 0].sum()
    told = np.allclose(fixed + passes * students[probes, 1], [work.macs for work in probed], rtol=1e-9)
    apart = phase.teacher == "frozen" or np.ptp(students[:, 1]) > 0  # else guide and students cannot be told apart
    if not told or not apart or round(found * images / steps) != forwards:
        return None
    guide = 0.0 if phase.teacher == "frozen" else fixed / space.spec(space.largest).macs
    others = found - guide * steps - passes * students[:, 0].sum()
    return float(images / steps * (fixed * steps + passes * students[:, 1].sum() + others * teacher_macs))


def _line(x: np.ndarray, y: list[float]) -> tuple[float, float]:
    """Intercept and slope; a slope through zero where all x are equal."""
    if np.ptp(x) == 0:
        return 0.0, float(np.mean(y) / x[0])
    slope, intercept = np.polyfit(x, y, 1)
    return float(intercept), float(slope)
