"""The whole table for a GPU: equality first, then ceilings, steps, labels, data, kernels. Under 10 minutes on one GPU.

Without a GPU it says so in one line and does nothing. `--device cpu` goes through the same code on a CPU, where fused
kernels and CUDA graphs are no subject. What was not run is listed at the end; what was measured is written at once.

    python benchmarks/bench_gpu.py --help
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import gpu_checks as checks
import gpu_labels as labels
import gpu_ladder as ladder
import gpu_limits as limits
import torch
from common import machine, require_positive, write_rows
from gpu_run import Budget, Row, TimeIsShort
from plain_step import Recipe
from step_rows import Problem, make_problem, scaled_space

from proard.config import PRESETS

RESULTS = Path(__file__).parent / "results" / "bench_gpu.json"
NO_GPU = "bench_gpu: torch sees no GPU here; nothing was run, checked or measured."
SMALL, SETTLING = 8, 16  # images of the equality gates, and from which the networks' statistics are made
NARROW = {"resnet_cifar": 0.125, "mobilenet_v3_cifar": 0.125}  # compared with a CPU, slow in float64, at this width
ON_GPU_ONLY = [f"{row} ({ladder.ROWS[row]})" for row in ladder.GPU_ONLY] + [
    f"{ladder.GRAPHS} ({ladder.SHARED[ladder.GRAPHS]})",
    "attacks in CUDA graphs",
    "fused kernels against their twins",
    "a step in which the host never waits",
]


@dataclass(frozen=True)
class Section:
    """A part that may be left out where time is short; `weight` is its share of the time that is left."""

    name: str
    weight: float
    measure: Callable[[Budget], list[Row]]
    space: str | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure section by section, say what was not run."""
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU)
        return
    end, device = time.monotonic() + 60 * args.minutes, torch.device(args.device)
    gpu = device.type == "cuda"
    facts = {name: getattr(args, name) for name in ("width_scale", "batch", "steps", "seed", "device")}
    facts["machine"] = {**machine(), "gpu": torch.cuda.get_device_name() if gpu else None}
    problems = {name: problem_of(name, args, args.width_scale) for name in args.space}
    for name, problem in problems.items():
        narrow = problem_of(name, args, min(args.width_scale, NARROW.get(name, 1.0)))
        for line in check(problem, narrow, device, archs=args.archs):
            print(f"equal: {line} ({name})", flush=True)
    placed = {name: on_device(problem, device, args) for name, problem in problems.items()}
    not_run, rows = [] if gpu else list(ON_GPU_ONLY), []
    failed = False
    for name, problem in placed.items() if gpu else ():
        try:
            print(f"{checks.step_never_waits(_few(problem, args.archs))} ({name})", flush=True)
        except checks.Wrong as error:  # slow, not wrong: what follows is still worth knowing
            print(f"WRONG: {error} ({name})", flush=True)
            failed = True
    waiting = sections(placed, device, args)
    while waiting:
        section, left = waiting[0], end - time.monotonic()
        share = section.weight / sum(each.weight for each in waiting)
        waiting = waiting[1:]
        try:
            found = section.measure(Budget(time.monotonic() + share * left))
        except TimeIsShort:
            not_run.append(f"{section.name}: it would end after the {args.minutes:g} minutes allowed")
            continue
        except RuntimeError as error:  # out of memory, say: what follows may still fit
            traceback.print_exc()
            not_run.append(f"{section.name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            failed = True
            continue
        rows += [row | {"space": section.space} | facts if section.space else row | facts for row in found]
        short = next((args.rounds - row["rounds"] for row in found if "rounds" in row), 0)
        not_run += [f"{section.name}: {short} of {args.rounds} rounds"] if short > 0 else []
        if args.json:
            write_rows(args.json, rows)
    print("\n" + ", ".join(f"{key} {value}" for key, value in facts["machine"].items()))
    for what in not_run:
        print(f"not run: {what}")
    if args.json:
        write_rows(args.json, [*rows, {"bench": "gpu_left_out", "not_run": not_run, **facts}])
    if failed:
        raise SystemExit("a section failed, or the host waits in a step; all rows that were printed are valid")


def problem_of(name: str, args: argparse.Namespace, width_scale: float) -> Problem:
    """Archs and networks of a space at a width, on the CPU.

    Raises
    ------
    SystemExit
        The width scale does not suit the space.
    """
    try:
        space = scaled_space(name, width_scale)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    return make_problem(
        space,
        recipe=Recipe(num_steps=args.steps),
        num_archs=max(args.archs, args.subnets),
        batch_size=min(args.batch, SETTLING),
        seed=args.seed,
        dtype=torch.float32,
    )


def on_device(problem: Problem, device: torch.device, args: argparse.Namespace) -> Problem:
    """The problem on the device, with a whole batch of random images."""
    generator = torch.Generator().manual_seed(args.seed)
    images = torch.rand((args.batch, *problem.images.shape[1:]), generator=generator).mul_(0.96).add_(0.02)
    labels_ = torch.randint(problem.student.space.settings.classes, (args.batch,), generator=generator)
    return checks.placed(replace(problem, images=images, labels=labels_), device)


def check(problem: Problem, narrow: Problem, device: torch.device, *, archs: int) -> list[str]:
    """Go through the equality gates that a device can pass; both problems are float32 ones on the CPU.

    `narrow` is compared with the CPU, `problem` on the device alone.
    """
    gpu, cpu = device.type == "cuda", torch.device("cpu")
    placed = checks.placed(_few(problem, archs), device)
    exact = [checks.placed(_few(narrow, archs), where, torch.float64) for where in (cpu, device)]
    with checks.full_float32():
        found = [checks.kernels_agree(device), checks.fused_attacks_agree(placed)] if gpu else []
        found.append(checks.attacks_agree(*exact))
        found.append(checks.graphs_agree(placed, capture=None if gpu else lambda body: body))
        found.append(checks.steps_agree(*exact))
    return found


def _few(problem: Problem, archs: int) -> Problem:
    """Some archs and images of a problem, and an attack of three steps."""
    few = {"archs": problem.archs[:archs], "images": problem.images[:SMALL], "labels": problem.labels[:SMALL]}
    return replace(checks.with_steps(problem, 3), **few)


def sections(problems: dict[str, Problem], device: torch.device, args: argparse.Namespace) -> list[Section]:
    """What is measured, in this order; the time that a section leaves is the next ones'."""
    gpu, rounds = device.type == "cuda", args.rounds
    tops: dict[str, float] = {}

    def ceilings(budget: Budget) -> list[Row]:
        tops.update(limits.ceilings(budget, device, size=8192 if gpu else 256, batch=args.batch))
        return limits.ceiling_rows(tops)

    def attacks(problem: Problem, budget: Budget) -> list[Row]:
        if not tops:
            raise TimeIsShort
        return limits.attack_rows(problem, tops, budget, rounds=rounds)

    def each(what: str, weight: float, measure: Callable[[Problem, Budget], list[Row]]) -> list[Section]:
        return [
            Section(f"{what}, {name}", weight, partial(measure, problem), name) for name, problem in problems.items()
        ]

    def one(problem: Problem, budget: Budget) -> list[Row]:
        return ladder.step_rows(replace(problem, archs=problem.archs[: args.archs]), budget, rounds=rounds)

    def several(problem: Problem, budget: Budget) -> list[Row]:
        return ladder.shared_rows(replace(problem, archs=problem.archs[: args.subnets]), budget, rounds=rounds)

    label = {"images": args.images, "training_steps": args.training_steps, "rounds": rounds, "seed": args.seed}
    data = {"images": args.epoch, "batch": args.batch, "workers": args.workers, "rounds": rounds}
    return [
        Section("ceilings", 1, ceilings),
        *each("one subnet a step", 4, one),
        *each(f"{args.subnets} subnets a step", 4, several),
        *each("seconds per label", 3, lambda problem, budget: labels.label_rows(problem, budget, **label)),
        *each("share of the ceiling", 1, attacks),
        Section("augmented images", 1, partial(labels.data_rows, device=device, **data)),
        Section("kernels alone", 1, partial(limits.kernel_rows, device=device, batch=args.batch)),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    spaces = ["resnet_cifar", "mobilenet_v3_cifar"]
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--space", nargs="+", choices=sorted(PRESETS), default=spaces, help="the time is divided")
    parser.add_argument("--width-scale", type=float, default=1.0, help="times all channels")
    parser.add_argument("--batch", type=int, default=256, help="images per step")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, fewer where time is short")
    parser.add_argument("--steps", type=int, default=10, help="PGD steps of the attack")
    parser.add_argument("--archs", type=int, default=2, help="sampled subnets, one a step; times are means over them")
    parser.add_argument("--subnets", type=int, default=4, help="of a step that trains several")
    parser.add_argument("--images", type=int, default=2000, help="of a full label")
    parser.add_argument("--training-steps", type=int, default=40, help="on patterns, of the network that is labelled")
    parser.add_argument("--epoch", type=int, default=5000, help="images that are augmented")
    parser.add_argument("--workers", type=int, help="of the DataLoader; the cores but one, at most 8")
    parser.add_argument("--minutes", type=float, default=8.0, help="what all of it may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", nargs="?", const=str(RESULTS), metavar="FILE", help=f"default {RESULTS.name}")
    parser.add_argument("--quick", action="store_true", help="digits spaces, batch 8, PGD-2, 1 round: that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.space = ["resnet_digits", "mobilenet_digits"]
        args.batch, args.steps, args.archs, args.subnets, args.rounds = 8, 2, 1, 2, 1
        args.images, args.training_steps, args.epoch, args.workers = 40, 4, 100, 1
    require_positive(parser, args, "batch", "rounds", "steps", "archs", "subnets", "images", "training_steps", "epoch")
    return args


if __name__ == "__main__":
    main()
