"""The training step on a device, lever by lever: one subnet a step, and several subnets a step."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import bench_shared
import gpu_checks as checks
from gpu_run import Budget, Call, Row, printed, rows_of, time_within
from plain_step import Levers, PlainStep
from step_rows import PackageStep, Problem

from proard.attacks import take_steps
from proard.kernels import CapturedSteps, dispatch

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
GRAPHS = "S7"
SHARED = {**bench_shared.LEVERS, GRAPHS: "as S5, attack steps in CUDA graphs"}


def build(row: str, problem: Problem) -> Call:
    """Make a call that takes one step on each arch."""
    nets = checks.placed(problem, problem.images.device)
    number = int(row[1:])
    if number < 2:
        step = PlainStep(nets.student, nets.teacher, problem.recipe, Levers(few_forwards=number > 0))
    else:
        attack_dtype, dtype = ("bfloat16" if number >= first else "float32" for first in (4, 5))
        step = PackageStep(nets.student, nets.teacher, problem.recipe, attack_dtype=attack_dtype, dtype=dtype)
        if number >= 6:
            step.step.attacker.take_steps = captured(problem)
    train = bench_shared.training_call(step, problem, together=False)

    def run(round_number: int) -> None:
        if row == "G7":
            step.step.attacker.take_steps = captured(problem)
        train(round_number)

    def without_kernels(round_number: int) -> None:
        with mock.patch.object(dispatch, "fused_for", return_value=None):
            run(round_number)

    return without_kernels if number < 3 else run


def captured(problem: Problem) -> CapturedSteps:
    """Attack steps in graphs of their own."""
    return CapturedSteps(take_steps, batch_size=len(problem.images))


def step_rows(problem: Problem, budget: Budget, *, rounds: int) -> list[Row]:
    """Time one step on each arch; times are means over the archs."""
    gpu = problem.images.is_cuda
    calls = {row: build(row, problem) for row in ROWS if gpu or row not in GPU_ONLY}
    what = ("gpu", "one subnet a step")
    return _timed(what, calls, ROWS, problem, budget, rounds=rounds, steps=len(problem.archs), second="G1")


def shared_rows(problem: Problem, budget: Budget, *, rounds: int) -> list[Row]:
    """Time one step that trains all archs of the problem, an attack each or one for all."""
    calls = bench_shared.timed_calls(problem)
    if problem.images.is_cuda:
        step = bench_shared.package_step("S5", problem)
        step.step.attacker.take_steps = captured(problem)
        calls[GRAPHS] = bench_shared.training_call(step, problem)
    what = ("gpu_shared", f"{len(problem.archs)} subnets a step")
    return _timed(what, calls, SHARED, problem, budget, rounds=rounds, steps=1, second="S1")


def _timed(
    what: tuple[str, str],
    calls: dict[str, Call],
    levers: dict[str, str],
    problem: Problem,
    budget: Budget,
    *,
    rounds: int,
    steps: int,
    second: str,
) -> list[Row]:
    """Time calls that take so many steps each, print and return their rows; `what` is their name and their title."""
    space, images = problem.student.space, problem.images
    label = f"steps on {space.settings.name}"
    timed = time_within(calls, budget, rounds=rounds, device=images.device, label=label, plain=second)
    timed = replace(
        timed, timings={row: replace(timing, seconds=timing.seconds / steps) for row, timing in timed.timings.items()}
    )
    rows = rows_of(what[0], timed, levers, baseline="released step", second="ratio_plain")
    archs = [{"arch_id": arch.arch_id, "macs": space.spec(arch).macs} for arch in problem.archs]
    for row in rows:
        seconds = row.pop("seconds")
        row |= {"ms_per_step": round(1e3 * seconds, 3), "images_per_second": round(len(images) / seconds, 2)}
        row["archs"] = archs
    macs = ", ".join(f"{arch['macs'] / 1e6:.1f} M" for arch in archs)
    title = f"{label}, {what[1]}: {macs} MACs, batch {len(images)}, PGD-{problem.recipe.num_steps}"
    columns = {"ratio_total": "/released", "ratio_plain": "/plain", "ratio_previous": "/previous"}
    printed(title, rows, {**columns, "ms_per_step": "ms/step", "images_per_second": "images/s"})
    return rows
