"""One step that trains four subnets: an attack each, or one attack that all of them share.

The released step and the plain step (`plain_step.py`) train one subnet, so they are called once per subnet. The package
trains all four in one step: S2 attacks each of them in full; S3 attacks the smallest in full and lets every other one
take three steps from there, S4 one; S5 and S6 do the same in bfloat16.

Before anything is timed, S0 to S2 must agree in float64: the gradients of one step on four subnets are the mean of
theirs. A shared attack trains on other images, so S3 to S6 cannot agree: what they cost in robust accuracy is
measured by training (`config/experiments/shared_attack.yaml`), not here.

    python benchmarks/bench_shared.py --help
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import plain_step
import torch
from common import NOISY, computed_here, machine, require_positive, table, time_interleaved, write_rows
from plain_step import Recipe
from step_checks import TOLERANCE
from step_rows import PLAIN, RELEASED, PackageStep, Problem, Step, build, laid_out, make_problem, scaled_space
from torch import Tensor

import proard.nets.view
from proard.config import PRESETS

RESULTS = Path(__file__).parent / "results" / "bench_shared.json"
HALVED = ("S5", "S6")
LEVERS = computed_here(
    {
        "S0": "released step, once per subnet",
        "S1": "plain step, once per subnet",
        "S2": "one step, every subnet attacked in full",
        "S3": "one attack, on the smallest; three steps of their own for the others",
        "S4": "one step of their own for the others",
        "S5": "as S3, in bfloat16",
        "S6": "as S4, in bfloat16",
    },
    rounded=HALVED,
)
ONE_BY_ONE = {"S0": RELEASED, "S1": PLAIN}
OWN_STEPS = {"S3": 3, "S4": 1, "S5": 3, "S6": 1}  # after a shared attack


def package_step(row: str, problem: Problem) -> PackageStep:
    """The package's step of a row, on its own copies of student and teacher."""
    dtype = "bfloat16" if row in HALVED else "float32"
    shared = {"shared": "smallest", "own_steps": OWN_STEPS[row]} if row in OWN_STEPS else {}
    nets = (copy.deepcopy(problem.student), copy.deepcopy(problem.teacher))
    return PackageStep(*nets, problem.recipe, attack_dtype=dtype, dtype=dtype, shared=shared)


def timed_calls(problem: Problem) -> dict[str, Callable[[int], None]]:
    """Per row, a call that trains every arch on the batch once."""

    def step(row: str) -> Step:
        return build(ONE_BY_ONE[row], problem) if row in ONE_BY_ONE else package_step(row, problem)

    return {row: training_call(step(row), problem, together=row not in ONE_BY_ONE) for row in LEVERS}


def training_call(step: Step, problem: Problem, *, together: bool = True) -> Callable[[int], None]:
    """A call that trains every arch on the batch once: in one step `together`, or in one step each."""
    package = isinstance(step, PackageStep)
    images = problem.images.contiguous(memory_format=torch.channels_last if package else torch.contiguous_format)

    def run(number: int) -> None:
        generator = torch.Generator().manual_seed(number + 1)
        if together:
            step.together(problem.archs, images, problem.labels, generator)
            return
        for arch in problem.archs:
            step(arch, images, problem.labels, generator)

    return run


def equality(problem: Problem) -> dict[str, float]:
    """Largest difference of S1's and S2's gradients from S0's, over each tensor's largest entry, in float64.

    Running statistics are held still, because the rows move them differently often before the next subnet's attack.
    """
    found: dict[str, dict[str, Tensor]] = {}
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(Tensor, "float", Tensor.double))  # losses are in float32 at least
        for module in (plain_step, proard.nets.view):
            patches.enter_context(mock.patch.object(module, "BN_MOMENTUM", 0.0))
        for row, name in ONE_BY_ONE.items():
            generator, sums = torch.Generator().manual_seed(1), {}
            for arch in problem.archs:
                step = build(name, problem)  # from the same weights each time
                step(arch, laid_out(problem.images, name), problem.labels, generator)
                for key, parameter in step.net.named_parameters():
                    sums[key] = sums.get(key, 0) + parameter.grad / len(problem.archs)
            found[row] = sums
        step = package_step("S2", problem)
        images = laid_out(problem.images, "S2")
        step.together(problem.archs, images, problem.labels, torch.Generator().manual_seed(1))
        found["S2"] = {name: parameter.grad for name, parameter in step.net.named_parameters()}
    reference = found.pop("S0")
    floor = 1e-4 * max(float(gradient.abs().max()) for gradient in reference.values())
    return {
        row: max(
            float((gradients[name] - gradient).abs().max()) / max(float(gradient.abs().max()), floor)
            for name, gradient in reference.items()
        )
        for row, gradients in found.items()
    }


def require_equal(differences: dict[str, float]) -> float:
    """Return the largest difference, or stop.

    Raises
    ------
    SystemExit
        It exceeds the tolerance: the text names the rows.
    """
    wrong = [f"{row}: {value:.2g}" for row, value in differences.items() if not value <= TOLERANCE]
    if wrong:
        raise SystemExit(f"gradients differ from S0's by more than {TOLERANCE:g}, nothing is timed: {', '.join(wrong)}")
    return max(differences.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Check, time, print, and write one JSON line per row where asked."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    space = scaled_space(args.space, 1.0)
    common = {"num_archs": args.archs, "seed": args.seed}
    few = Recipe(num_steps=min(args.steps, 3))
    difference = require_equal(
        equality(make_problem(space, recipe=few, batch_size=min(args.batch, 8), dtype=torch.float64, **common))
    )
    print(f"S0 to S2 agree in float64: largest relative difference {difference:.1e}", flush=True)
    recipe = Recipe(num_steps=args.steps)
    problem = make_problem(space, recipe=recipe, batch_size=args.batch, dtype=torch.float32, **common)
    facts = machine()
    timings, spread = time_interleaved(timed_calls(problem), rounds=args.rounds, label="steps", plain="S1")
    archs = [{"arch_id": arch.arch_id, "macs": space.spec(arch).macs} for arch in problem.archs]
    run: dict[str, Any] = {
        "space": args.space,
        "archs": archs,
        "batch": args.batch,
        "rounds": args.rounds,
        **asdict(recipe),
        "seed": args.seed,
        "baseline_spread": round(spread, 4),
        "noisy": spread > NOISY,
        "largest_difference": difference,
        "machine": facts,
    }
    rows = [
        {
            "bench": "shared",
            "row": row,
            "lever": LEVERS[row],
            "baseline": "released step",
            "ratio_total": round(timing.ratio_total, 4),
            "ratio_plain": round(timing.ratio_plain, 4),
            "ratio_previous": round(timing.ratio_previous, 4),
            "ms_per_step": round(1e3 * timing.seconds, 3),
            "cpu_ms_per_step": round(1e3 * timing.cpu_seconds, 3),
        }
        for row, timing in timings.items()
    ]
    if args.json:
        write_rows(args.json, [row | run for row in rows])
    cells = [
        (
            row["row"],
            *(f"{row[key]:.2f}" for key in ("ratio_total", "ratio_plain", "ratio_previous")),
            f"{row['ms_per_step']:.0f}",
            row["lever"],
        )
        for row in rows
    ]
    macs = ", ".join(f"{arch['macs'] / 1e6:.1f} M" for arch in archs)
    print(table(("row", "/released", "/plain", "/previous", "ms/step", "lever"), cells))
    print(
        f"\n{args.space}, subnets of {macs} MACs, batch {args.batch}, PGD-{args.steps}, medians of {args.rounds} rounds"
    )
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    noisy = " - NOISY, do not quote these ratios" if spread > NOISY else ""
    print(f"baseline timed twice: spread {spread:.1%}{noisy}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", choices=sorted(PRESETS), default="resnet_micro")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count; medians are over them")
    parser.add_argument("--steps", type=int, default=10, help="PGD steps of a full attack")
    parser.add_argument("--archs", type=int, default=4, help="sampled subnets of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of archs, weights, images and noise")
    parser.add_argument("--json", nargs="?", const=str(RESULTS), metavar="FILE", help=f"default {RESULTS.name}")
    parser.add_argument("--quick", action="store_true", help="batch 8, PGD-2, 2 rounds: shows that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.steps, args.rounds = 8, 2, 2
    require_positive(parser, args, "batch", "rounds", "steps", "archs", "threads")
    return args


if __name__ == "__main__":
    main()
