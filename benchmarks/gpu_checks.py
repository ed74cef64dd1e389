"""What must hold before a GPU's times mean anything: kernels, graphs and steps give what CPU and eager code give."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from step_rows import PackageStep, Problem
from torch import Tensor

from proard.attacks import pgd, take_steps
from proard.kernels import CapturedSteps, dispatch
from proard.losses import KLToTarget
from proard.nets import SubnetView
from proard.space import Arch

ITERATES = 0.999  # share of pixels that two float64 attacks, or a captured and an eager one, must end at alike (1e-6)
ONE_STEP = 0.99  # the same for one float32 step with other kernels: gradients next to zero change sign by rounding
GRADIENTS = 0.9999  # cosine of two float64 steps' weight gradients
REPLAYED = 5  # attack steps of a captured attack: enough to be captured where the network is met first


class Wrong(SystemExit):
    """A path gives something else than it should."""


def placed(problem: Problem, device: torch.device, dtype: torch.dtype | None = None) -> Problem:
    """Copy the problem to a device, in another type where one is given."""
    nets = (copy.deepcopy(net).to(device, dtype) for net in (problem.student, problem.teacher))
    return Problem(problem.archs, problem.images.to(device, dtype), problem.labels.to(device), *nets, problem.recipe)


def with_steps(problem: Problem, num_steps: int) -> Problem:
    """The problem with an attack of another length."""
    return replace(problem, recipe=replace(problem.recipe, num_steps=num_steps))


@contextmanager
def full_float32(*, deterministic: bool = True) -> Iterator[None]:
    """Context without TF32 and, where `deterministic`, with convolutions that give the same numbers every time."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kept = cuda.allow_tf32, cudnn.allow_tf32, cudnn.deterministic
    cuda.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = False, False, deterministic
    try:
        yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = kept


@contextmanager
def in_float64() -> Iterator[None]:
    """Context of plain twins in which losses, in float32 at least elsewhere, are computed in float64."""
    with (
        mock.patch.object(Tensor, "float", Tensor.double),
        mock.patch.object(dispatch, "fused_for", return_value=None),
    ):
        yield


def attacked(problem: Problem, steps: object, *, arch: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Attack a problem's batch on one of its subnets, on the problem's device."""
    view = SubnetView(problem.student, problem.archs[arch])
    with torch.no_grad():
        target = problem.teacher.eval()(problem.images, problem.teacher.space.largest)
    recipe = problem.recipe
    images = problem.images.contiguous(memory_format=torch.channels_last)
    return pgd(
        view.folded(view.running_statistics(), dtype=dtype),
        KLToTarget(target),
        images,
        eps=recipe.eps,
        step_size=recipe.step_size,
        num_steps=recipe.num_steps,
        start="gaussian",
        generator=torch.Generator().manual_seed(1),
        steps=steps,
    )


def alike(first: Tensor, second: Tensor) -> float:
    """Share of pixels that agree to 1e-6."""
    return float(((first.cpu() - second.cpu()).abs() <= 1e-6).float().mean())


def attacks_agree(cpu: Problem, gpu: Problem) -> str:
    """The eager attack on both devices, on every arch: plain twins in float64, where rounding turns no sign.

    Raises
    ------
    Wrong
        Fewer pixels than `ITERATES` end alike.
    """
    shares = []
    with in_float64():
        for arch in range(len(cpu.archs)):
            ends = (attacked(problem, take_steps, arch=arch, dtype=torch.float64) for problem in (cpu, gpu))
            shares.append(alike(*ends))
    if min(shares) < ITERATES:
        raise Wrong(f"the attack agrees with the CPU's on {min(shares):.2%} of pixels only, in float64")
    return f"attack against the CPU's in float64, {len(shares)} archs: {min(shares):.3%} of pixels alike"


def fused_attacks_agree(problem: Problem) -> str:
    """One float32 step of the attack with fused kernels and with their plain twins, on every arch.

    Raises
    ------
    Wrong
        Fewer pixels than `ONE_STEP` end alike.
    """
    one, shares = with_steps(problem, 1), []
    for arch in range(len(problem.archs)):
        fused = attacked(one, take_steps, arch=arch)
        with mock.patch.object(dispatch, "fused_for", return_value=None):
            shares.append(alike(fused, attacked(one, take_steps, arch=arch)))
    if min(shares) < ONE_STEP:
        raise Wrong(f"a step with fused kernels agrees with the plain one on {min(shares):.2%} of pixels only")
    return f"an attack step with fused kernels: {min(shares):.3%} of pixels alike"


def graphs_agree(problem: Problem, *, capture: object = None) -> str:
    """Captured and eager attacks, two subnets in turn, so that graphs are replayed with other weights than captured.

    Raises
    ------
    Wrong
        Fewer pixels than `ITERATES` end alike, or nothing was captured.
    """
    problem, lowest = with_steps(problem, REPLAYED), 1.0
    for dtype in (torch.float32, torch.bfloat16):
        steps = CapturedSteps(take_steps, batch_size=len(problem.images), capture=capture)
        changed = copy.deepcopy(problem.student)
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.mul_(1.01)
        for student in (problem.student, changed):
            one = replace(problem, student=student)
            for arch in range(len(problem.archs)):
                share = alike(
                    attacked(one, steps, arch=arch, dtype=dtype), attacked(one, take_steps, arch=arch, dtype=dtype)
                )
                if share < ITERATES:
                    raise Wrong(f"captured attack in {dtype} agrees with the eager one on {share:.2%} of pixels only")
                lowest = min(lowest, share)
        if len(steps.graphs) != len(set(problem.archs)):
            raise Wrong(f"{len(steps.graphs)} graphs were captured for {len(set(problem.archs))} archs")
    return f"captured attack against the eager one: {lowest:.3%} of pixels alike"


def steps_agree(cpu: Problem, gpu: Problem) -> str:
    """One whole training step on both devices, on every arch and on all of them with one attack, in float64.

    Raises
    ------
    Wrong
        Weight gradients have a cosine below `GRADIENTS`.
    """
    cosines = []
    with in_float64():
        for archs, shared in (*(([arch], {}) for arch in cpu.archs), (cpu.archs, {"shared": "smallest"})):
            found = (weight_gradients(problem, archs, **shared) for problem in (cpu, gpu))
            cosines.append(float(F.cosine_similarity(*found, dim=0)))
    if not min(cosines) >= GRADIENTS:
        raise Wrong(f"a step's weight gradients have a cosine of {min(cosines):.5f} with the CPU's")
    archs = f"{len(cpu.archs)} archs, each alone and together"
    return f"weight gradients of a step against the CPU's in float64, {archs}: cosine {min(cosines):.6f}"


def weight_gradients(problem: Problem, archs: list[Arch], **shared: str) -> Tensor:
    """All weight gradients of one training step on some archs, on the CPU."""
    step, images = package_step(problem, **shared)
    step.together(archs, images, problem.labels, torch.Generator().manual_seed(1))
    return torch.cat([parameter.grad.flatten().cpu() for parameter in step.net.parameters()])


def package_step(problem: Problem, **shared: str) -> tuple[PackageStep, Tensor]:
    """The package's step on copies of the networks, and the images as it takes them."""
    nets = (copy.deepcopy(problem.student), copy.deepcopy(problem.teacher))
    images = problem.images.contiguous(memory_format=torch.channels_last)
    return PackageStep(*nets, problem.recipe, shared=shared), images


def step_never_waits(problem: Problem) -> str:
    """One training step on a GPU, after one that warms up, in which the host may not wait for the device.

    Raises
    ------
    Wrong
        It does: torch says where.
    """
    step, images = package_step(problem)
    for number, mode in enumerate(("default", "error")):
        generator = torch.Generator().manual_seed(number)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            step(problem.archs[0], images, problem.labels, generator)
        except RuntimeError as error:
            raise Wrong(f"the host waits for the device in a training step: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "a training step in which the host never waits for the device"
