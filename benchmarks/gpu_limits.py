"""What a GPU can do at most, what the fused kernels are worth alone, and how near the attack comes to the ceiling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import bench_attack
import torch
from gpu_run import Budget, Row, printed, rows_of, seconds_of, time_within
from step_rows import Problem

from proard.attacks import take_steps
from proard.kernels import CapturedSteps, dispatch, plain

DTYPES = bench_attack.DTYPES
GPU_SHAPES = ((64, 64, 32, 3), (128, 128, 16, 3), (256, 256, 16, 3), (512, 512, 8, 3), (512, 512, 16, 1))
ATTACKS = {
    "plain": "textbook PGD: sliced per forward, NCHW, unfolded, autograd",
    "float32": "folded view, float32 as torch sets TF32",
    "bfloat16": "folded view, bfloat16",
    "float32 graph": "float32, steps in a CUDA graph",
    "bfloat16 graph": "bfloat16, steps in a CUDA graph",
}


def ceilings(budget: Budget, device: torch.device, *, size: int, batch: int) -> dict[str, float]:
    """Rates of matrix product and convolution (TFLOP/s) by type, and of a copy (TB/s, read and write).

    float32 is as torch sets TF32: by default in convolutions alone.
    """
    budget.require()
    gpu, found = device.type == "cuda", {}
    shapes = GPU_SHAPES if gpu else bench_attack.CEILING_SHAPES[:2]
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[f"matmul_{name}_tflops"] = 2 * size**3 / seconds_of(lambda a=a, b=b: a @ b, device) / 1e12
        best = bench_attack.ceiling(dtype, seconds=0.2 if gpu else 0.0, device=device, batch=batch, shapes=shapes)
        found[f"convolution_{name}_tflops"] = best / 1e12
    source = torch.empty(size * size, device=device)
    target = torch.empty_like(source)
    found["copy_tb_per_s"] = 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device) / 1e12
    return found


def ceiling_rows(limits: dict[str, float]) -> list[Row]:
    """Rows of the ceilings."""
    units = {"tflops": "TFLOP/s", "s": "TB/s"}
    rows = [
        {"bench": "gpu_ceilings", "row": name, "rate": round(value, 5), "lever": units[name.split("_")[-1]]}
        for name, value in limits.items()
    ]
    printed("ceilings", rows, {"rate": "rate"})
    return rows


def kernel_rows(budget: Budget, device: torch.device, *, batch: int) -> list[Row]:
    """Both twins of every kernel alone, launched one after the other; plain ones only where no fused one runs."""
    budget.require()
    fused = dispatch.fused_for(device)
    adv = torch.rand(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    gradient, low, high = torch.randn_like(adv), (adv - 0.03).clamp(min=0), (adv + 0.03).clamp(max=1)
    logits = torch.randn(batch, 10, device=device)
    target = logits.flip(1).softmax(1)

    def microseconds(call: Callable[[], object]) -> float:
        return 1e4 * seconds_of(lambda: [call() for _ in range(100)], device)

    calls: dict[str, Callable[[Any], object]] = {
        "pgd_update_": lambda twin: twin.pgd_update_(adv, gradient, low, high, step_size=0.01),
        "softmax_difference": lambda twin: twin.softmax_difference(logits, target),
    }
    rows = []
    for name, call in calls.items():
        row: Row = {"bench": "gpu_kernels", "row": name, "baseline": "plain twin", "lever": f"batch {batch}"}
        for key, twin in (("plain_us", plain), ("fused_us", fused)):
            if twin is not None:
                row[key] = microseconds(partial(call, twin))
        if fused is not None:
            row["ratio_total"] = round(row["plain_us"] / row["fused_us"], 4)
        rows.append(row)
    printed("kernels alone", rows, {"ratio_total": "/plain", "plain_us": "plain us", "fused_us": "fused us"})
    return rows


def attack_rows(problem: Problem, limits: dict[str, float], budget: Budget, *, rounds: int) -> list[Row]:
    """Input gradients per second on the problem's first arch, and their share of the convolution ceiling."""
    device, batch = problem.images.device, len(problem.images)
    calls = bench_attack.timed_calls(problem, batch)
    if device.type == "cuda":
        captured = bench_attack.timed_calls(problem, batch, CapturedSteps(take_steps, batch_size=batch))
        calls |= {f"{name} graph": captured[name] for name in DTYPES}
    label = f"attacks on {problem.student.space.settings.name}"
    timed = time_within(calls, budget, rounds=rounds, device=device, label=label, plain="plain")
    rows = rows_of("gpu_attack", timed, ATTACKS, baseline="plain PGD", second="ratio_plain")
    macs = problem.student.space.spec(problem.archs[0]).macs
    for row in rows:
        rate = batch * problem.recipe.num_steps / timed.timings[row["row"]].seconds
        dtype = "bfloat16" if row["row"].startswith("bfloat16") else "float32"
        share = bench_attack.share_of_ceiling(macs, rate, 1e12 * limits[f"convolution_{dtype}_tflops"])
        row.pop("seconds")
        row |= {"gradients_per_second": round(rate, 2), "ceiling_share": round(share, 4), "macs": macs}
    title = f"{label}, {macs / 1e6:.1f} M MACs, batch {batch}, PGD-{problem.recipe.num_steps}"
    columns = {"ratio_total": "/plain", "gradients_per_second": "gradients/s", "ceiling_share": "of ceiling"}
    printed(title, rows, columns)
    return rows
