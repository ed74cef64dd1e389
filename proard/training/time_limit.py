"""The time limit of a job: a training saves and stops before the scheduler kills it."""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime

from proard.config import UserError

ASIDE = 60.0  # seconds kept for leaving in order, or a tenth of the job's time where that is less
VARIABLES = ("PROARD_END_TIME", "SLURM_JOB_END_TIME")  # seconds since 1970


def end_of_job(environment: Mapping[str, str] | None = None) -> float:
    """When the job that this process belongs to ends, in seconds since 1970; infinite where nothing limits it.

    PROARD_END_TIME counts before SLURM_JOB_END_TIME; under a SLURM that does not set it, squeue is asked.

    Raises
    ------
    UserError
        A variable is no number.
    """
    environment = os.environ if environment is None else environment
    for name in VARIABLES:
        if environment.get(name):
            try:
                return float(environment[name])
            except ValueError:
                raise UserError(f"{name} is {environment[name]!r}; expected seconds since 1970: date +%s") from None
    return _asked(environment["SLURM_JOB_ID"]) if environment.get("SLURM_JOB_ID") else math.inf


def _asked(job: str) -> float:
    """End of a job as squeue prints it; infinite where it prints none."""
    try:
        command = ["squeue", "--noheader", "--job", job, "--format", "%e"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return datetime.fromisoformat(said.split()[0]).timestamp()
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):  # no squeue, no such job, NONE, N/A
        return math.inf


class TimeLimit:
    """What is left of a job's time, against what the next step may take.

    Parameters
    ----------
    end : float
        When the job ends, in seconds since 1970; infinite: never.
    clock : callable
        The time now, in the same unit.
    """

    def __init__(self, end: float = math.inf, *, clock: Callable[[], float] = time.time) -> None:
        self.end, self.clock = end, clock
        self.before = clock()
        self.aside = min(ASIDE, 0.1 * max(end - self.before, 0))
        self.longest = {False: 0.0, True: 0.0}  # steps; steps that end an epoch, with their validation
        self.saving = 0.0

    def step(self, *, ends_epoch: bool) -> None:
        """A step is over: remember how long it took."""
        now = self.clock()
        self.longest[ends_epoch] = max(self.longest[ends_epoch], now - self.before)
        self.before = now

    def saved(self) -> None:
        """The state was saved since the last step: remember how long that took."""
        now = self.clock()
        self.saving, self.before = max(self.saving, now - self.before), now

    def is_short(self, *, ends_epoch: bool) -> bool:
        """Whether the next step, and saving after it, may not be over in time."""
        return self.before + self.longest[ends_epoch] + self.saving + self.aside > self.end
