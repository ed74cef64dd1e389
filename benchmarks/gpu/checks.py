"""Checks before a GPU is timed: kernels, graphs and steps must give the results of CPU and eager code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from common import Float64Losses, Row, show
from step_rows import PackageStep, Problem
from torch import Tensor

from gpu import ways
from proard.attacks import pgd, take_steps
from proard.kernels import CapturedSteps, KeyedNoise, dispatch, plain_twins, prove
from proard.kernels.cudnn import CudnnEpilogues, NoEpilogues
from proard.kernels.switch import in_use
from proard.losses import KLToTarget
from proard.nets import SubnetView
from proard.space import Arch

ITERATES = 0.999  # share of equal pixels (to 1e-6) of two float64 attacks, or of a captured and an eager one
ONE_STEP = 0.99  # the same for one float32 step with other kernels: gradients next to zero change sign by rounding
GRADIENTS = 0.9999  # cosine of two float64 steps' weight gradients
REPLAYED = 5  # attack steps of a captured attack: enough to be captured at a network's first attack
MAPS = ((2, 8, 1, 1), (3, 24, 17, 19), (64, 264, 32, 32), (64, 40, 32, 32), (128, 2048, 4, 4), (8, 64, 112, 112))
ALL = {"types": (torch.bfloat16, torch.float32), "kinds": ("relu", "h_swish", "silu")}
REAL: Mapping[str, Mapping[str, Sequence]] = {
    # (batch, channels, height, width): odd channel counts and sides, the widest maps, one image and many
    "updates": {
        "shapes": (
            (1, 1, 8, 8),
            (1, 3, 32, 32),
            (7, 5, 17, 19),
            (1024, 3, 32, 32),
            (1, 3, 224, 224),
            (256, 1, 224, 224),
        )
    },
    "logit gradients": {
        "types": tuple(prove.ROUNDING),
        "batches": [(images, classes) for images in (1, 1024) for classes in (1, 2, 7, 10, 101, 1001)],
    },
    "noise": {"shapes": ((1, 3, 32, 32), (1024, 3, 32, 32), (7, 5, 17, 19))},
    "passes": {"shapes": MAPS, **ALL},
    "batch norm": {"shapes": MAPS, **ALL},
    "products": {
        "channels": ((8, 16), (24, 64), (64, 256), (264, 88), (1024, 256), (512, 2048)),
        "sizes": ((3, 17, 19), (128, 16, 16)),
    },
}
TakeSteps = Callable[..., Tensor]


class Wrong(SystemExit):
    """A code path gives a wrong result."""


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


# --- attacks and steps ---------------------------------------------------------------------------------------------


def attacked(problem: Problem, steps: TakeSteps, *, arch: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Attack a problem's batch on one of its subnets, on the problem's device."""
    view, recipe = SubnetView(problem.student, problem.archs[arch]), problem.recipe
    with torch.no_grad():
        target = problem.teacher.eval()(problem.images, problem.teacher.space.largest)
    images = problem.images.contiguous(memory_format=torch.channels_last)
    predict, generator = view.folded(view.running_statistics(), dtype=dtype), KeyedNoise(1)  # the same on all devices
    ball = {"eps": recipe.eps, "step_size": recipe.step_size, "num_steps": recipe.num_steps, "start": "gaussian"}
    return pgd(predict, KLToTarget(target), images, **ball, generator=generator, steps=steps)


def alike(first: Tensor, second: Tensor) -> float:
    """Share of pixels that agree to 1e-6."""
    return float(((first.cpu() - second.cpu()).abs() <= 1e-6).float().mean())


def attacks_agree(cpu: Problem, gpu: Problem) -> str:
    """The eager attack on both devices, on every arch: plain forms in float64, where rounding changes no sign."""
    shares = []
    with Float64Losses(), plain_twins("fused"):
        for arch in range(len(cpu.archs)):
            ends = (attacked(problem, take_steps, arch=arch, dtype=torch.float64) for problem in (cpu, gpu))
            shares.append(alike(*ends))
    if min(shares) < ITERATES:
        raise Wrong(f"the attack agrees with the CPU's on {min(shares):.2%} of pixels only, in float64")
    return f"attack against the CPU's in float64, {len(shares)} archs: {min(shares):.3%} of pixels alike"


def fused_attacks_agree(problem: Problem, steps: TakeSteps = take_steps) -> str:
    """One float32 attack step with fused kernels, taken by `steps`, and with their plain forms, on every arch."""
    one, shares = problem.with_steps(1), []
    for arch in range(len(problem.archs)):
        fused = attacked(one, steps, arch=arch)
        with plain_twins("fused"):
            shares.append(alike(fused, attacked(one, take_steps, arch=arch)))
    if min(shares) < ONE_STEP:
        raise Wrong(f"a step with fused kernels agrees with the plain one on {min(shares):.2%} of pixels only")
    return f"an attack step with fused kernels: {min(shares):.3%} of pixels alike"


def graphs_agree(problem: Problem, captured: Callable[..., CapturedSteps] = CapturedSteps, **how: object) -> str:
    """Captured and eager attacks, two subnets in turn, so that graphs are replayed with other weights than captured.

    `captured` makes the captured steps, `how` are its options.
    """
    problem, lowest = problem.with_steps(REPLAYED), 1.0
    changed = copy.deepcopy(problem.student)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.01)
    for dtype in (torch.float32, torch.bfloat16):
        steps = captured(take_steps, batch_size=len(problem.images), **how)
        for one in (problem, replace(problem, student=changed)):
            for arch in range(len(problem.archs)):
                ends = (attacked(one, loop, arch=arch, dtype=dtype) for loop in (steps, take_steps))
                share = alike(*ends)
                if share < ITERATES:
                    raise Wrong(f"captured attack in {dtype} agrees with the eager one on {share:.2%} of pixels only")
                lowest = min(lowest, share)
        if len(steps.graphs) != len(set(problem.archs)):
            raise Wrong(f"{len(steps.graphs)} graphs were captured for {len(set(problem.archs))} archs")
    return f"captured attack against the eager one: {lowest:.3%} of pixels alike"


def steps_agree(cpu: Problem, gpu: Problem) -> str:
    """One whole training step on both devices, on every arch and on all of them with one attack, in float64."""
    cosines = []
    with Float64Losses(), plain_twins("fused"):
        for archs, shared in (*(([arch], {}) for arch in cpu.archs), (cpu.archs, {"shared": "smallest"})):
            found = (weight_gradients(problem, archs, **shared) for problem in (cpu, gpu))
            cosines.append(float(F.cosine_similarity(*found, dim=0)))
    if not min(cosines) >= GRADIENTS:
        raise Wrong(f"a step's weight gradients have a cosine of {min(cosines):.5f} with the CPU's")
    archs = f"{len(cpu.archs)} archs, each alone and together"
    return f"weight gradients of a step against the CPU's in float64, {archs}: cosine {min(cosines):.6f}"


def weight_gradients(problem: Problem, archs: list[Arch], **shared: str) -> Tensor:
    """All weight gradients of one training step on some archs, on the CPU."""
    step, images = PackageStep(problem, shared=shared), problem.images.contiguous(memory_format=torch.channels_last)
    step.together(archs, images, problem.labels, KeyedNoise(1))
    return torch.cat([parameter.grad.flatten().cpu() for parameter in step.net.parameters()])


def replays_agree(problem: Problem, **how: object) -> str:
    """Steps of all archs together, replayed as CUDA graphs and eager: the weights move alike, in float32.

    `how` are options of the captures.
    """
    images = problem.images.contiguous(memory_format=torch.channels_last)
    before = _weights(PackageStep(problem))
    replayed, eager = PackageStep(problem, graphs=True, **how), PackageStep(problem)
    for step in (replayed, eager):
        for number in range(REPLAYED):
            step.together(problem.archs, images, problem.labels, KeyedNoise(number))
    recorded, archs = len(step_graphs(replayed)), len(set(problem.archs))
    if recorded != archs:
        raise Wrong(f"{recorded} graphs were recorded for {archs} archs")
    moves = [_weights(step) - before for step in (replayed, eager)]
    cosine = float(F.cosine_similarity(*moves, dim=0))
    if not cosine >= GRADIENTS:
        raise Wrong(f"replayed steps move the weights otherwise than eager ones: cosine {cosine:.5f}")
    return f"{REPLAYED} steps of {archs} archs, replayed and eager: cosine of the weights' moves {cosine:.6f}"


def step_graphs(step: PackageStep) -> Sequence[object]:
    """Keys of the graphs of a step's subnets."""
    graphs = step.step.recurring
    return [] if graphs is None else list(graphs.calls.graphs)


def _weights(step: PackageStep) -> Tensor:
    """All weights, on the CPU."""
    return torch.cat([parameter.detach().flatten().double().cpu() for parameter in step.net.parameters()])


def step_never_waits(
    problem: Problem,
    step: Callable[..., object] | None = None,
    set_mode: Callable[[str], None] = torch.cuda.set_sync_debug_mode,
) -> str:
    """One training step on a GPU, after one for warm-up, in which the host must not wait for the device.

    `set_mode` sets torch's reaction to a wait of the host.
    """
    step, images = step or PackageStep(problem), problem.images.contiguous(memory_format=torch.channels_last)
    for number, mode in enumerate(("default", "error")):
        generator = torch.Generator().manual_seed(number)
        set_mode(mode)
        try:
            step(problem.archs[0], images, problem.labels, generator)
        except RuntimeError as error:
            raise Wrong(f"the host waits for the device in a training step: {error}") from error
        finally:
            set_mode("default")
    return "a training step in which the host never waits for the device"


# --- kernels -------------------------------------------------------------------------------------------------------


def proof_rows(name: str, device: torch.device, kernels: dispatch.Fused | None = None, **shapes: Sequence) -> list[Row]:
    """Rows of a kernel's proof, one of `REAL`, printed as a table; the kernels are by default the device's own."""
    rows: list[Row] = []
    try:
        kernels = kernels or dispatch.all_fused(NoEpilogues())
        for case, difference, limit in prove.differences(prove.CHECKS[name](kernels, device, **(shapes or REAL[name]))):
            rows.append({"bench": "gpu_proofs", "row": name, "lever": case, "difference": difference})
            if not difference <= limit:
                raise Wrong(f"{case} differs from its reference by {difference:.2g}")
    except (RuntimeError, ImportError) as error:
        raise Wrong(f"the fused kernels do not run on {device}: {error}") from error
    finally:
        if rows:
            show(f"{name} against the reference", rows, {"difference": "largest difference:.3g"})
    return rows


def way_rows(device: torch.device) -> list[Row]:
    """Times of products and cuDNN's convolutions beside a convolution and a pass; whether they pay, and are used."""
    fused, library = dispatch.all_fused(NoEpilogues()), CudnnEpilogues()
    right = {"product": True, "cudnn": prove.works(library, device)}
    used = {"product": in_use("products"), "cudnn": prove.LIBRARY}
    rows: list[Row] = []
    for name, way in ways.times(fused, library, device).items():
        row: Row = {"bench": "gpu_ways", "row": name, "lever": "a convolution's elementwise work in its epilogue"}
        row |= {"own_ms": round(1e3 * way.own, 4), "usual_ms": round(1e3 * way.usual, 4)}
        row |= {"first_ms": round(1e3 * way.first, 2), "pays": way.pays and right[name], "used": used[name]}
        rows.append(row)
    columns = {"own_ms": "ms:.3g", "usual_ms": "convolution and pass, ms:.3g", "first_ms": "first call, ms:.3g"}
    columns |= {"pays": "pays:", "used": "used:"}
    show("ways to convolve", rows, columns)
    return rows
