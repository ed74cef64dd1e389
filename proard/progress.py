"""Progress of long work: a live bar on a terminal, or a line from time to time in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


def duration(seconds: float) -> str:
    """Seconds as text: 45 s, 3 min 20 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Progress:
    """Counts finished work and shows rate and remaining time.

    Parameters
    ----------
    label : str
        Name of the work.
    total : int
        Total number of units of work.
    unit : str
        Plural name of a unit.
    done : int
        Units done before this process started (a resumed job).
    every : float
        Seconds between two lines if standard output is not a terminal.
    start_up : int
        First units, which contain one-time work: the rate excludes them as soon as others are done.
    clock : callable
        Returns the current time in seconds.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        every: float = 15.0,
        start_up: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.clock, self.start_up = clock, done + start_up
        self.done = self.rated_from_count = done
        self.started = self.shown = self.rated_from = clock()
        self.live = sys.stdout.isatty()
        self.every = 0.2 if self.live else every
        self.note: str | Callable[[], str] = ""

    def advance(self, units: int = 1, note: str | Callable[[], str] = "") -> None:
        """Count units, store the newest note, and show both if it is time; a callable note is called only then."""
        self.done += units
        self.note = note or self.note
        now = self.clock()
        if now - self.shown >= self.every:
            self.show()
        if self.done == self.start_up:
            self.rated_from, self.rated_from_count = now, self.done

    def show(self) -> None:
        """Show the current progress now."""
        self.shown = self.clock()
        elapsed = max(self.shown - self.rated_from, 1e-9)
        rate = (self.done - self.rated_from_count) / elapsed
        left = duration((self.total - self.done) / rate) if rate > 0 else "?"
        share = self.done / self.total if self.total else 1.0
        speed = f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"
        parts = [
            f"{self.label} {self.done}/{self.total} {self.unit}",
            f"{speed} {self.unit}/s",
            f"{left} left",
            self.note() if callable(self.note) else self.note,
        ]
        text = " · ".join(part for part in parts if part)
        if self.live:
            filled = round(20 * share)
            print(f"\r\x1b[2K{'█' * filled}{'░' * (20 - filled)} {text}", end="", flush=True)
        else:
            print(f"{share:4.0%} {text}", flush=True)

    def say(self, line: str) -> None:
        """Print a separate line above the bar."""
        print(f"\r\x1b[2K{line}" if self.live else line, flush=True)

    def close(self) -> None:
        """Finish the bar and print the total duration."""
        self.say(f"{self.label}: {self.done} {self.unit} in {duration(self.clock() - self.started)}")
