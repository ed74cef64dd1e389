"""One training step: the released code's, lever by lever, up to this package's, in one run per search space.

There are two baselines. Row V0 is the released ProARD step rewritten from its description (`plain_step.py`), V1 a fair
textbook step. V2 to V6 add levers to it, V7 and V8 are `proard.training`'s own step with a loop and with the fused
optimizer, V9 and V10 use bfloat16. Before anything is timed, V0 to V8 must agree in float64; for V9 and V10, which
cannot, the agreement of gradients is printed. `--official PATH` times the official classes of a checkout as well.

    python benchmarks/bench_step.py --help
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import NOISY, Timing, machine, require_positive, table, time_interleaved, write_rows
from official_step import OfficialStep, load_official
from plain_step import Recipe
from step_checks import equality, reduced_precision, require_equal
from step_rows import DEFAULT_SCALES, LEVERS, OFFICIAL, PLAIN, Problem, build, laid_out, make_problem, scaled_space

from proard.config import PRESETS

RESULTS = Path(__file__).parent / "results" / "bench_step.json"


def timed_calls(problem: Problem, official: OfficialStep | None = None) -> dict[str, Callable[[int], None]]:
    """Per row, a call that makes one step on each arch; the official classes stand right after the first baseline."""

    def call(row: str) -> Callable[[int], None]:
        step = build(row, problem) if official is None or row != OFFICIAL else official
        images = laid_out(problem.images, row)

        def run(number: int) -> None:
            for index, arch in enumerate(problem.archs):
                generator = torch.Generator().manual_seed((number + 1) * len(problem.archs) + index)
                step(arch, images, problem.labels, generator)

        return run

    baseline, *others = LEVERS
    return {row: call(row) for row in (baseline, *([OFFICIAL] if official else []), *others)}


def main(argv: Sequence[str] | None = None) -> None:
    """Check, time, print, and write one JSON line per row where asked."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.space:
        rows += ladder(name, args)
    if args.json:
        write_rows(args.json, rows)


def ladder(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Check, time and print the ladder of one space; return its rows."""
    scale = args.width_scale or DEFAULT_SCALES.get(name, 1.0)
    try:
        space = scaled_space(name, scale)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    recipe = Recipe(num_steps=args.steps)
    official = load_official(args.official, name) if args.official else None
    common = {"num_archs": args.archs, "seed": args.seed}
    small = make_problem(
        space, recipe=Recipe(num_steps=min(args.steps, 3)), batch_size=min(args.batch, 8), dtype=torch.float64, **common
    )
    largest_difference = require_equal(equality(small))
    print(f"{name}: V0 to V8 agree in float64, largest relative difference {largest_difference:.1e}", flush=True)
    problem = make_problem(space, recipe=recipe, batch_size=args.batch, dtype=torch.float32, **common)
    agreement = reduced_precision(problem)
    facts = machine()
    step = OfficialStep(official, problem, scale) if official else None
    timings, spread = time_interleaved(timed_calls(problem, step), rounds=args.rounds, label="steps", plain=PLAIN)
    macs = [space.spec(arch).macs for arch in problem.archs]
    run = {
        "space": name,
        "width_scale": scale,
        "archs": [{"arch_id": arch.arch_id, "macs": cost} for arch, cost in zip(problem.archs, macs, strict=True)],
        "batch": args.batch,
        "rounds": args.rounds,
        **asdict(recipe),
        "seed": args.seed,
        "baseline_spread": round(spread, 4),
        "noisy": spread > NOISY,
        "largest_difference": largest_difference,
        "machine": facts,
    }
    print(_report(timings, args, run, agreement), flush=True)
    return [_json_row(row, timing, args, agreement.get(row)) | run for row, timing in timings.items()]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    both = ["resnet_cifar", "mobilenet_micro"]
    parser.add_argument("--space", choices=sorted(PRESETS), nargs="+", default=both, help="one ladder each")
    parser.add_argument("--width-scale", type=float, help="times all channels; 0.125 for resnet_cifar, else 1")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count; medians are over them")
    parser.add_argument("--steps", type=int, default=10, help="PGD steps of the attack")
    parser.add_argument("--archs", type=int, default=2, help="sampled subnets; times are means over them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of archs, weights, images and noise")
    parser.add_argument("--official", metavar="PATH", help="checkout of the official repository, timed as one more row")
    parser.add_argument("--json", nargs="?", const=str(RESULTS), metavar="FILE", help=f"default {RESULTS.name}")
    parser.add_argument("--quick", action="store_true", help="batch 8, PGD-2, 1 arch, 2 rounds: shows that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.steps, args.archs, args.rounds = 8, 2, 1, 2
    if args.official and args.space == both:
        args.space = both[:1]  # the only one with an official counterpart
    require_positive(parser, args, "batch", "rounds", "steps", "archs", "threads")
    return args


def _report(
    timings: dict[str, Timing], args: argparse.Namespace, run: dict[str, Any], agreement: dict[str, dict[str, float]]
) -> str:
    """Compose the table, what it was measured on, and what bfloat16 changes."""
    cells = []
    for row, timing in timings.items():
        seconds = timing.seconds / args.archs
        ratios = (f"{timing.ratio_total:.2f}", f"{timing.ratio_plain:.2f}", f"{timing.ratio_previous:.2f}")
        cells.append((row, *ratios, f"{1e3 * seconds:.0f}", f"{args.batch / seconds:.0f}", lever_of(row)))
    macs = ", ".join(f"{arch['macs'] / 1e6:.1f} M" for arch in run["archs"])
    lines = [
        table(("row", "/released", "/plain", "/previous", "ms/step", "images/s", "lever"), cells),
        "",
        f"{run['space']} at width scale {run['width_scale']:g}, "
        f"subnets of {macs} MACs, "
        f"batch {args.batch}, PGD-{args.steps}, medians of {args.rounds} rounds",
        ", ".join(f"{key} {value}" for key, value in run["machine"].items()),
        f"baseline timed twice: spread {run['baseline_spread']:.1%}"
        + (" - NOISY, do not quote these ratios" if run["noisy"] else ""),
    ]
    for row, values in agreement.items():
        signs, cosine = values["input_gradient_signs"], values["parameter_gradients"]
        lines.append(
            f"{row} beside V8: {signs:.1%} equal signs of input gradients, cosine of weight gradients {cosine:.4f}"
        )
    return "\n".join(lines)


def lever_of(row: str) -> str:
    """What a row adds."""
    return LEVERS.get(row, "the official classes on archs of the same choices")


def _json_row(row: str, timing: Timing, args: argparse.Namespace, agreement: dict[str, float] | None) -> dict[str, Any]:
    """Collect what is particular to a row."""
    seconds = timing.seconds / args.archs
    return {
        "bench": "step",
        "row": row,
        "lever": lever_of(row),
        "baseline": "released step",
        "ratio_total": round(timing.ratio_total, 4),
        "ratio_plain": round(timing.ratio_plain, 4),
        "ratio_previous": round(timing.ratio_previous, 4),
        "ms_per_step": round(1e3 * seconds, 3),
        "cpu_ms_per_step": round(1e3 * timing.cpu_seconds / args.archs, 3),
        "images_per_second": round(args.batch / seconds, 2),
        "agreement": agreement,
    }


if __name__ == "__main__":
    main()
