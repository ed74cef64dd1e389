"""The training loop. One function trains teacher, control and phases; they differ in their `Plan`.

Every random choice is keyed by (seed, step) or (seed, epoch), so that a resumed training repeats the uninterrupted one
bit for bit on CPU at equal threads without any stored generator.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from proard.attacks import pgd
from proard.config import Phase, TrainControl, TrainTeacher, UserError
from proard.data import keyed_generator
from proard.losses import Batch, mix_logits
from proard.nets import Supernet
from proard.nets.view import Statistics, SubnetView
from proard.progress import Progress, duration
from proard.training.plan import Drawn, Plan
from proard.training.state import Interrupted, ResumeState, stop_on_signal

Rows = list[dict[str, Any]]


class ImageSource(Protocol):
    """Training images: their number, the order of an epoch, and augmented batches in [0, 1]."""

    def __len__(self) -> int:
        """Number of images."""

    def order(self, seed: int, epoch: int) -> Tensor:
        """Indices of all images in the order of this pass."""

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented images of shape (batch, channels, height, width) and their labels."""


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
    seconds: float = 0.0
    best_score: float = -math.inf


def learning_rate(settings: TrainTeacher | TrainControl | Phase, step: int, total: int, warmup: int) -> float:
    """Linear warm-up to `lr`, then a cosine to zero."""
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def fit(
    net: Supernet,
    *,
    label: str,
    plan: Plan,
    settings: TrainTeacher | TrainControl | Phase,
    eps: float,
    source: ImageSource,
    teacher: Callable[[Tensor], Tensor] | None,
    validate: Callable[[Supernet], Rows],
    state: ResumeState,
    seed: int,
) -> Rows:
    """Train `net` by `plan` and leave in it the averaged weights of its best validated epoch.

    Parameters
    ----------
    net : Supernet
        Changed in place.
    plan : Plan
        Subnets and objectives of every step.
    settings : TrainTeacher, TrainControl or Phase
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

    Returns
    -------
    list of dict
        Rows of the HISTORY table.

    Raises
    ------
    UserError
        A loss is not finite: nothing has moved, the last good state is kept.
    Interrupted
        SIGTERM, SIGINT or a successor asked to stop: the state is saved.
    """
    trainer = _Trainer(net, settings, plan, eps, teacher, seed)
    steps_per_pass = max(len(source) // settings.batch_size, 1)
    steps_per_epoch = steps_per_pass * plan.passes_per_epoch
    total, warmup = (round(epochs * steps_per_epoch) for epochs in (settings.epochs, settings.warmup_epochs))
    total = max(total, 1)
    history: Rows = []
    done = Progressed()
    loaded = state.load()
    if loaded is not None:
        tensors, facts = loaded
        trainer.load(tensors)
        done, history = Progressed(**facts["done"]), facts["history"]
        print(f"resumed after step {done.step} of {total}", flush=True)

    def save() -> None:
        state.save(trainer.tensors(), {"done": vars(done), "history": history})

    progress = Progress(label, total, "steps", done=done.step)
    first_step, started, saved = done.step, time.monotonic(), time.monotonic()
    order, order_of = torch.empty(0), -1
    with stop_on_signal() as stop:
        while done.step < total:
            step_started = time.monotonic()
            step, data_pass = done.step, done.step // steps_per_pass
            if order_of != data_pass:
                order, order_of = source.order(seed, data_pass), data_pass
            start = step % steps_per_pass * settings.batch_size
            lr = learning_rate(settings, step, total, warmup)
            generator = keyed_generator(seed, step, 1)  # 1: another stream than the order of pass number `step`
            images, labels = source.batch(order[start : start + settings.batch_size], generator)
            loss, clean, robust, work = trainer.step(images, labels, step, data_pass, lr, generator)
            if not math.isfinite(loss):
                save()
                raise UserError(
                    f"{label}: the loss is {loss} at step {step}; the weights before it are kept in {state.path}. "
                    "Lower lr, lengthen warmup_epochs or set clip_norm, then rerun"
                )
            done.step += 1
            done.epoch_loss += loss * len(labels)
            done.epoch_clean += clean
            done.epoch_robust += robust
            done.epoch_images += len(labels)
            done.images += len(labels)
            done.forward_equivalents += work * len(labels)
            done.seconds += time.monotonic() - step_started
            progress.advance(note=f"loss {loss:.3f} · lr {lr:.4f}")
            if done.step == first_step + 5:
                per_step = (time.monotonic() - started) / 5
                progress.say(f"{label}: about {duration(per_step * (total - done.step))} for {total} steps, validation apart")
            if done.step % steps_per_epoch == 0 or done.step == total:
                epoch = -(-done.step // steps_per_epoch)
                _end_epoch(trainer, history, done, label, epoch, lr, done.step == total, validate, seed)
                progress.say(_summary(label, history))
            asked = stop.signal.name if stop.signal else "a successor" if state.handover_asked() else ""
            if asked and done.step < total:
                save()
                raise Interrupted(f"{label}: stopped by {asked} after step {done.step}; the same command continues there")
            if time.monotonic() - saved > 60 * settings.save_every_minutes:
                save()
                saved = time.monotonic()
    progress.close()
    trainer.keep_best()
    return history


def _end_epoch(
    trainer: _Trainer,
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
        "loss": done.epoch_loss / count,
        "train_clean_acc": done.epoch_clean / count,
        "train_robust_acc": done.epoch_robust / count,
        "images": done.images,
        "forward_equivalents": done.forward_equivalents,
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


class _Trainer:
    """Tensors of a training and one step on them."""

    def __init__(
        self,
        net: Supernet,
        settings: TrainTeacher | TrainControl | Phase,
        plan: Plan,
        eps: float,
        teacher: Callable[[Tensor], Tensor] | None,
        seed: int,
    ) -> None:
        self.net, self.settings, self.plan, self.eps, self.teacher, self.seed = net, settings, plan, eps, teacher, seed
        self.attack_dtype = getattr(torch, settings.attack.dtype)
        self.train_dtype = getattr(torch, settings.dtype)
        self.parameters = dict(net.named_parameters())
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        decayed = [p for p in self.parameters.values() if p.ndim > 1]
        plain = [p for p in self.parameters.values() if p.ndim == 1]  # norms and biases
        self.optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
            fused=True,
        )
        if settings.momentum > 0:  # created up front: fused SGD fails when a first gradient comes later than others
            for parameter in self.parameters.values():
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.statistics = [buffer for name, buffer in net.named_buffers() if "running" in name]
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.best = {name: value.clone() for name, value in self.average.items()}

    # --- one step ----------------------------------------------------------------------------------------------

    def step(
        self, images: Tensor, labels: Tensor, step: int, data_pass: int, lr: float, generator: torch.Generator
    ) -> tuple[float, float, float, int]:
        """One optimizer step; a loss that is not finite leaves everything as it was.

        Returns the mean loss, the mean number of correct clean and adversarial images (training mode), and the
        forward-equivalents spent per image.
        """
        drawn = self.plan.draw(self.seed, step, data_pass)
        torch._foreach_zero_([parameter.grad for parameter in self.parameters.values()])
        statistics = [buffer.clone() for buffer in self.statistics]
        frozen = None
        if self.teacher is not None:
            with torch.no_grad():
                frozen = self.teacher(images)
        target, losses, clean_right, adv_right = frozen, [], 0.0, 0.0
        work = int(frozen is not None)
        for subnet in drawn:
            view = SubnetView(self.net, subnet.arch)
            batch, spent = self._forward(view, subnet, images, labels, target, generator)
            loss = subnet.objective.loss(batch, **subnet.options)
            (loss / len(drawn)).backward()
            losses.append(loss.detach())
            if subnet.guides:
                guide = batch.clean.detach()
                target = guide if frozen is None else mix_logits(frozen, guide, first_weight=self.plan.frozen_weight)
            clean_right += _correct(batch.clean, labels) / len(drawn)
            adv_right += _correct(batch.adv, labels) / len(drawn)
            work += spent
            if math.isfinite(float(loss.detach())):
                view.scatter_gradients()
        mean_loss = float(torch.stack(losses).mean())
        if math.isfinite(mean_loss):
            self._update(lr, step)
        else:
            torch._foreach_copy_(self.statistics, statistics)
        return mean_loss, clean_right, adv_right, work

    def _forward(
        self,
        view: SubnetView,
        subnet: Drawn,
        images: Tensor,
        labels: Tensor,
        target: Tensor | None,
        generator: torch.Generator,
    ) -> tuple[Batch, int]:
        """Clean pass, attack on this very subnet, adversarial pass; with the forward-equivalents they took."""
        attack, objective = self.settings.attack, subnet.objective
        record: Statistics | None = {} if attack.bn_mode == "clean_batch" and objective.inner else None
        clean, work = None, 0
        if objective.needs_clean or record is not None or subnet.guides:
            with torch.set_grad_enabled(objective.needs_clean), self._autocast():
                clean = view(images, record=record, update_running=True).float()
            work += 3 if objective.needs_clean else 1
        if objective.inner is None:
            return Batch(labels, clean=clean, adv=clean), work
        inner = objective.inner(Batch(labels, clean=None if clean is None else clean.detach(), teacher=target))
        if attack.bn_mode == "batch":

            def predict(x: Tensor) -> Tensor:
                return view(x, frozen=True)

        else:
            predict = view.folded(record if record is not None else view.running_statistics(), dtype=self.attack_dtype)
        adversarial = pgd(
            predict,
            inner,
            images,
            eps=self.eps,
            step_size=attack.step_size,
            num_steps=attack.num_steps,
            start=attack.start,
            generator=generator,
        )
        with self._autocast():
            adv = view(adversarial, update_running=clean is None).float()
        return Batch(labels, clean=clean, teacher=target, adv=adv), work + 2 * attack.num_steps + 3

    def _autocast(self) -> torch.autocast:
        """Mixed precision of the training passes, where asked for."""
        enabled = self.train_dtype is not torch.float32
        return torch.autocast(self.net.mean.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _update(self, lr: float, step: int) -> None:
        """Optimizer step, then the exponential average of the weights with its warm-up."""
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.settings.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        decay = min(self.settings.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)

    # --- weights -----------------------------------------------------------------------------------------------

    def averaged(self) -> _Swapped:
        """Context in which the network holds the averaged weights."""
        return _Swapped(self.parameters, self.average)

    def remember_best(self) -> None:
        """Keep a copy of the averaged weights."""
        for name, value in self.average.items():
            self.best[name].copy_(value)

    @torch.no_grad()
    def keep_best(self) -> None:
        """Put the best averaged weights into the network and drop the gradients."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.best[name])
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resumed training needs, by name."""
        momentum = {
            name: self.optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in self.parameters.items()
            if "momentum_buffer" in self.optimizer.state[parameter]
        }
        groups = {"net": self.net.state_dict(), "average": self.average, "best": self.best, "momentum": momentum}
        return {f"{group}.{name}": tensor for group, members in groups.items() for name, tensor in members.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` returned."""
        for key, tensor in self.tensors().items():
            tensor.copy_(tensors[key])


class _Swapped:
    """Exchanges parameters for other values and puts them back on exit."""

    def __init__(self, parameters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        self.parameters, self.values = parameters, values

    def __enter__(self) -> None:
        self.kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._write(self.values)

    def __exit__(self, *exception: object) -> None:
        self._write(self.kept)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


def _correct(logits: Tensor | None, labels: Tensor) -> float:
    """Number of correctly classified images; 0 where nothing was computed."""
    return 0.0 if logits is None else float((logits.detach().argmax(1) == labels).sum())
