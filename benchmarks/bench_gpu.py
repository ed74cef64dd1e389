"""The training step on a GPU: equality first, then ceilings, then the ladder. Under 10 minutes on one GPU.

Without a GPU it says so in one line and does nothing. `--device cpu` goes through the same code on a CPU, where fused
kernels and CUDA graphs are no subject: what was not run is listed at the end.

    python benchmarks/bench_gpu.py --help
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_checks as checks
import torch
import torch.nn.functional as F
from common import NOISY, Timing, machine, require_positive, table, time_interleaved, write_rows
from plain_step import Levers, PlainStep, Recipe
from step_rows import PackageStep, Problem, make_problem, scaled_space

from proard.attacks import take_steps
from proard.config import PRESETS
from proard.kernels import CapturedSteps, dispatch

RESULTS = Path(__file__).parent / "results" / "bench_gpu.json"
NO_GPU = "bench_gpu: torch sees no GPU here; nothing was run, checked or measured."
ROWS = {
    "G0": "released step, float32, NCHW, eager",
    "G1": "plain step: redundant forwards dropped",
    "G2": "the package's step, float32, no fused kernel",
    "G3": "fused kernels",
    "G4": "bfloat16 attack",
    "G5": "bfloat16 training passes",
    "G6": "attack steps in CUDA graphs, archs met before",
    "G7": "the same, every arch met for the first time",
}
GPU_ONLY = ("G3", "G6", "G7")


def build(row: str, problem: Problem) -> Callable[[int], None]:
    """Make a call that takes one step on each arch and waits for the device."""
    nets = checks.placed(problem, problem.images.device)
    number, images = int(row[1:]), problem.images
    if number < 2:
        step = PlainStep(nets.student, nets.teacher, problem.recipe, Levers(few_forwards=number > 0))
    else:
        attack_dtype, dtype = ("bfloat16" if number >= first else "float32" for first in (4, 5))
        step = PackageStep(nets.student, nets.teacher, problem.recipe, attack_dtype=attack_dtype, dtype=dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        if number >= 6:
            step.trainer.take_steps = CapturedSteps(take_steps, batch_size=len(images))

    def run(round_number: int) -> None:
        if row == "G7":
            step.trainer.take_steps = CapturedSteps(take_steps, batch_size=len(images))
        for index, arch in enumerate(problem.archs):
            generator = torch.Generator().manual_seed((round_number + 1) * len(problem.archs) + index)
            step(arch, images, problem.labels, generator)
        if images.is_cuda:
            torch.cuda.synchronize()

    def without_kernels(round_number: int) -> None:
        with mock.patch.object(dispatch, "fused_for", return_value=None):
            run(round_number)

    return without_kernels if number < 3 else run


def seconds_of(call: Callable[[], object], device: torch.device, *, repeats: int = 10) -> float:
    """Median seconds of a call, the device waited for."""
    clocks = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        clocks.append(time.perf_counter() - started)
    return statistics.median(clocks[2:])


def ceilings(device: torch.device, *, size: int, batch: int) -> dict[str, float]:
    """What the device can do: matrix product, convolution (TFLOP/s) and copy (TB/s, read and write)."""
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[f"matmul_{name}_tflops"] = 2 * size**3 / seconds_of(lambda a=a, b=b: a @ b, device) / 1e12
        x = torch.randn(batch, 128, 16, 16, device=device).to(dtype, memory_format=torch.channels_last)
        weight = torch.randn(128, 128, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
        flops = 2 * batch * 128 * 128 * 9 * 16 * 16
        time_ = seconds_of(lambda x=x, weight=weight: F.conv2d(x, weight, None, 1, 1), device)
        found[f"convolution_{name}_tflops"] = flops / time_ / 1e12
    source = torch.empty(size * size, device=device)
    target = torch.empty_like(source)
    found["copy_tb_per_s"] = 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device) / 1e12
    return found


def kernel_rows(device: torch.device, *, batch: int) -> dict[str, tuple[float, float]]:
    """Microseconds of both twins of both kernels, alone, launched one after the other."""
    fused, plain = dispatch.fused_for(device), checks.plain
    adv = torch.rand(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    gradient, low, high = torch.randn_like(adv), (adv - 0.03).clamp(min=0), (adv + 0.03).clamp(max=1)
    logits = torch.randn(batch, 10, device=device)
    target = logits.flip(1).softmax(1)

    def microseconds(call: Callable[[], object]) -> float:
        return 1e6 * seconds_of(lambda: [call() for _ in range(100)], device) / 100

    twins = (plain, fused)
    return {
        "pgd_update_": tuple(
            microseconds(partial(k.pgd_update_, adv, gradient, low, high, step_size=0.01)) for k in twins
        ),
        "softmax_difference": tuple(microseconds(partial(k.softmax_difference, logits, target)) for k in twins),
    }


def check(small: Problem, device: torch.device) -> list[str]:
    """Go through the equality gates that a device can pass; `small` is a float32 problem on the CPU."""
    gpu, placed = device.type == "cuda", checks.placed(small, device)
    exact = [checks.placed(small, where, torch.float64) for where in (torch.device("cpu"), device)]
    with checks.full_float32():
        found = [checks.kernels_agree(device), checks.fused_attacks_agree(placed)] if gpu else []
        found.append(checks.attacks_agree(*exact))
        found.append(checks.graphs_agree(placed, capture=None if gpu else lambda body: body))
        found.append(checks.steps_agree(*exact))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure ceilings and kernels, time the ladder, say what was not run."""
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU)
        return
    device, gpu = torch.device(args.device), args.device == "cuda"
    started = time.monotonic()
    try:
        space = scaled_space(args.space, args.width_scale)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    common = {"num_archs": args.archs, "seed": args.seed, "dtype": torch.float32}
    small = make_problem(space, recipe=Recipe(num_steps=3), batch_size=min(args.batch, 8), **common)
    problem = checks.placed(
        make_problem(space, recipe=Recipe(num_steps=args.steps), batch_size=args.batch, **common), device
    )
    for line in check(small, device):
        print(f"equal: {line}", flush=True)
    not_run = [] if gpu else [f"{row} ({ROWS[row]})" for row in GPU_ONLY] + ["fused kernels against their twins"]
    limits = ceilings(device, size=8192 if gpu else 256, batch=args.batch)
    print("ceilings: " + ", ".join(f"{name} {value:.3g}" for name, value in limits.items()), flush=True)
    kernels = kernel_rows(device, batch=args.batch) if gpu else {}
    for name, (plain, fused) in kernels.items():
        print(f"kernel {name}: plain {plain:.1f} us, fused {fused:.1f} us, {plain / fused:.2f} times", flush=True)
    rows = [row for row in ROWS if gpu or row not in GPU_ONLY]
    calls = {row: build(row, problem) for row in rows}
    rounds = affordable(calls, args, spent=time.monotonic() - started)
    if rounds < 1:
        not_run.append(f"the ladder: one round would end after the {args.minutes:g} minutes allowed")
        timings, spread = {}, 0.0
    else:
        timings, spread = time_interleaved(calls, rounds=rounds, label="steps")
    if 0 < rounds < args.rounds:
        not_run.append(f"{args.rounds - rounds} of {args.rounds} rounds, to end within {args.minutes:g} minutes")
    run = {
        **{name: getattr(args, name) for name in ("space", "width_scale", "batch", "steps", "seed", "device")},
        "archs": [{"arch_id": arch.arch_id, "macs": space.spec(arch).macs} for arch in problem.archs],
        "rounds": rounds,
        "ceilings": limits,
        "kernels_us": {name: {"plain": pair[0], "fused": pair[1]} for name, pair in kernels.items()},
        "baseline_spread": round(spread, 4),
        "noisy": spread > NOISY,
        "not_run": not_run,
        "machine": {**machine(), "gpu": torch.cuda.get_device_name() if gpu else None},
    }
    print(report(timings, args, run))
    if args.json:
        write_rows(args.json, [json_row(row, timing, args) | run for row, timing in timings.items()])


def affordable(calls: dict[str, Callable[[int], None]], args: argparse.Namespace, *, spent: float) -> int:
    """Rounds that fit into the minutes allowed, after one round that warms up and is timed."""
    started = time.monotonic()
    for call in calls.values():
        call(-1)
    one = time.monotonic() - started
    left = 60 * args.minutes - spent - one
    return min(args.rounds, int(left / one) - 2)  # `time_interleaved` warms up once more and repeats the baseline


def report(timings: dict[str, Timing], args: argparse.Namespace, run: dict[str, Any]) -> str:
    """Compose the table, what it was measured on, and what was not run."""
    cells = []
    for row, timing in timings.items():
        seconds = timing.seconds / args.archs
        ratios = (f"{timing.ratio_total:.2f}", f"{timing.ratio_previous:.2f}")
        cells.append((row, *ratios, f"{1e3 * seconds:.1f}", f"{args.batch / seconds:.0f}", ROWS[row]))
    lines = [
        table(("row", "total", "over previous", "ms/step", "images/s", "lever"), cells),
        f"{args.space} at width scale {args.width_scale:g}, subnets of "
        + ", ".join(f"{arch['macs'] / 1e6:.1f} M" for arch in run["archs"])
        + f" MACs, batch {args.batch}, PGD-{args.steps}, medians of {run['rounds']} rounds",
        ", ".join(f"{key} {value}" for key, value in run["machine"].items()),
        f"baseline timed twice: spread {run['baseline_spread']:.1%}"
        + (" - NOISY, do not quote these ratios" if run["noisy"] else ""),
        *(f"not run: {what}" for what in run["not_run"]),
    ]
    return "\n".join(lines)


def json_row(row: str, timing: Timing, args: argparse.Namespace) -> dict[str, Any]:
    """Collect what is particular to a row."""
    seconds = timing.seconds / args.archs
    return {
        "bench": "gpu",
        "row": row,
        "lever": ROWS[row],
        "ratio_total": round(timing.ratio_total, 4),
        "ratio_previous": round(timing.ratio_previous, 4),
        "ms_per_step": round(1e3 * seconds, 3),
        "images_per_second": round(args.batch / seconds, 2),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--space", choices=sorted(PRESETS), default="resnet_cifar")
    parser.add_argument("--width-scale", type=float, default=1.0, help="times all channels")
    parser.add_argument("--batch", type=int, default=256, help="images per step")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, fewer where time is short")
    parser.add_argument("--steps", type=int, default=10, help="PGD steps of the attack")
    parser.add_argument("--archs", type=int, default=2, help="sampled subnets; times are means over them")
    parser.add_argument("--minutes", type=float, default=8.0, help="what all of it may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", nargs="?", const=str(RESULTS), metavar="FILE", help=f"default {RESULTS.name}")
    parser.add_argument("--quick", action="store_true", help="digits space, batch 8, PGD-2, 1 arch, 1 round")
    args = parser.parse_args(argv)
    if args.quick:
        args.space, args.batch, args.steps, args.archs, args.rounds = "resnet_digits", 8, 2, 1, 1
    require_positive(parser, args, "batch", "rounds", "steps", "archs")
    return args


if __name__ == "__main__":
    main()
