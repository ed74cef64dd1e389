"""The rows of the training-step ladder, and the problem that all of them solve."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import Call, Row, Timing, computed_here, made_step
from plain_step import Levers, Outcome, PlainStep, Recipe, loop_sgd
from torch import Tensor

from proard.config import PRESETS, Phase, Space, TrainingAttack, TrainTeacher
from proard.config.losses import PgdAt, Rslad
from proard.kernels import plain_twins
from proard.losses import Batch
from proard.nets import SubnetView, Supernet, extract, fold
from proard.nets.view import Statistics
from proard.space import Arch, SearchSpace, key_of
from proard.training import Drawn, Plan, StepBatch, single_plan
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
DEFAULT_SCALES = {"resnet_cifar": 0.125}  # of the channels, for spaces too large for a run of minutes
OFFICIAL = "official"  # the official classes, if the user has them
EXACT = tuple(ALL_LEVERS)[:9]
COLUMNS = {"ratio_total": "/released:.2f", "ratio_plain": "/plain:.2f", "ratio_previous": "/previous:.2f"}
COLUMNS |= {"ms_per_step": "ms/step:.3g", "images_per_second": "images/s:.3g"}


@dataclass(frozen=True)
class Problem:
    """Inputs of every row: archs, one batch, weights of student and teacher, which every row copies.

    `images` are at least 0.02 inside [0, 1], so that the start noise stays in the pixel range (the released code does
    not clip it).
    """

    archs: list[Arch]
    images: Tensor
    labels: Tensor
    student: Supernet
    teacher: Supernet
    recipe: Recipe

    def placed(self, device: torch.device, dtype: torch.dtype | None = None) -> Problem:
        """A copy on a device, in another type if one is given."""
        student, teacher = (copy.deepcopy(net).to(device, dtype) for net in (self.student, self.teacher))
        images, labels = self.images.to(device, dtype), self.labels.to(device)
        return replace(self, images=images, labels=labels, student=student, teacher=teacher)

    def with_steps(self, num_steps: int) -> Problem:
        """The problem with another number of attack steps."""
        return replace(self, recipe=replace(self.recipe, num_steps=num_steps))

    def facts(self) -> list[dict[str, Any]]:
        """Names and costs of the archs."""
        return [{"arch_id": arch.arch_id, "macs": self.student.space.spec(arch).macs} for arch in self.archs]

    def describe(self) -> str:
        """Space, costs of the archs, batch and attack in a line."""
        macs = ", ".join(f"{fact['macs'] / 1e6:.1f} M" for fact in self.facts())
        name = self.student.space.settings.name
        return f"{name}, subnets of {macs} MACs, batch {len(self.images)}, PGD-{self.recipe.num_steps}"


class PackageStep:
    """`proard.training`'s step on a copy of a problem's student, with attack statistics `running` as released.

    `fused`: the optimizer updates all tensors at once. `shared`: the attack's settings for several subnets that share
    one. `take_steps` takes the attack's steps. `graphs`: all passes of a subnet that recurs are replayed, as CUDA
    graphs or by what `capture` makes.
    """

    moves = ("clean",)

    def __init__(
        self,
        problem: Problem,
        *,
        fused: bool = True,
        attack_dtype: str = "float32",
        dtype: str = "float32",
        shared: Mapping[str, Any] | None = None,
        take_steps: Callable[..., Tensor] | None = None,
        optimizer: str = "sgd",
        graphs: bool = False,
        capture: Callable[[Callable[[], object]], Callable[[], object]] | None = None,
    ) -> None:
        recipe, self.net = problem.recipe, copy.deepcopy(problem.student)
        how = {"num_steps": recipe.num_steps, "step_size": recipe.step_size, **(shared or {})}
        same = {name: getattr(recipe, name) for name in ("lr", "momentum", "weight_decay")}
        attack = TrainingAttack(start="gaussian", bn_mode="running", **how)
        phase = Phase(
            sampling="uniform",
            archs_per_step=1,
            attack=attack,
            dtype=dtype,
            optimizer=optimizer,
            loss=Rslad(adv_weight=recipe.adv_weight),
            **same,
        )
        objective, options = bind(phase.loss, phase)
        loss, self.recipe = objective.loss, recipe

        def remembered(batch: Batch, **given: Any) -> Tensor:
            self.batch = batch
            return loss(batch, **given)

        objective = replace(objective, loss=remembered)
        plan = Plan(lambda seed, step, data_pass: [Drawn(arch, objective, options) for arch in self.archs])
        teacher = problem.teacher
        teacher = fold(extract(teacher, teacher.space.largest), dtype=teacher.mean.dtype)
        parts = {
            "optimizer": None if fused else loop_sgd(self.net, recipe),
            "take_steps": take_steps,
            "attack_dtype": getattr(torch, attack_dtype),
            "capture": capture,
        }
        self.step = made_step(self.net, phase, plan, recipe.eps, teacher, 0, **parts)
        if not graphs:
            self.step.recurring = None
        self.optimizer = self.step.update.optimizer

    def __call__(self, arch: Arch, images: Tensor, labels: Tensor, generator: torch.Generator) -> Outcome:
        """Train `arch` on one batch."""
        return self.together([arch], images, labels, generator)

    def together(self, archs: list[Arch], images: Tensor, labels: Tensor, generator: torch.Generator) -> Outcome:
        """Train several archs in one step; the outcome is that of the last."""
        self.archs = archs
        self.result = self.step(StepBatch(images, labels, generator, lr=self.recipe.lr))
        return Outcome(self.batch.adversarial, self.batch.clean.detach(), self.batch.adv.detach())


class WithoutKernels:
    """A step that uses the plain forms of the C kernels."""

    def __init__(self, step: PlainStep | PackageStep) -> None:
        self.step = step

    def __call__(self, *args: Any) -> Outcome:
        """Train an arch on one batch."""
        with plain_twins("maps"):
            return self.step(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)


Step = PlainStep | PackageStep | WithoutKernels


def build(row: str, problem: Problem) -> Step:
    """Make a row's step on its own copies of student and teacher."""
    number = int(row[1:])
    if number < 7:
        nets = copy.deepcopy((problem.student, problem.teacher))
        return WithoutKernels(PlainStep(*nets, problem.recipe, Levers(*(number > lever for lever in range(6)))))
    attack_dtype, dtype = ("bfloat16" if number >= first else "float32" for first in (9, 10))
    step = PackageStep(problem, fused=number > 7, attack_dtype=attack_dtype, dtype=dtype)
    return step if number > 7 else WithoutKernels(step)


def training_call(step: Step, problem: Problem, images: Tensor | None = None, *, together: bool = False) -> Call:
    """A call that trains every arch on the batch once: in one step each, or in one step `together`."""
    if images is None:
        images = laid_out(problem.images, "" if isinstance(step, PackageStep) else RELEASED)

    def run(number: int) -> None:
        generator = torch.Generator().manual_seed(number + 1)
        if together:
            step.together(problem.archs, images, problem.labels, generator)
            return
        for arch in problem.archs:
            step(arch, images, problem.labels, generator)

    return run


def step_times(row: str, timing: Timing, *, steps: int, batch: int) -> Row:
    """Times of one step of a call, on `batch` images."""
    times = {"ms_per_step": 1e3 * timing.seconds / steps, "cpu_ms_per_step": 1e3 * timing.cpu_seconds / steps}
    rounded = {name: round(value, 3) for name, value in times.items()}
    return rounded | {"images_per_second": round(batch * steps / timing.seconds, 2)}


def scaled_space(name: str, scale: float) -> SearchSpace:
    """Multiply all channels of a preset, and what they are rounded to, by `scale`, if that gives whole numbers."""
    full = PRESETS[name]

    def times(channels: int) -> int:
        if not float(channels * scale).is_integer() or channels * scale < 1:
            raise ValueError(f"width scale {scale:g} leaves {channels * scale:g} of {channels} channels of {name}")
        return int(channels * scale)

    fields = full.model_dump()
    fields["channel_multiple"] = times(full.channel_multiple)
    for part in (fields["stem"], *fields["units"]):
        part["channels"] = times(part["channels"])
    return SearchSpace(Space.model_validate(fields))


def make_problem(
    space: SearchSpace, *, recipe: Recipe, num_archs: int, batch_size: int, seed: int = 0, dtype: torch.dtype
) -> Problem:
    """Random archs, images and networks; norms and statistics are of ordinary size and not 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    settings, channels = space.settings, space.settings.image_channels
    archs = [space.arch(genes) for genes in space.sample(num_archs, np.random.default_rng(seed))]
    shape = (batch_size, channels, settings.image_size, settings.image_size)
    images = torch.rand(shape, generator=generator).mul_(0.96).add_(0.02).to(dtype)
    labels = torch.randint(settings.classes, (batch_size,), generator=generator)
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
    """Set the running statistics of a subnet's channels to the batch's."""
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


def trained(problem: Problem, *, num_steps: int, batch_size: int = 64, seed: int = 0) -> Problem:
    """The problem with its student's first arch trained by PGD-2 on smooth patterns, one per class, in noise.

    Its student is changed; images and labels of the returned one are of the patterns, as many as before and on the
    same device.
    """
    space, device = problem.student.space.settings, problem.images.device
    arch, generator = problem.archs[0], torch.Generator().manual_seed(seed)
    coarse = torch.rand(space.classes, space.image_channels, 4, 4, generator=generator)
    patterns = F.interpolate(coarse, size=space.image_size, mode="bicubic").clamp(0, 1)
    attack = TrainingAttack(num_steps=2, step_size=problem.recipe.eps, bn_mode="running")
    recipe = TrainTeacher(objective=PgdAt(), attack=attack)
    plan = single_plan(arch, recipe.objective, recipe)
    train = made_step(problem.student, recipe, plan, problem.recipe.eps, None, seed)
    for step in range(num_steps):
        images, labels = (part.to(device) for part in draw(patterns, batch_size, generator))
        rate = 0.05 * min(1.0, (step + 1) / 10) * (1 - step / num_steps)
        train(StepBatch(images, labels, generator, step=step, lr=rate))
    images, labels = draw(patterns, len(problem.images), generator)
    return replace(problem, images=images.to(device), labels=labels.to(device))


def draw(patterns: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy copies of random patterns, as images in channels_last memory, and their labels."""
    labels = torch.randint(len(patterns), (count,), generator=generator)
    noise = torch.empty(count, *patterns.shape[1:]).normal_(0, 0.05, generator=generator)
    images = (0.1 + 0.8 * patterns[labels] + noise).clamp(0.02, 0.98)
    return images.contiguous(memory_format=torch.channels_last), labels
