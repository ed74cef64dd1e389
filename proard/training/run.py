"""The training loop. One class trains teacher, control, phases and students; they differ in their `Plan`.

Every random choice is keyed by (seed, step) or (seed, epoch), so that a resumed training repeats the uninterrupted one
bit for bit on CPU at equal threads without any stored generator. The exception are trainings that `minutes` shorten:
how many steps they make depends on the machine's speed.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from proard.attacks import pgd
from proard.config import Threat, TrainingSettings, UserError, Validation
from proard.data import Views, keyed_generator
from proard.nets import FixedNet, Supernet
from proard.progress import Progress, duration
from proard.training.counted import Forward
from proard.training.history import Done, Rows, epoch_rows, summary
from proard.training.overfitting import overfitting
from proard.training.plan import Drawn, Plan
from proard.training.ranks import Ranks
from proard.training.schedule import RATED, START_UP, Stopwatch, learning_rate
from proard.training.state import Interrupted, ResumeState, StopFlag, stop_on_signal
from proard.training.step import StepBatch, StepResult, training_step
from proard.training.time_limit import TimeLimit

READ_EVERY = 20  # steps after which the host waits for the device at the latest, to see that all losses were finite


class ImageSource(Protocol):
    """Training images: their number, the order of an epoch, and augmented batches in [0, 1]."""

    def __len__(self) -> int:
        """Number of images."""

    def order(self, seed: int, epoch: int) -> Tensor:
        """Indices of all images in the order of this pass."""

    def batch(self, indices: Tensor, generator: torch.Generator, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Augmented images of shape (batch, channels, height, width) and their labels, or a part of this batch."""

    def views(self, indices: Tensor, generator: torch.Generator) -> Views:
        """Which views `batch` gives for the same arguments."""

    @property
    def padded_shape(self) -> tuple[int, int, int, int]:
        """Shape of the padded images that views are windows of: (n, height, width, channels)."""


class Run:
    """One training, from its newest state to the averaged weights of its best validated epoch.

    Parameters
    ----------
    net : Supernet or FixedNet
        Changed in place.
    label : str
        Its name in messages and in the history.
    plan : Plan
        Subnets and objectives of every step.
    settings : TrainTeacher, TrainControl, Phase or Student
        Optimisation, augmentation and attack.
    threat : Threat
        Norm and radius, in pixel units.
    source : ImageSource
        Training images on the network's device.
    validate : callable
        Measures subnets of the averaged network on `val`: rows with `arch`, `macs`, `val_clean_acc`, `val_robust_acc`,
        `val_num_images`. Epochs compare by the mean of `val_robust_acc`, then of `val_clean_acc`; under the loss
        `plain`, whose networks are not robust, the other way round.
    state : ResumeState
        Where an interrupted training continues; the caller removes it after writing its output.
    seed : int
        Seed of order, augmentation, sampling and attack starts.
    teacher, control : callable, optional
        Frozen teacher and plainly trained network: images to logits.
    ranks : Ranks, optional
        The processes that train together; each makes a run with the same arguments.
    time_limit : TimeLimit, optional
        The time that there is; without one, no limit.
    search : callable
        The attack, with the arguments of `pgd`.
    validation : Validation, optional
        When `validate` is called, and what is compared with its result; the default values without it.
    save_every_minutes : float
        Minutes between two savings of the state.
    read_every : int
        Steps after which the host waits for the device at the latest.
    clock : callable
        Seconds that never go back.

    Raises
    ------
    UserError
        `teacher_logits` under a loss that would not read them.
    """

    def __init__(
        self,
        net: Supernet | FixedNet,
        *,
        label: str,
        plan: Plan,
        settings: TrainingSettings,
        threat: Threat,
        source: ImageSource,
        validate: Callable[[Supernet | FixedNet], Rows],
        state: ResumeState,
        seed: int,
        teacher: Forward | None = None,
        control: Forward | None = None,
        ranks: Ranks | None = None,
        time_limit: TimeLimit | None = None,
        search: Callable[..., Tensor] = pgd,
        validation: Validation | None = None,
        save_every_minutes: float = 5.0,
        read_every: int = READ_EVERY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.net, self.label, self.plan, self.settings, self.source = net, label, plan, settings, source
        self.measure, self.state, self.seed = validate, state, seed
        self.ranks, self.time_limit = ranks or Ranks(), time_limit or TimeLimit()
        self.read_every, self.clock = read_every, clock
        self.validation, self.save_every_minutes = validation or Validation(), save_every_minutes
        self.part = self.ranks.part(min(settings.batch_size, len(source)))
        self.steps_per_pass = max(len(source) // settings.batch_size, 1)
        self.steps_per_epoch = self.steps_per_pass * plan.passes_per_epoch
        total, self.warmup = (
            round(epochs * self.steps_per_epoch) for epochs in (settings.epochs, settings.warmup_epochs)
        )
        every = self.validation.every_epochs * self.steps_per_epoch
        self.watch = Stopwatch(
            max(total, 1), minutes=settings.minutes, validated_every=every, ranks=self.ranks, clock=clock
        )
        self.step_on = training_step(
            net,
            settings,
            replace(plan, draw=self._draw) if plan.opens else plan,
            threat=threat,
            seed=seed,
            total_steps=self.watch.schedule.planned,
            teacher=teacher,
            control=control,
            padded_shape=source.padded_shape,
            part=self.part,
            search=search,
        )
        for table in filter(None, (self.step_on.teachers.logits, self.step_on.teachers.gradients)):
            print(f"{label}: {table.key} take {table.bytes / 2**20:.1f} MiB on {net.mean.device}", flush=True)
        self.done = Done()
        self.history: Rows = []
        self.sums = torch.zeros(3, dtype=torch.float64, device=net.mean.device)  # loss, correct clean, adversarial
        self.unread: dict[int, Done] = {}  # what was done before each step whose loss the host has not seen
        self.order, self.order_of = torch.empty(0), -1
        self.saved_at = clock()

    def train(self) -> Rows:
        """Train to the end and leave the best averaged weights in the network.

        Returns
        -------
        list of dict
            Rows of the HISTORY table.

        Raises
        ------
        UserError
            A loss or its gradient is not finite: nothing has moved, the last good state is kept.
        Interrupted
            A signal, a successor or the end of the job's time asked to stop: the state is saved.
        """
        label, settings, update = self.label, self.settings, self.step_on.update
        with stop_on_signal() as stop:
            self._resume()
            first = self.done.step
            progress = Progress(label, self.total, "steps", done=first, start_up=START_UP)
            while self.done.step < self.total and not self.done.overfitted:
                number = self.done.step + 1 - first
                result, lr = self.step()
                if self.ends_epoch or number in (START_UP, RATED) or len(self.unread) == self.read_every:
                    self.read()
                self.watch.count_step(self.done, number)
                progress.advance(note=partial(_note, result.loss, lr))
                if number == RATED:
                    progress.say(f"{label}: about {duration(self.watch.left(self.done))} to go, validation apart")
                if self.ends_epoch:
                    for line in self.validate(lr):
                        progress.say(line)
                for line in self._save_or_stop(stop):
                    progress.say(line)
                progress.total = self.total
        progress.close()
        if settings.minutes is not None:
            print(
                f"{label}: {self.watch.length(self.done.step, settings.epochs)}, in {duration(self.done.seconds)}",
                flush=True,
            )
        self.save()  # what follows may take long and be killed as well
        if settings.keep == "last":
            update.remember_best()
            for row in self.history:
                row["best"] = row["epoch"] == self.history[-1]["epoch"]
        update.keep_best()
        return self.history

    @property
    def total(self) -> int:
        """Steps of the training, as far as known."""
        return self.watch.schedule.total

    @property
    def ends_epoch(self) -> bool:
        """Whether the newest step was the last of an epoch."""
        return self._ends_epoch(self.done.step)

    def step(self) -> tuple[StepResult, float]:
        """Make the next step; its result and its learning rate. The host does not wait for the device."""
        done, batch_size = self.done, self.settings.batch_size
        step, data_pass = done.step, done.step // self.steps_per_pass
        if self.order_of != data_pass:
            self.order, self.order_of = self.source.order(self.seed, data_pass), data_pass
        start = step % self.steps_per_pass * batch_size
        position = self.watch.schedule.at(step)
        lr = learning_rate(self.settings, position, self.watch.schedule.planned, self.warmup)
        generator = keyed_generator(self.seed, step, 1)  # 1: another stream than the order of pass number `step`
        indices, views = self.order[start : start + batch_size], None
        if self.step_on.needs_views:
            views = self.source.views(indices, keyed_generator(self.seed, step, 1))
        images, labels = self.source.batch(indices, generator, *([self.part.rows] if self.part.several else []))
        self.unread[step] = replace(done)
        batch = StepBatch(
            images, labels, generator, step=step, data_pass=data_pass, lr=lr, position=position, views=views
        )
        with rounded_convolutions():
            result = self.step_on(batch)
        measured = torch.stack([result.loss.double() * len(indices), result.clean, result.robust])
        self.sums += torch.where(self.step_on.update.guard.failed > 0, 0, measured)
        done.add(result.work, result.gradients, images=len(indices))
        return result, lr

    def read(self) -> None:
        """Wait for the device and take over the sums of the epoch.

        Raises
        ------
        UserError
            A loss or its gradient was not finite; the state before that step is saved.
        """
        failure = self.step_on.update.guard.failure()
        if failure is not None:
            self.done = self.unread[failure[0]]
        self.done.epoch_loss, self.done.epoch_clean, self.done.epoch_robust = self.sums.tolist()
        self.unread.clear()
        if failure is None:
            return
        self.save()
        step, loss = failure
        what = f"the loss is {loss}"
        if math.isfinite(loss):
            what += ", but its gradient is not finite,"
        raise UserError(
            f"{self.label}: {what} at step {step}; the weights before it are kept in "
            f"{self.state.path}. Lower lr, lengthen warmup_epochs or set clip_norm, then rerun"
        )

    def validate(self, lr: float) -> list[str]:
        """End an epoch: measure it where that is due, remember the best one, add its rows; lines about it."""
        settings, done = self.settings, self.done
        validation: Rows = [{"arch": ""}]
        epoch, best = -(-done.step // self.steps_per_epoch), False
        if done.step == self.total or epoch % self.validation.every_epochs == 0:
            validation = self._measured()
            kinds = ("clean", "robust") if self.plan.loss == "plain" else ("robust", "clean")
            first, second = (sum(row[f"val_{kind}_acc"] for row in validation) / len(validation) for kind in kinds)
            score = first + 1e-3 * second
            if best := score > done.best_score:
                done.best_score = score
                self.step_on.update.remember_best()
                for row in self.history:
                    row["best"] = False
        self.watch.count(done)
        types = {"dtype": self.step_on.dtype, "attack_dtype": self.step_on.attacker.dtype}
        common = {"phase": self.label, "epoch": epoch, "lr": lr, "best": best, "seed": self.seed}
        common["planned_steps"] = self.watch.schedule.planned
        self.history.extend(epoch_rows(done, validation, types=types, **common))
        done.begin_epoch()
        self.sums.zero_()
        lines = [summary(self.label, self.history)]
        warning = overfitting(self.history, self.validation, settings.attack)
        if warning:
            lines.append(f"{self.label}: {warning}")
            done.overfitted = self.validation.watch(settings.attack) == "stop"
        return lines

    def save(self) -> None:
        """Save the state; every process waits until it is on disk."""
        self.watch.count(self.done)
        if self.ranks.first:
            facts = {"done": vars(self.done), "schedule": vars(self.watch.schedule), "history": self.history}
            self.state.save(self.step_on.tensors(), {**facts, "processes": self.ranks.world})
        self.ranks.all_reduce_max(0)  # barrier: wait until rank 0 has saved
        self.time_limit.saved()
        self.watch.schedule.saving = self.watch.count(self.done)
        self.saved_at = self.clock()

    # --- how a training goes on and stops ----------------------------------------------------------------------

    def _resume(self) -> None:
        """Take over the newest state, where there is one, on all processes."""
        loaded = self.state.load() if self.ranks.first else None
        if loaded is not None:
            self.step_on.load(loaded[0])
        facts = self.ranks.from_first(loaded and loaded[1])
        self.ranks.follow_first_(self.step_on.tensors().values())
        self.watch.start(facts and facts["schedule"])
        if facts is None:
            return
        self.done, self.history = Done(**facts["done"]), facts["history"]
        sums = (self.done.epoch_loss, self.done.epoch_clean, self.done.epoch_robust)
        self.sums.copy_(torch.tensor(sums, dtype=torch.float64))
        print(f"resumed after step {self.done.step} of {self.total}", flush=True)
        before = facts.get("processes", 1)
        if before != self.ranks.world:
            print(f"{before} processes before, {self.ranks.world} now: results differ in rounding")

    def _ends_epoch(self, step: int) -> bool:
        """Whether so many steps end an epoch."""
        return step % self.steps_per_epoch == 0 or step == self.total

    def _save_or_stop(self, stop: StopFlag) -> list[str]:
        """Save the state where it is due; save and stop at a signal, for a successor, or at the end of the time.

        Before that, set the number of steps anew where that is due; lines about it.
        """
        self.time_limit.step(ends_epoch=self.ends_epoch)
        late = self.clock() - self.saved_at > 60 * self.save_every_minutes
        ends = self.time_limit.is_short(ends_epoch=self._ends_epoch(self.done.step + 1))
        speed = self.watch.is_due(self.done, ends_epoch=self.ends_epoch)
        signalled, handover, short, due, estimate = self.ranks.all_reduce_max(
            stop.signal or 0, self.state.handover_asked(), ends, late, speed
        )
        reason = signal.Signals(signalled).name if signalled else "a successor" if handover else ""
        reason = reason or ("the end of the job's time" if short else "")
        stops = reason and self.done.step < self.total and not self.done.overfitted
        lines = []
        if stops or due or estimate:
            self.read()
        if estimate and not stops and self.watch.estimate(self.done, validate=self._measured):
            self.time_limit.step(ends_epoch=True)  # it may have validated
            length = self.watch.length(self.total, self.settings.epochs)
            lines = [f"{self.label}: {length} at {self.watch.schedule.step_seconds:.3g} s a step"]
        if stops or due or lines:
            self.save()
        if stops:
            raise Interrupted(
                f"{self.label}: stopped by {reason} after step {self.done.step}; the same command continues"
            )
        return lines

    # --- how long a training takes -----------------------------------------------------------------------------

    def _measured(self) -> Rows:
        """Rows of a validation of the averaged weights; how long it takes is kept."""
        self.watch.count(self.done)
        with self.step_on.update.averaged():
            rows = self.measure(self.net)
        self.watch.schedule.validation = self.watch.count(self.done)
        return rows

    def _draw(self, seed: int, step: int, _data_pass: int) -> list[Drawn]:
        """A step's subnets where choices open with the planned schedule: in the pass of its position there."""
        return self.plan.draw(seed, step, int(self.watch.schedule.at(step) // self.steps_per_pass))


@contextmanager
def rounded_convolutions() -> Iterator[None]:
    """Let a GPU's convolutions round their inputs (TF32), as PyTorch does by default; measurements do not."""
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = kept


def _note(loss: Tensor, lr: float) -> str:
    """The newest step in a few words; the host waits for the device."""
    return f"loss {float(loss):.3f} · lr {lr:.4f}"
