"""What benchmarks share: the machine, interleaved timing with the baseline taken twice, ratios, JSON lines."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from proard import __version__
from proard.artifacts.files import write_text
from proard.host import usable_cores
from proard.kernels import has_bfloat16
from proard.progress import Progress

NOISY = 0.10  # spread of the two baselines above which a run's ratios are not to be quoted


@dataclass(frozen=True)
class Timing:
    """One row of a ladder: medians over rounds.

    Attributes
    ----------
    seconds, cpu_seconds : float
        Wall time and processor time (all threads) of one call.
    ratio_total, ratio_previous : float
        How many times faster than the baseline, and than the row above; ratios are taken within a round.
    ratio_plain : float, optional
        How many times faster than the second baseline, where there is one.
    """

    seconds: float
    cpu_seconds: float
    ratio_total: float
    ratio_previous: float
    ratio_plain: float | None = None


def machine() -> dict[str, Any]:
    """Processor, cores, threads, versions and load: what a time means nothing without."""
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "proard": __version__,
    }


def computed_here(rows: Mapping[str, Any], *, rounded: Collection[str]) -> dict[str, Any]:
    """The rows without those in `rounded`, of bfloat16, where this CPU only emulates that type: they take minutes."""
    return {name: row for name, row in rows.items() if name not in rounded or has_bfloat16("cpu")}


def time_interleaved(
    calls: Mapping[str, Callable[[int], None]], *, rounds: int, label: str, plain: str | None = None
) -> tuple[dict[str, Timing], float]:
    """Time every call once per round, the first one (the baseline) once more at the end of each round.

    Parameters
    ----------
    calls : mapping of name to callable
        In ladder order; each takes the number of the round. A round -1 warms up and does not count.
    rounds : int
        Rounds that count.
    label : str
        What the progress lines are about.
    plain : str, optional
        Name of the second baseline, one of the calls.

    Returns
    -------
    timings : dict of name to Timing
    spread : float
        Relative difference between the medians of the first and the second baseline.
    """
    baseline = next(iter(calls))
    order = [*calls, baseline]
    clocks: list[list[tuple[float, float]]] = []
    progress = Progress(label, (rounds + 1) * len(order), "timings")
    for number in range(-1, rounds):
        clocks.append([])
        for name in order:
            clocks[-1].append(clocked(calls[name], number))
            progress.advance(note=name)
    progress.close()
    return summarise(list(calls), clocks[1:], plain=plain)


def summarise(
    names: Sequence[str], clocks: Sequence[Sequence[tuple[float, float]]], *, plain: str | None = None
) -> tuple[dict[str, Timing], float]:
    """Medians and ratios of rounds of (wall, processor) seconds; each round ends with the second baseline."""
    rounds = [[(first[0] + again[0]) / 2, *(wall for wall, _ in rest)] for first, *rest, again in clocks]
    processor = [[(first[1] + again[1]) / 2, *(used for _, used in rest)] for first, *rest, again in clocks]
    timings = {}
    for index, name in enumerate(names):
        timings[name] = Timing(
            statistics.median(walls[index] for walls in rounds),
            statistics.median(used[index] for used in processor),
            statistics.median(walls[0] / walls[index] for walls in rounds),
            statistics.median(walls[max(index - 1, 0)] / walls[index] for walls in rounds),
            None if plain is None else statistics.median(walls[names.index(plain)] / walls[index] for walls in rounds),
        )
    first, again = (statistics.median(clock[end][0] for clock in clocks) for end in (0, -1))
    return timings, abs(first - again) / min(first, again)


def require_positive(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """End with the usage where one of these counts is below 1."""
    for name in names:
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected at least 1")


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON line per row."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text columns: the last one flush left, the others flush right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header) - 1)]
    lines = [
        "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in (header, *rows)
    ]
    return "\n".join(lines)


def clocked(call: Callable[[int], None], number: int) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    wall, used = time.perf_counter(), time.process_time()
    call(number)
    return time.perf_counter() - wall, time.process_time() - used


def _processor() -> str:
    """Read the processor's name as the system gives it."""
    path = Path("/proc/cpuinfo")
    names = (
        [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        if path.exists()
        else []
    )
    return names[0].split(":", 1)[1].strip() if names else platform.processor()
