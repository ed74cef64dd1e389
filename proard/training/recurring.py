"""Subnets that recur within a training: all their passes of a step are one CUDA graph, so that no host paces the GPU.

A step of a bottleneck network launches thousands of kernels, which takes the host longer than a fast GPU needs for
their work. A graph launches them at once. It reads the weights where they are, and batch, start of the attack and
teacher's logits from tensors that each step fills.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from proard.attacks import take_steps
from proard.config import TrainingSettings
from proard.kernels import CapturedCalls
from proard.losses import Objective
from proard.space import Work
from proard.training.attacker import Attacker
from proard.training.counted import Forward, StepTally
from proard.training.plan import Drawn
from proard.training.teachers import Guidance

# What a loss and an attack may read: nothing that a graph would keep as it was when it was recorded, as the share of
# the training that is done.
NEEDS = frozenset({"clean", "adv", "teacher", "mirrored", "beyond"})
INNER = (None, "ce", "margin", "kl_clean", "kl_teacher")

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Given:
    """What all passes of a subnet in a step read.

    Attributes
    ----------
    images, labels : Tensor
        Of the batch, or of this process's part of it.
    guidance : Guidance
        The teachers.
    generator : torch.Generator
        Source of noise.
    count : float
        By which the subnet's gradients are divided.
    """

    images: Tensor
    labels: Tensor
    guidance: Guidance
    generator: torch.Generator
    count: float


class Recurring:
    """The graphs of a training's subnets, and the work that each replay stands for.

    Parameters
    ----------
    tally : StepTally
        Receives that work.
    calls : CapturedCalls
        The graphs.
    """

    def __init__(self, tally: StepTally, calls: CapturedCalls) -> None:
        self.tally, self.calls = tally, calls
        self.work: dict[Hashable, tuple[Work, int]] = {}

    def fits(self, images: Tensor, drawn: Sequence[Drawn]) -> bool:
        """Whether a step may be replayed: on a GPU, if no capture failed and its objectives read tensors alone."""
        on_device = images.is_cuda or self.calls.any_device
        return on_device and not self.calls.failed and all(_of_tensors(subnet.objective) for subnet in drawn)

    def train(
        self,
        train: Callable[..., tuple[Results, Forward]],
        attacker: Attacker,
        subnet: Drawn,
        given: Given,
    ) -> tuple[Results, Forward]:
        """What `train` does, with the same arguments: run, the second time recorded, too, and then replayed.

        The first time a subnet's attack may be captured alone: most subnets never recur.
        """
        inner, images, target = subnet.objective.inner, given.images, given.guidance.target
        options = () if inner is None else tuple(attacker.options(images).items())
        key = (subnet.arch, id(subnet.objective), given.count, options, tuple(images.shape), target is None)
        if not self.calls.met_before(key):
            return train(subnet, given)
        read = {"images": images, "labels": given.labels}
        if inner is not None:
            read["start"] = attacker.start(images, given.generator)
        if target is not None:
            read["target"] = target
        before = self.tally.work, self.tally.gradients

        def passes(tensors: Results) -> Results:
            self.tally.begin()
            told = replace(given.guidance, target=tensors.get("target"))
            own = replace(given, images=tensors["images"], labels=tensors["labels"], guidance=told)
            how = {"initial": tensors["start"], "take": take_steps} if "start" in tensors else {}
            found, _ = train(subnet, own, **how)
            self.work[key] = self.tally.work, self.tally.gradients
            return found

        found = self.calls(key, passes, read)
        work, gradients = self.work[key]
        self.tally.work, self.tally.gradients = before[0] + work, before[1] + gradients
        return found, _absent


def recurring(
    settings: TrainingSettings, tally: StepTally, *, among: int, several: bool, capture: Any = None
) -> Recurring | None:
    """The graphs of a training; None where its steps cannot be replayed.

    Parameters
    ----------
    settings : TrainingSettings
        A training whose steps differ in weights, batch, start noise and target alone.
    tally : StepTally
        The step's.
    among : int
        Number of subnets that recur.
    several : bool
        Whether several processes share the batch: they exchange statistics, which no graph does.
    capture : callable, optional
        As for `kernels.Graphs`.
    """
    attack = settings.attack
    own = attack.crafted_on == "student" and attack.shared is None and attack.carry_passes is None
    if several or not own or settings.awp is not None or settings.complexity_decay:
        return None
    return Recurring(tally, CapturedCalls(capacity=max(among, 4), capture=capture))


def _of_tensors(objective: Objective) -> bool:
    """Whether an objective reads the passes of its subnet and the target alone."""
    return objective.needs <= NEEDS and objective.inner in INNER and objective.memory is None


def _absent(images: Tensor) -> Tensor:
    """In place of a dynamic teacher that was replayed: no objective of such a step asks for more than its logits."""
    raise RuntimeError("a replayed teacher gives the logits of the clean images alone")
