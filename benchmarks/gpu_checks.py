"""What must hold before a GPU's times mean anything: kernels, graphs and steps give what CPU and eager code give."""

from __future__ import annotations

import copy
from unittest import mock

import torch
import torch.nn.functional as F
from step_rows import PackageStep, Problem
from torch import Tensor

from proard.attacks import pgd, take_steps
from proard.kernels import CapturedSteps, dispatch, plain
from proard.losses import KLToTarget
from proard.nets import SubnetView

ITERATES = 0.999  # share of pixels that two float32 attacks must end at alike (1e-6)
GRADIENTS = 0.9999  # cosine of two float32 steps' weight gradients


class Wrong(SystemExit):
    """A path gives something else: nothing is timed."""


def placed(problem: Problem, device: torch.device) -> Problem:
    """Copy the problem to a device."""
    nets = (copy.deepcopy(net).to(device) for net in (problem.student, problem.teacher))
    return Problem(problem.archs, problem.images.to(device), problem.labels.to(device), *nets, problem.recipe)


def kernels_agree(device: torch.device) -> str:
    """Fused kernels and their twins on tensors of the attack's size.

    Raises
    ------
    Wrong
        They differ, or cannot run here.
    """
    fused = dispatch.fused_for(device)
    if fused is None:
        raise Wrong(f"the fused kernels do not run on {device}; the warning above says why")
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((256, 3, 32, 32), generator=generator).to(device, memory_format=torch.channels_last)
    gradient = torch.randn((256, 3, 32, 32), generator=generator).to(device, memory_format=torch.channels_last)
    low, high = (images - 0.03).clamp(min=0), (images + 0.03).clamp(max=1)
    found = []
    for twin in (fused, plain):
        rounded = torch.empty_like(images, dtype=torch.bfloat16)
        moved = twin.pgd_update_(images.clone(), gradient.clone(), low, high, step_size=2 / 255, copy=rounded)
        found.append((moved, rounded))
    if not all(torch.equal(first, second) for first, second in zip(*found, strict=True)):
        raise Wrong("the fused update differs from its plain twin")
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        logits = (10 * torch.randn((256, 10), generator=generator)).to(device, dtype)
        for target in (torch.arange(256, device=device) % 10, logits.float().flip(1).softmax(1)):
            pair = [twin.softmax_difference(logits, target).float() for twin in (fused, plain)]
            difference = float((pair[0] - pair[1]).abs().max())
            if difference > (1e-6 if dtype is torch.float32 else 2**-8):
                raise Wrong(f"the fused softmax difference differs from its plain twin by {difference:.2g} in {dtype}")
            worst = max(worst, difference)
    return f"fused update equal bit for bit, softmax difference within {worst:.1g}"


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
    """The eager attack on both devices in float32, with and without fused kernels.

    Raises
    ------
    Wrong
        Fewer pixels than `ITERATES` end alike.
    """
    wanted, shares = attacked(cpu, take_steps), {}
    shares["fused kernels"] = alike(attacked(gpu, take_steps), wanted)
    with mock.patch.object(dispatch, "fused_for", return_value=None):
        shares["plain twins"] = alike(attacked(gpu, take_steps), wanted)
    for name, share in shares.items():
        if share < ITERATES:
            raise Wrong(f"the attack with {name} agrees with the CPU's on {share:.2%} of pixels only")
    return f"attack against the CPU's: {min(shares.values()):.3%} of pixels alike"


def graphs_agree(problem: Problem, *, capture: object = None) -> str:
    """Captured and eager attacks, two subnets in turn, so that graphs are replayed with other weights than captured.

    Raises
    ------
    Wrong
        Fewer pixels than `ITERATES` end alike, or nothing was captured.
    """
    lowest = 1.0
    for dtype in (torch.float32, torch.bfloat16):
        steps = CapturedSteps(take_steps, batch_size=len(problem.images), capture=capture)
        changed = copy.deepcopy(problem.student)
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.mul_(1.01)
        for student in (problem.student, changed):
            one = Problem(problem.archs, problem.images, problem.labels, student, problem.teacher, problem.recipe)
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
    """One whole training step on both devices in float32.

    Raises
    ------
    Wrong
        Weight gradients have a cosine below `GRADIENTS`.
    """
    gradients = []
    for problem in (cpu, gpu):
        nets = (copy.deepcopy(problem.student), copy.deepcopy(problem.teacher))
        step = PackageStep(*nets, problem.recipe)
        images = problem.images.contiguous(memory_format=torch.channels_last)
        step(problem.archs[0], images, problem.labels, torch.Generator().manual_seed(1))
        gradients.append(torch.cat([parameter.grad.flatten().cpu().double() for parameter in step.net.parameters()]))
    cosine = float(F.cosine_similarity(*gradients, dim=0))
    if not cosine >= GRADIENTS:
        raise Wrong(f"a step's weight gradients have a cosine of {cosine:.5f} with the CPU's")
    return f"weight gradients of a step against the CPU's: cosine {cosine:.6f}"
