"""The whole table for a GPU: kernels, ceilings and equality, then steps, labels and data. Under 4 minutes.

Every section runs in a process of its own, so that one that fails stops no other. A summary names them all; the exit
code is not 0 where one has failed. Without a GPU it says so in one line and does nothing. `--device cpu` goes through
the same code on a CPU, where fused kernels and CUDA graphs are no subject. What was not run is listed at the end; what
was measured is written at once.

    python benchmarks/bench_gpu.py --help
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import gpu_ladder as ladder
import torch
from common import machine, require_positive, table, write_rows
from gpu_process import OwnProcess, run_as_process
from gpu_sections import Result, Section, Start, late, sections
from step_rows import scaled_space

from proard.config import PRESETS

RESULTS = Path(__file__).parent / "results" / "bench_gpu.json"
NO_GPU = "bench_gpu: torch sees no GPU here; nothing was run, checked or measured."
PARTS = ("kernels", "ceilings", "equality", "step", "shared", "attack", "labels", "data", "twins")
LOADING = 6.0  # seconds that a section's process takes before it measures: the CUDA context, the libraries
SPARE = 20.0  # seconds that a section may at least take beyond its share before it is stopped
GRACE = 15.0  # seconds after the end of all time when what still runs is stopped
AHEAD = 4  # cores from which the next section's process prepares itself while one runs
ON_GPU_ONLY = [f"{row} ({ladder.ROWS[row]})" for row in ladder.GPU_ONLY] + [
    f"{ladder.GRAPHS} ({ladder.SHARED[ladder.GRAPHS]})",
    "attacks in CUDA graphs",
    "fused kernels against their twins",
    "a step in which the host never waits",
]


class Worker(Protocol):
    """Runs one section."""

    def finish(self, start: Start, seconds: float) -> Result:
        """Run it now; it is stopped after so many seconds."""

    def stop(self) -> None:
        """End it, whether it has run or not."""


def main(
    argv: Sequence[str] | None = None, *, work: Callable[[Section, argparse.Namespace], Worker] = OwnProcess
) -> None:
    """Run section by section, say what was not run and what failed."""
    args = parse(argv)
    if args.one:
        run_as_process(next(each for each in sections(args) if each.title == args.one), args)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU)
        return
    chosen = [section for section in sections(args) if section.part in args.sections]
    clock = time.monotonic()
    results = run_all(chosen, args, work)
    rows = [row for result in results.values() for row in result.rows]
    gpu = args.device == "cuda"
    not_run = [] if gpu else list(ON_GPU_ONLY)
    for title, result in results.items():
        not_run += [f"{title}: {result.why}"] if result.state != "done" else []
        short = next((args.rounds - row["rounds"] for row in result.rows if "rounds" in row), 0)
        not_run += [f"{title}: {short} of {args.rounds} rounds"] if short > 0 else []
    facts = next((result.machine for result in results.values() if result.machine), machine())
    print("\n" + ", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"\nsections, {time.monotonic() - clock:.0f} s in all")
    lines = [(title, f"{result.seconds:.0f}", result.state) for title, result in results.items()]
    print(table(("section", "s", "state"), lines))
    for what in not_run:
        print(f"not run: {what}")
    if args.json:
        write_rows(args.json, [*rows, {"bench": "gpu_left_out", "not_run": not_run, "machine": facts}])
    failed = [title for title, result in results.items() if result.state == "failed"]
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}. All rows that were printed are valid, gates apart")


def run_all(
    waiting: Sequence[Section], args: argparse.Namespace, work: Callable[[Section, argparse.Namespace], Worker]
) -> dict[str, Result]:
    """Run sections one after the other within the time allowed; results by title, rows written as they come."""
    end, ahead = time.time() + 60 * args.minutes, (os.cpu_count() or 1) >= AHEAD
    results: dict[str, Result] = {}
    tops: dict[str, float] = {}
    plain_kernels, workers = False, {}
    try:
        for number, section in enumerate(waiting):
            left = end - time.time()
            if left <= 0:
                results[section.title] = Result("short", late(args))
                continue
            begun, seconds = time.time(), share_of(waiting[number:], left)
            workers[number] = workers.get(number) or work(section, args)
            if ahead and number + 1 < len(waiting):
                workers[number + 1] = work(waiting[number + 1], args)
            start = Start(begun + seconds, tops, plain_kernels)
            result = workers[number].finish(start, min(max(2 * seconds, seconds + SPARE), left + GRACE))
            workers.pop(number).stop()
            results[section.title] = replace(result, seconds=time.time() - begun)
            plain_kernels |= section.proves_kernels and result.state != "done"
            if section.part == "ceilings":
                tops = {row["row"]: row["rate"] for row in result.rows}
            if result.state == "failed":
                print(f"FAILED: {section.title}: {result.why}", file=sys.stderr, flush=True)
            if args.json:
                write_rows(args.json, [row for each in results.values() for row in each.rows])
    finally:
        for worker in workers.values():
            worker.stop()
    return results


def share_of(waiting: Sequence[Section], left: float) -> float:
    """Seconds for the first of these sections: what every process takes to load, and its share of the rest."""
    rest = max(left - LOADING * len(waiting), 0)
    return min(left, LOADING + rest * waiting[0].weight / sum(each.weight for each in waiting))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; `argv` of the result is what was read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    spaces = ["resnet_cifar", "mobilenet_v3_cifar"]
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sections", type=names, default=PARTS, metavar="A,B", help=f"of {','.join(PARTS)}")
    parser.add_argument("--space", nargs="+", choices=sorted(PRESETS), default=spaces, help="the time is divided")
    parser.add_argument("--width-scale", type=float, default=1.0, help="times all channels")
    parser.add_argument("--batch", type=int, default=256, help="images per step")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, fewer where time is short")
    parser.add_argument("--steps", type=int, default=10, help="PGD steps of the attack")
    parser.add_argument("--archs", type=int, default=2, help="sampled subnets, one a step; times are means over them")
    parser.add_argument("--subnets", type=int, default=4, help="of a step that trains several")
    parser.add_argument("--images", type=int, default=1000, help="of a full label")
    parser.add_argument("--training-steps", type=int, default=40, help="on patterns, of the network that is labelled")
    parser.add_argument("--epoch", type=int, default=5000, help="images that are augmented")
    parser.add_argument("--workers", type=int, help="of the DataLoader; the cores but one, at most 8")
    parser.add_argument("--minutes", type=float, default=3.5, help="after which no section begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", nargs="?", const=str(RESULTS), metavar="FILE", help=f"default {RESULTS.name}")
    parser.add_argument("--quick", action="store_true", help="digits spaces, batch 8, PGD-2, 1 round: that it runs")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a section's own process
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if args.quick:
        args.space = ["resnet_digits", "mobilenet_digits"]
        args.batch, args.steps, args.archs, args.subnets, args.rounds = 8, 2, 1, 2, 1
        args.images, args.training_steps, args.epoch, args.workers = 40, 4, 100, 1
    try:
        for name in args.space:
            scaled_space(name, args.width_scale)
    except ValueError as error:
        parser.error(str(error))
    require_positive(parser, args, "batch", "rounds", "steps", "archs", "subnets", "images", "training_steps", "epoch")
    return args


def names(text: str) -> tuple[str, ...]:
    """Read the names of parts.

    Raises
    ------
    argparse.ArgumentTypeError
        There is no such part.
    """
    found = tuple(filter(None, text.split(",")))
    strange = [name for name in found if name not in PARTS]
    if strange or not found:
        raise argparse.ArgumentTypeError(f"{text!r} names {strange or 'none'}; expected some of {','.join(PARTS)}")
    return found


if __name__ == "__main__":
    main()
