"""The training loop. One function trains teacher, control and phases; they differ in their `Plan`.

Every random choice is keyed by (seed, step) or (seed, epoch), so that a resumed training repeats the uninterrupted one
bit for bit on CPU at equal threads without any stored generator.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from proard.config import Phase, Student, TrainControl, TrainTeacher, UserError
from proard.data import Views, keyed_generator
from proard.nets import Supernet
from proard.progress import Progress, duration
from proard.training.budget import Budget
from proard.training.inner import CarriedPerturbations, Inner
from proard.training.overfitting import overfitting
from proard.training.plan import Plan
from proard.training.ranks import Ranks
from proard.training.state import Interrupted, ResumeState, stop_on_signal
from proard.training.teacher_table import TeacherTable
from proard.training.trainer import Trainer

Rows = list[dict[str, Any]]
START_UP, RATED = 5, 10  # steps that hold start-up; the last of those from which the remaining time is estimated
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


@dataclass
class Progressed:
    """How far a training is; everything but tensors that a resumed process needs."""

    step: int = 0
    epoch_loss: float = 0.0
    epoch_clean: float = 0.0
    epoch_robust: float = 0.0
    epoch_images: int = 0
    images: int = 0
    forward_equivalents: int = 0
    work_macs: float = 0.0
    weight_gradients: int = 0
    gradients: int = 0
    seconds: float = 0.0
    best_score: float = -math.inf
    overfitted: bool = False


def learning_rate(settings: TrainTeacher | TrainControl | Phase | Student, step: int, total: int, warmup: int) -> float:
    """Linear warm-up to `lr`, then a cosine to zero, or what a student's `schedule` says."""
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    schedule = getattr(settings, "schedule", "cosine")
    if schedule == "constant":
        return settings.lr
    if schedule == "steps":  # a tenth at half, and again at three quarters: epochs 100 and 150 of 200
        return settings.lr * 0.1 ** sum(step >= share * total for share in (0.5, 0.75))
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def fit(
    net: Supernet,
    *,
    label: str,
    plan: Plan,
    settings: TrainTeacher | TrainControl | Phase | Student,
    eps: float,
    source: ImageSource,
    teacher: Callable[[Tensor], Tensor] | None,
    validate: Callable[[Supernet], Rows],
    state: ResumeState,
    seed: int,
    control: Callable[[Tensor], Tensor] | None = None,
    norm: str = "linf",
    ranks: Ranks | None = None,
    budget: Budget | None = None,
) -> Rows:
    """Train `net` by `plan` and leave in it the averaged weights of its best validated epoch.

    Parameters
    ----------
    net : Supernet
        Changed in place.
    plan : Plan
        Subnets and objectives of every step.
    settings : TrainTeacher, TrainControl, Phase or Student
        Optimisation, augmentation and attack.
    eps : float
        Radius of the threat model in pixel units.
    source : ImageSource
        Training images on the network's device.
    teacher : callable, optional
        Frozen teacher: images to logits.
    validate : callable
        Measures subnets of the averaged network on `val`: rows with `arch`, `macs`, `val_clean_acc`, `val_robust_acc`,
        `val_num_images`. Epochs compare by the mean of `val_robust_acc`, then of `val_clean_acc`.
    state : ResumeState
        Where an interrupted training continues; the caller removes it after writing its output.
    seed : int
        Seed of order, augmentation, sampling and attack starts.
    control : callable, optional
        Plainly trained network, where the plan's objectives ask it: images to logits.
    norm : {'linf', 'l2'}
        Norm of the threat model.
    ranks : Ranks, optional
        The processes that train together; each calls this with the same arguments.
    budget : Budget, optional
        The time that there is; without one, no limit.

    Returns
    -------
    list of dict
        Rows of the HISTORY table.

    Raises
    ------
    UserError
        A loss or its gradient is not finite: nothing has moved, the last good state is kept. `teacher_logits` under a
        loss that would not read them.
    Interrupted
        A signal, a successor or the end of the job's time asked to stop: the state is saved.
    """
    ranks, budget = ranks or Ranks(), budget or Budget()
    count = min(settings.batch_size, len(source))
    share = ranks.share(count)
    steps_per_pass = max(len(source) // settings.batch_size, 1)
    steps_per_epoch = steps_per_pass * plan.passes_per_epoch
    total, warmup = (round(epochs * steps_per_epoch) for epochs in (settings.epochs, settings.warmup_epochs))
    total = max(total, 1)
    inner = Inner(settings.attack, eps=eps, norm=norm, total_steps=total, share=share)
    if settings.attack.carry_passes is not None:
        place = {"eps": eps, "norm": norm, "seed": seed, "device": net.mean.device}
        inner.carried = CarriedPerturbations(settings.attack, source.padded_shape, **place)
    tables = {}
    for key, name in (("teacher_logits", "table"), ("teacher_gradients", "gradient_table")):
        dtype = getattr(settings, key, None)
        if dtype is not None:
            if name == "table" and not plan.reads_target:
                raise UserError(f"teacher_logits keeps logits at clean images; loss {settings.loss} reads none there")
            place = {"padding": settings.augment.crop_padding, "flip": settings.augment.flip, "device": net.mean.device}
            shape = net.space.settings
            numbers = shape.classes if name == "table" else shape.image_channels * shape.image_size**2
            images = source.padded_shape[0]
            tables[name] = TeacherTable(images, classes=numbers, dtype=getattr(torch, dtype), key=key, **place)
            print(f"{label}: {key} take {tables[name].bytes / 2**20:.1f} MiB on {net.mean.device}", flush=True)
    trainer = Trainer(net, settings, plan, eps, teacher, seed, control, inner=inner, share=share, **tables)
    trainer.total_steps = total
    history: Rows = []
    done = Progressed()
    loaded = state.load() if ranks.first else None
    if loaded is not None:
        trainer.load(loaded[0])
    facts = ranks.from_first(loaded and loaded[1])
    ranks.follow_first_(trainer.tensors().values())
    if facts is not None:
        done, history = Progressed(**facts["done"]), facts["history"]
        print(f"resumed after step {done.step} of {total}", flush=True)
        if facts.get("processes", 1) != ranks.world:
            print(f"{facts.get('processes', 1)} processes before, {ranks.world} now: results differ in rounding")

    sums = torch.tensor([done.epoch_loss, done.epoch_clean, done.epoch_robust], dtype=torch.float64)
    sums = sums.to(net.mean.device)
    unread: dict[int, Progressed] = {}  # what was done before each step whose loss the host has not seen

    def read() -> None:
        nonlocal done
        failure = trainer.guard.failure()
        if failure is not None:
            done = unread[failure[0]]
        done.epoch_loss, done.epoch_clean, done.epoch_robust = sums.tolist()
        unread.clear()
        if failure is not None:
            save()
            what = f"the loss is {failure[1]}"
            if math.isfinite(failure[1]):
                what += ", but its gradient is not finite,"
            raise UserError(
                f"{label}: {what} at step {failure[0]}; the weights before it are kept in "
                f"{state.path}. Lower lr, lengthen warmup_epochs or set clip_norm, then rerun"
            )

    def save() -> None:
        nonlocal saved
        if ranks.first:
            state.save(trainer.tensors(), {"done": vars(done), "history": history, "processes": ranks.world})
        ranks.agree(0)  # until it is on disk, none leaves
        budget.saved()
        saved = time.monotonic()

    progress = Progress(label, total, "steps", done=done.step, start_up=START_UP)
    first_step, rated_seconds, saved = done.step, 0.0, time.monotonic()
    order, order_of = torch.empty(0), -1
    with stop_on_signal() as stop:
        while done.step < total and not done.overfitted:
            step_started = time.monotonic()
            step, data_pass = done.step, done.step // steps_per_pass
            if order_of != data_pass:
                order, order_of = source.order(seed, data_pass), data_pass
            start = step % steps_per_pass * settings.batch_size
            lr = learning_rate(settings, step, total, warmup)
            generator = keyed_generator(seed, step, 1)  # 1: another stream than the order of pass number `step`
            indices, views = order[start : start + settings.batch_size], None
            if trainer.needs_views:
                views = source.views(indices, keyed_generator(seed, step, 1))
            images, labels = source.batch(indices, generator, *([share.part] if share.several else []))
            unread[step] = replace(done)
            with rounded_convolutions():
                loss, clean, robust, work = trainer.step(images, labels, step, data_pass, lr, generator, views)
            measured = torch.stack([loss.double() * len(indices), clean, robust])
            sums += torch.where(trainer.guard.failed > 0, 0, measured)
            done.step += 1
            done.epoch_images += len(indices)
            done.images += len(indices)
            done.forward_equivalents += round(work.forwards * len(indices))
            done.work_macs += work.macs * len(indices)
            done.weight_gradients += round(work.weight_gradients * len(indices))
            done.gradients += trainer.gradients * len(indices)
            epoch_ends = done.step % steps_per_epoch == 0 or done.step == total
            number = done.step - first_step
            if epoch_ends or number in (START_UP, RATED) or len(unread) == READ_EVERY:
                read()
            step_seconds = time.monotonic() - step_started
            done.seconds += step_seconds
            progress.advance(note=partial(_note, loss, lr))
            rated_seconds += step_seconds if START_UP < number <= RATED else 0
            if number == RATED:
                per_step = rated_seconds / (RATED - START_UP)
                progress.say(f"{label}: about {duration(per_step * (total - done.step))} to go, validation apart")
            if epoch_ends:
                epoch = -(-done.step // steps_per_epoch)
                _end_epoch(trainer, history, done, label, epoch, lr, done.step == total, validate, seed)
                sums.zero_()
                progress.say(_summary(label, history))
                warning = overfitting(history, settings.validation, settings.attack)
                if warning:
                    progress.say(f"{label}: {warning}")
                    done.overfitted = settings.validation.watch(settings.attack) == "stop"
            budget.step(ends_epoch=epoch_ends)
            due = time.monotonic() - saved > 60 * settings.save_every_minutes
            short = budget.is_short(ends_epoch=(done.step + 1) % steps_per_epoch == 0 or done.step + 1 == total)
            signalled, handover, short, due = ranks.agree(stop.signal or 0, state.handover_asked(), short, due)
            asked = signal.Signals(signalled).name if signalled else "a successor" if handover else ""
            asked = asked or ("the end of the job's time" if short else "")
            stops = asked and done.step < total and not done.overfitted
            if stops or due:
                read()
                save()
            if stops:
                raise Interrupted(f"{label}: stopped by {asked} after step {done.step}; the same command continues")
    progress.close()
    save()  # what follows may take long and be killed as well
    if getattr(settings, "keep", "best") == "last":
        trainer.remember_best()
        for row in history:
            row["best"] = row["epoch"] == history[-1]["epoch"]
    trainer.keep_best()
    return history


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


def _end_epoch(
    trainer: Trainer,
    history: Rows,
    done: Progressed,
    label: str,
    epoch: int,
    lr: float,
    last: bool,
    validate: Callable[[Supernet], Rows],
    seed: int,
) -> None:
    """Validate where it is due, remember the best epoch, and add the epoch's rows."""
    validation: Rows = [{"arch": ""}]
    best = False
    started = time.monotonic()
    if last or epoch % trainer.settings.validation.every_epochs == 0:
        with trainer.averaged():
            validation = validate(trainer.net)
        robust, clean = (
            sum(row[f"val_{kind}_acc"] for row in validation) / len(validation) for kind in ("robust", "clean")
        )
        best = robust + 1e-3 * clean > done.best_score
        if best:
            done.best_score = robust + 1e-3 * clean
            trainer.remember_best()
            for row in history:
                row["best"] = False
    done.seconds += time.monotonic() - started
    count = max(done.epoch_images, 1)
    common = {
        "phase": label,
        "epoch": epoch,
        "step": done.step,
        "lr": lr,
        "dtype": str(trainer.train_dtype).removeprefix("torch."),
        "attack_dtype": str(trainer.attack_dtype).removeprefix("torch."),
        "loss": done.epoch_loss / count,
        "train_clean_acc": done.epoch_clean / count,
        "train_robust_acc": done.epoch_robust / count,
        "images": done.images,
        "forward_equivalents": done.forward_equivalents,
        "work_macs": done.work_macs,
        "weight_gradients": done.weight_gradients,
        "gradients": done.gradients,
        "seconds": done.seconds,
        "best": best,
        "seed": seed,
    }
    history.extend({**common, **row} for row in validation)
    done.epoch_loss = done.epoch_clean = done.epoch_robust = 0.0
    done.epoch_images = 0


def _summary(label: str, history: Rows) -> str:
    """One line on the newest epoch."""
    epoch = history[-1]["epoch"]
    rows = [row for row in history if row["epoch"] == epoch]
    text = f"{label} epoch {epoch}: loss {rows[0]['loss']:.4f}, {duration(rows[0]['seconds'])}"
    for row in rows:
        if row["arch"]:
            text += f"; {row['arch']} clean {row['val_clean_acc']:.1%} robust {row['val_robust_acc']:.1%}"
    return text + (" · best so far" if rows[0]["best"] else "")
