"""The schedule of a training: its learning rate, where a step is in it, how many steps fit into a limit of time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from proard.config import TrainingSettings
from proard.training.history import Done
from proard.training.ranks import Ranks

START_UP, RATED = 5, 10  # steps that hold start-up; the last of those from which the remaining time is estimated
FIRST = 50  # steps after which the number of steps is first set, ...
FEWEST = RATED  # ... or this many, where they took a tenth of the time; every estimate leaves at least so many steps
FIRST_SHARE, NEXT_SHARE = 0.1, 0.05  # shares of the limit that may pass before the first estimate, between two others
KEPT = 0.02  # share of the limit that is kept free


def learning_rate(settings: TrainingSettings, step: float, total: int, warmup: int) -> float:
    """Linear warm-up to `lr`, then a cosine to zero, or what a student's `schedule` says; `step` may be a position."""
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return settings.lr
    if settings.schedule == "steps":  # a tenth at half, and again at three quarters: epochs 100 and 150 of 200
        return settings.lr * 0.1 ** sum(step >= share * total for share in (0.5, 0.75))
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


@dataclass
class Schedule:
    """Number of steps of a training, and the position of each step in the schedule that its `epochs` plan.

    Learning rate, number of attack steps and all else that changes with the progress of a training are functions of the
    position. It grows by 1 with every step. Where `minutes` allow fewer steps than planned it grows faster, so that the
    last step has the position of the last planned one. A new estimate changes how fast it grows, so that nothing jumps.

    Attributes
    ----------
    planned : int
        Steps of `epochs`: no training makes more.
    total : int
        Steps of the training, as far as known.
    step, position : int, float
        The step at which `total` was last set, and its position.
    step_seconds : float
        Seconds of a step, from the newest estimate.
    validation, saving : float, optional
        Seconds of the newest validation and of the newest saving of the state; None before the first validation.
    estimated : float, optional
        Seconds of training at the newest estimate; None before the first.
    """

    planned: int
    total: int
    step: int = 0
    position: float = 0.0
    step_seconds: float = 0.0
    validation: float | None = None
    saving: float = 0.0
    estimated: float | None = None

    def at(self, step: int) -> float:
        """Position of a step; equal to the step, without rounding, as long as `total` is `planned`."""
        left = (step - self.step) * (self.planned - self.position)
        return self.position + left / (self.total - self.step)

    def is_due(self, step: int, seconds: float, limit: float, *, ends_epoch: bool) -> bool:
        """Whether to estimate `total` after so many steps and seconds of training."""
        if step >= self.total:
            return False
        if self.estimated is None:
            return step >= FIRST or (step >= FEWEST and seconds > FIRST_SHARE * limit)
        return ends_epoch or seconds - self.estimated > NEXT_SHARE * limit

    def fit(self, step: int, seconds: float, limit: float, *, validated_every: int) -> None:
        """Set `total` to the number of steps that fit into the limit.

        Parameters
        ----------
        step : int
            Steps made; fewer than `total`.
        seconds : float
            Seconds of training.
        limit : float
            Seconds that there are.
        validated_every : int
            Steps from one validation to the next.
        """
        validation = self.validation or 0.0
        left = (1 - KEPT) * limit - seconds - validation - self.saving
        each = self.step_seconds + validation / validated_every
        fitting = math.floor(left / each) if each > 0 else self.planned
        total = min(step + max(fitting, min(FEWEST, self.total - step)), self.planned)
        self.estimated = seconds
        if total != self.total:
            self.position, self.step, self.total = self.at(step), step, total


class Stopwatch:
    """Counts the seconds of a training, knows how long its steps take, and fits its schedule to a limit of time.

    Parameters
    ----------
    planned : int
        Steps of all epochs.
    minutes : float, optional
        The limit of the training's time; without one, its schedule does not change.
    validated_every : int
        Steps from one validation to the next.
    ranks : Ranks
        Processes that train together; the clock of the first decides.
    clock : callable
        Seconds that never go back.
    """

    def __init__(
        self, planned: int, *, minutes: float | None, validated_every: int, ranks: Ranks, clock: Callable[[], float]
    ) -> None:
        self.schedule = Schedule(planned=planned, total=planned)
        self.limit = math.inf if minutes is None else 60 * minutes
        self.validated_every, self.ranks, self.clock = validated_every, ranks, clock
        self.counted_at = clock()
        self.steps, self.seconds = 0, 0.0  # since the newest estimate, without start-up

    def start(self, schedule: dict[str, Any] | None) -> None:
        """Begin to count, with the schedule of an earlier attempt if there is one."""
        self.schedule = self.schedule if schedule is None else Schedule(**schedule)
        self.counted_at = self.clock()

    def count(self, done: Done) -> float:
        """Add the seconds since the last call to those of the training, and return them."""
        now = self.clock()
        seconds, self.counted_at = now - self.counted_at, now
        done.seconds += seconds
        return seconds

    def count_step(self, done: Done, number: int) -> None:
        """Count a step, the attempt's `number`-th."""
        seconds = self.count(done)
        if number > START_UP:
            self.steps, self.seconds = self.steps + 1, self.seconds + seconds

    def left(self, done: Done) -> float:
        """Seconds of the steps to come."""
        return min(self.seconds / self.steps * (self.schedule.total - done.step), max(self.limit - done.seconds, 0))

    def is_due(self, done: Done, *, ends_epoch: bool) -> bool:
        """Whether to estimate how many steps fit: first when the speed is known, then regularly."""
        known = self.schedule.estimated is not None or self.steps >= RATED - START_UP
        due = known and self.limit < math.inf and not done.overfitted
        return due and self.schedule.is_due(done.step, done.seconds, self.limit, ends_epoch=ends_epoch)

    def estimate(self, done: Done, *, validate: Callable[[], object]) -> bool:
        """Set the number of steps to what fits; whether it is the first time. The device has nothing left to do.

        The first time, `validate` is called and timed, unless a validation will show early enough how long one takes.
        """
        first, waited = self.schedule.estimated is None, self.count(done)
        if self.steps >= RATED - START_UP:
            self.schedule.step_seconds = (self.seconds + waited) / self.steps
            self.steps, self.seconds = 0, 0.0
        self._fit(done)
        if self.schedule.validation is None and 2 * self.validated_every > self.schedule.total:
            validate()
            self._fit(done)
        return first

    def length(self, steps: int, epochs: float) -> str:
        """So many steps in words, compared with all epochs."""
        minutes, planned = f"minutes {self.limit / 60:g}", self.schedule.planned
        if steps == planned:
            return f"{minutes}: all {epochs:g} epochs"
        return f"{minutes}: {steps} steps ({epochs * steps / planned:.1f} epochs) instead of {epochs:g} epochs"

    def _fit(self, done: Done) -> None:
        """Set the number of steps to what fits by the clock of the first process."""
        self.schedule.fit(done.step, done.seconds, self.limit, validated_every=self.validated_every)
        self.schedule = Schedule(**self.ranks.from_first(asdict(self.schedule)))
