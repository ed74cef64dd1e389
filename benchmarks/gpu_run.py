"""What the parts of the GPU benchmark share: a time that may not be exceeded, calls that wait for the device, rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import NOISY, Timing, clocked, summarise, table

from proard.progress import Progress

Row = dict[str, Any]
Call = Callable[[int], object]


class TimeIsShort(Exception):
    """The time of a section ended before it measured anything."""


@dataclass(frozen=True)
class Budget:
    """The time until which a section may go on; `end` is on the clock of `time.monotonic`."""

    end: float

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def require(self) -> None:
        """Go on only where time is left.

        Raises
        ------
        TimeIsShort
            None is left.
        """
        if self.left <= 0:
            raise TimeIsShort


def waited(call: Call, device: torch.device) -> Call:
    """The call that ends when the device has done what it launched."""

    def run(number: int) -> None:
        call(number)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def seconds_of(call: Callable[[], object], device: torch.device, *, repeats: int = 10) -> float:
    """Median seconds of a call, the device waited for."""
    call_and_wait = waited(lambda number: call(), device)
    return statistics.median([clocked(call_and_wait, number)[0] for number in range(repeats + 2)][2:])


@dataclass(frozen=True)
class Timed:
    """Interleaved timings: the rounds that fitted, and how far the baseline's two medians lie apart."""

    timings: dict[str, Timing]
    rounds: int
    spread: float


def time_within(
    calls: Mapping[str, Call], budget: Budget, *, rounds: int, device: torch.device, label: str, plain: str
) -> Timed:
    """Time every call once per round, the first (the baseline) once more at its end, for as many rounds as fit.

    `plain` is the second baseline. Every call runs once before, to warm up. A round that would end too late is not
    begun.

    Raises
    ------
    TimeIsShort
        The time is over before the first round.
    """
    ready = {name: waited(call, device) for name, call in calls.items()}
    order = [*ready, next(iter(ready))]
    progress = Progress(label, len(ready) + rounds * len(order), "timings")
    for name, call in ready.items():
        budget.require()
        call(-1)
        progress.advance(note=name)
    clocks: list[list[tuple[float, float]]] = []
    longest = 0.0
    while len(clocks) < rounds and budget.left > longest:
        clocks.append([])
        for number, name in enumerate(order):
            clocks[-1].append(clocked(ready[name], len(clocks) - 1))
            progress.advance(note=f"{name}, timing {number + 1} of {len(order)}")
        longest = max(longest, sum(wall for wall, _ in clocks[-1]))
    progress.close()
    if not clocks:
        raise TimeIsShort
    timings, spread = summarise(list(ready), clocks, plain=plain)
    return Timed(timings, len(clocks), spread)


def rows_of(bench: str, timed: Timed, levers: Mapping[str, str], *, baseline: str, second: str) -> list[Row]:
    """One row per timing; `baseline` names the first call, `second` is the key of the ratio to the second baseline."""
    return [
        {
            "bench": bench,
            "row": name,
            "lever": levers[name],
            "baseline": baseline,
            "ratio_total": round(timing.ratio_total, 4),
            second: round(timing.ratio_plain, 4),
            "ratio_previous": round(timing.ratio_previous, 4),
            "seconds": round(timing.seconds, 7),
            "rounds": timed.rounds,
            "baseline_spread": round(timed.spread, 4),
            "noisy": timed.spread > NOISY,
        }
        for name, timing in timed.timings.items()
    ]


def printed(title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Print rows under a title: their name, these keys under these headings, what the row is."""

    def cell(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"

    cells = [(row["row"], *(cell(row.get(key)) for key in columns), row["lever"]) for row in rows]
    first = rows[0]
    noisy = " - NOISY, do not quote these ratios" if first.get("noisy") else ""
    rounds = f", medians of {first['rounds']} rounds{noisy}" if "rounds" in first else ""
    print(f"\n{title}{rounds}")
    print(table(("row", *columns.values(), "what"), cells), flush=True)
