"""The whole table for a GPU: kernels, ceilings and equality, then steps, labels and data. Under 4 minutes.

Every section runs in a separate process, so that a failure stops no other section. A summary names them all; the exit
code is not 0 if one has failed. Without a GPU it prints one line and does nothing. `--device cpu` runs the
same code on a CPU, without fused kernels and CUDA graphs. A list at the end names what was not run; rows are
written as soon as they are measured.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from common import Options, machine, table, write_rows
from gpu.rows import GPU_ONLY, GRAPHS, ROWS, SHARED
from gpu.sections import OwnProcess, Result, Section, Start, late, run_as_process, sections
from step_rows import scaled_space

from proard.config import PRESETS

NO_GPU = "bench_gpu: torch sees no GPU here; nothing was run, checked or measured."
PARTS = ("kernels", "ceilings", "equality", "step", "shared", "attack", "busy", "labels", "data", "twins")
AHEAD = 4  # with at least so many cores the next section's process loads while one runs
ON_GPU_ONLY = [f"{row} ({ROWS[row]})" for row in GPU_ONLY] + [
    f"{GRAPHS} ({SHARED[GRAPHS]})",
    "attacks in CUDA graphs",
    "fused kernels against their plain forms",
    "a step without a host wait",
    "busy share and peak memory of a training step, hours of the full recipes",
]


@dataclass(frozen=True)
class Pace:
    """Division of the time, in seconds."""

    loading: float = 6.0  # of a section's process before it measures: CUDA context, libraries
    spare: float = 20.0  # by which a section may exceed its share before it is stopped, at least
    grace: float = 15.0  # after the end of the time, when running sections are stopped
    now: Callable[[], float] = time.time  # since 1970

    def share_of(self, waiting: Sequence[Section], left: float) -> float:
        """Seconds for the first of these sections: its time to load, and its share of the rest."""
        rest = max(left - self.loading * len(waiting), 0)
        return min(left, self.loading + rest * waiting[0].weight / sum(each.weight for each in waiting))


Work = Callable[[Section, Namespace], OwnProcess]


def main(
    argv: Sequence[str] | None = None,
    *,
    work: Work = OwnProcess,
    pace: Pace | None = None,
    gpu_is_there: Callable[[], bool] = torch.cuda.is_available,
) -> None:
    """Run section by section, each by `work`, and list those not run and those that failed."""
    args, pace = parse(argv), pace or Pace()
    if args.one:
        run_as_process(next(each for each in sections(args) if each.title == args.one), args)
        return
    if args.device == "cuda" and not gpu_is_there():
        print(NO_GPU)
        return
    begun = pace.now()
    results = run_all([section for section in sections(args) if section.part in args.sections], args, work, pace)
    rows = [row for result in results.values() for row in result.rows]
    not_run = [] if args.device == "cuda" else list(ON_GPU_ONLY)
    for title, result in results.items():
        not_run += [f"{title}: {result.why}"] if result.state != "done" else []
        short = next((args.rounds - row["rounds"] for row in result.rows if "rounds" in row), 0)
        not_run += [f"{title}: {short} of {args.rounds} rounds"] if short > 0 else []
    facts = next((result.machine for result in results.values() if result.machine), machine())
    print("\n" + ", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"\nsections, {pace.now() - begun:.0f} s in all")
    lines = [(title, f"{result.seconds:.0f}", result.state) for title, result in results.items()]
    print(table(("section", "s", "state"), lines))
    for what in not_run:
        print(f"not run: {what}")
    write_rows(args.json, [*rows, {"bench": "gpu_left_out", "not_run": not_run, "machine": facts}])
    failed = [title for title, result in results.items() if result.state == "failed"]
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}. All printed rows are valid, except if a gate failed")


def run_all(waiting: Sequence[Section], args: Namespace, work: Work, pace: Pace) -> dict[str, Result]:
    """Run sections one after the other within the time allowed; results by title, rows written at once."""
    end, ahead = pace.now() + 60 * args.minutes, (os.cpu_count() or 1) >= AHEAD
    results: dict[str, Result] = {}
    tops: dict[str, float] = {}
    plain_kernels, workers = False, {}
    try:
        for number, section in enumerate(waiting):
            left = end - pace.now()
            if left <= 0:
                results[section.title] = late(args)
                continue
            begun, seconds = pace.now(), pace.share_of(waiting[number:], left)
            workers[number] = workers.get(number) or work(section, args)
            if ahead and number + 1 < len(waiting):
                workers[number + 1] = work(waiting[number + 1], args)
            limit = min(max(2 * seconds, seconds + pace.spare), left + pace.grace)
            result = workers[number].finish(Start(begun + seconds, tops, plain_kernels), limit)
            workers.pop(number).stop()
            results[section.title] = replace(result, seconds=pace.now() - begun)
            plain_kernels |= section.proves_kernels and result.state != "done"
            if section.part == "ceilings":
                tops = {row["row"]: row["rate"] for row in result.rows}
            if result.state == "failed":
                print(f"FAILED: {section.title}: {result.why}", file=sys.stderr, flush=True)
            write_rows(args.json, [row for each in results.values() for row in each.rows])
    finally:
        for worker in workers.values():
            worker.stop()
    return results


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line; the result's `argv` is the list of words."""
    quick = {"space": ["resnet_digits", "mobilenet_digits"], "batch": 8, "steps": 2, "archs": 1, "subnets": 2}
    options = Options(
        __doc__,
        "gpu",
        quick=quick | {"rounds": 1, "images": 40, "training_steps": 4, "epoch": 100, "workers": 1},
        threads=(None, "of torch; its own number", int),
        device=("cuda", "where to run", ["cuda", "cpu"]),
        sections=(PARTS, f"A,B of {','.join(PARTS)}", names),
        space=(["resnet_cifar", "mobilenet_v3_cifar"], "the time is divided", sorted(PRESETS)),
        width_scale=(1.0, "times all channels"),
        batch=(256, "images per step"),
        rounds=(5, "rounds that count, fewer where time is short"),
        steps=(10, "PGD steps of the attack"),
        archs=(2, "sampled subnets, one a step; times are means over them"),
        subnets=(4, "of a step that trains several"),
        images=(1000, "of a full label and of the attacks' accuracies"),
        training_steps=(40, "on patterns, of the network to label or to attack"),
        epoch=(5000, "images that are augmented"),
        workers=(None, "of the DataLoader; the cores but one, at most 8", int),
        minutes=(3.5, "after which no section starts"),
        profile=(None, "FILE for the table of a training step's kernels", str),
        seed=(0, "of archs, weights, images and noise"),
    )
    options.add_argument("--one", help=argparse.SUPPRESS)  # the process of one section
    options.add_argument("--result", help=argparse.SUPPRESS)
    args = options.read(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        for name in args.space:
            scaled_space(name, args.width_scale)
    except ValueError as error:
        options.error(str(error))
    return args


def names(text: str) -> tuple[str, ...]:
    """Read the names of parts; some, and no others."""
    found = tuple(filter(None, text.split(",")))
    strange = [name for name in found if name not in PARTS]
    if strange or not found:
        raise argparse.ArgumentTypeError(f"{text!r} names {strange or 'none'}; expected some of {','.join(PARTS)}")
    return found


if __name__ == "__main__":
    main()
