"""The rows of the training-step ladder, and the problem that all of them start from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import computed_here
from plain_step import Levers, Outcome, PlainStep, Recipe, loop_sgd
from torch import Tensor

from proard.config import PRESETS, Phase, Space, Threat, TrainingAttack
from proard.kernels import maps
from proard.losses import Batch
from proard.nets import SubnetView, Supernet, extract, fold
from proard.nets.elastic import key_of
from proard.nets.view import Statistics
from proard.space import Arch, SearchSpace
from proard.training import Drawn, Plan, StepBatch, training_step
from proard.training.plan import bind

ALL_LEVERS = {
    "V0": "released step",
    "V1": "plain step: redundant forwards dropped, teacher without a graph",
    "V2": "channels_last memory",
    "V3": "subnet materialised once for the attack",
    "V4": "batch norm folded in the attack",
    "V5": "closed-form logit gradient, update in place",
    "V6": "input gradient written out, without autograd",
    "V7": "one view for all passes, gradients scattered, folded teacher",
    "V8": "fused SGD, C kernels: the package's step",
    "V9": "bfloat16 attack",
    "V10": "bfloat16 training passes",
}
LEVERS = computed_here(ALL_LEVERS, rounded=("V9", "V10"))
RELEASED, PLAIN = "V0", "V1"  # the two baselines
DEFAULT_SCALES = {"resnet_cifar": 0.125}  # of the channels, where a space is too large for a minute's run
OFFICIAL = "official"  # the official classes, where the user has them
EXACT = tuple(ALL_LEVERS)[:9]


@dataclass(frozen=True)
class Problem:
    """What every row starts from: archs, one batch, weights of student and teacher.

    Attributes
    ----------
    images : Tensor of shape (batch, channels, height, width)
        At least 0.02 inside [0, 1], so that the start noise never leaves the box (the released code does not clip it).
    labels : Tensor of shape (batch,)
    student, teacher : Supernet
        Copied by every row.
    """

    archs: list[Arch]
    images: Tensor
    labels: Tensor
    student: Supernet
    teacher: Supernet
    recipe: Recipe


class PackageStep:
    """`proard.training`'s step on given archs, with attack statistics `running` as in the released code.

    `shared`: keys of the attack that say whether, and how, several subnets share one.
    """

    moves = ("clean",)

    def __init__(
        self,
        student: Supernet,
        teacher: Supernet,
        recipe: Recipe,
        *,
        fused: bool = True,
        attack_dtype: str = "float32",
        dtype: str = "float32",
        shared: Mapping[str, Any] | None = None,
    ) -> None:
        attack = TrainingAttack(
            num_steps=recipe.num_steps,
            step_size=recipe.step_size,
            start="gaussian",
            bn_mode="running",
            dtype=attack_dtype,
            **(shared or {}),
        )
        phase = Phase(
            sampling="uniform",
            archs_per_step=1,
            adv_weight=recipe.adv_weight,
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            attack=attack,
            dtype=dtype,
        )
        self.net, self.recipe = student, recipe
        objective, options = bind(phase.loss, phase)
        kept = replace(objective, loss=self._keep(objective.loss))
        plan = Plan(lambda seed, step, data_pass: [Drawn(arch, kept, options) for arch in self.archs])
        folded_teacher = fold(extract(teacher, teacher.space.largest), dtype=teacher.mean.dtype)
        made = {"threat": Threat(eps=recipe.eps), "teacher": folded_teacher}
        self.step = training_step(student, phase, plan, **made)
        if attack_dtype == "float32":
            self.step.attacker.dtype = student.mean.dtype  # float64 in the equality check
        if not fused:
            self.step.update.optimizer = loop_sgd(student, recipe)
        self.optimizer = self.step.update.optimizer

    def _keep(self, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A loss that also remembers its batch."""

        def kept(batch: Batch, **options: float) -> Tensor:
            self.batch = batch
            return loss(batch, **options)

        return kept

    def __call__(self, arch: Arch, images: Tensor, labels: Tensor, generator: torch.Generator) -> Outcome:
        """Train `arch` on one batch."""
        return self.together([arch], images, labels, generator)

    def together(self, archs: list[Arch], images: Tensor, labels: Tensor, generator: torch.Generator) -> Outcome:
        """Train several archs in one step; the outcome is that of the last."""
        self.archs = archs
        self.result = self.step(StepBatch(images, labels, generator, lr=self.recipe.lr))
        return Outcome(self.batch.adversarial, self.batch.clean.detach(), self.batch.adv.detach())


class WithoutKernels:
    """A step that goes the C kernels' plain way."""

    def __init__(self, step: PlainStep | PackageStep) -> None:
        self.step = step

    def __call__(self, *args: Any) -> Outcome:
        """Train an arch on one batch."""
        with mock.patch.object(maps, "maps_library", return_value=None):
            return self.step(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)


Step = PlainStep | PackageStep | WithoutKernels


def build(row: str, problem: Problem) -> Step:
    """Make a row's step on its own copies of student and teacher."""
    nets = (copy.deepcopy(problem.student), copy.deepcopy(problem.teacher), problem.recipe)
    number = int(row[1:])
    if number < 7:
        return WithoutKernels(PlainStep(*nets, Levers(*(number > lever for lever in range(6)))))
    attack_dtype, dtype = ("bfloat16" if number >= first else "float32" for first in (9, 10))
    step = PackageStep(*nets, fused=number > 7, attack_dtype=attack_dtype, dtype=dtype)
    return step if number > 7 else WithoutKernels(step)


def scaled_space(name: str, scale: float) -> SearchSpace:
    """Multiply all channels of a preset, and what they are rounded to, by `scale`.

    Raises
    ------
    ValueError
        A number of channels would not be whole.
    """
    full = PRESETS[name]

    def times(channels: int) -> int:
        if not float(channels * scale).is_integer() or channels * scale < 1:
            raise ValueError(f"width scale {scale:g} leaves {channels * scale:g} of {channels} channels of {name}")
        return int(channels * scale)

    fields = full.model_dump()
    fields["channel_multiple"] = times(full.channel_multiple)
    fields["stem"]["channels"] = times(full.stem.channels)
    for unit in fields["units"]:
        unit["channels"] = times(unit["channels"])
    return SearchSpace(Space.model_validate(fields))


def make_problem(
    space: SearchSpace, *, recipe: Recipe, num_archs: int, batch_size: int, seed: int = 0, dtype: torch.dtype
) -> Problem:
    """Random archs, images and networks whose norms and statistics are of ordinary size but nowhere trivial."""
    generator = torch.Generator().manual_seed(seed)
    settings = space.settings
    archs = [space.arch(genes) for genes in space.sample(num_archs, np.random.default_rng(seed))]
    shape = (batch_size, settings.image_channels, settings.image_size, settings.image_size)
    images = torch.rand(shape, generator=generator).mul_(0.96).add_(0.02).to(dtype)
    labels = torch.randint(settings.classes, (batch_size,), generator=generator)
    channels = settings.image_channels
    nets = []
    for among in (archs, []):
        net = Supernet(space, mean=[0.0] * channels, std=[1.0] * channels, generator=generator).to(dtype)
        norms = [layer.bn for layer in net.layers.values() if layer.bn is not None]
        for norm in norms:
            norm.weight.data.uniform_(0.8, 1.2, generator=generator)
            norm.bias.data.normal_(0, 0.1, generator=generator)
        for block in space.spec(space.largest).blocks:
            if block.shortcut is not None:  # small residual branches: gradients as smooth as trained networks' are
                net.layers[key_of(block.steps[-1])].bn.weight.data.mul_(0.2)
        for arch in (space.largest, *among):
            _settle_statistics(net, arch, images)
        for norm in norms:
            norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.2, generator=generator))
        nets.append(net)
    return Problem(archs, images, labels, *nets, recipe)


@torch.no_grad()
def _settle_statistics(net: Supernet, arch: Arch, images: Tensor) -> None:
    """Put the batch's statistics into the running ones of a subnet's channels."""
    statistics: Statistics = {}
    SubnetView(net, arch)(images, record=statistics)
    for conv in net.space.spec(arch).convs:
        if not conv.norm:
            continue
        bn = net.layers[key_of(conv)].bn
        for running, seen in zip((bn.running_mean, bn.running_var), statistics[conv.name], strict=True):
            running[: conv.out_channels].copy_(seen)


def laid_out(images: Tensor, row: str) -> Tensor:
    """Put the images in the memory layout of a row."""
    layout = torch.contiguous_format if row in (RELEASED, PLAIN, OFFICIAL) else torch.channels_last
    return images.contiguous(memory_format=layout)
