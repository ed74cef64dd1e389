"""The tensors of a training and one step on them: forward, attack, backward, update, average."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from proard.attacks import pgd, take_steps
from proard.config import Phase, TrainControl, TrainTeacher
from proard.kernels import CapturedSteps
from proard.losses import INNER_OBJECTIVES, Batch, mix_logits
from proard.nets import Supernet
from proard.nets.view import Statistics, SubnetView
from proard.training.guard import Guard, flat
from proard.training.plan import Drawn, Plan
from proard.training.sync import gradient_sync


class Trainer:
    """Weights, momentum and averages of a training, and one step on them.

    Parameters
    ----------
    net : Supernet
        Changed in place by `step`.
    settings : TrainTeacher, TrainControl or Phase
        Optimisation and attack.
    plan : Plan
        Subnets and objectives of every step.
    eps : float
        Radius of the threat model in pixel units.
    teacher : callable, optional
        Frozen teacher: images to logits.
    seed : int
        Seed of the plan's draws.
    """

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
        captured = settings.attack.graph == "auto"
        self.take_steps = CapturedSteps(take_steps, batch_size=settings.batch_size) if captured else take_steps
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
        self.guard, self.sync = Guard(net.mean.device), gradient_sync(net)
        self.optimizer.found_inf = self.guard.failed
        self.statistics = [buffer for name, buffer in net.named_buffers() if "running" in name]
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.best = {name: value.clone() for name, value in self.average.items()}

    # --- one step ----------------------------------------------------------------------------------------------

    def step(
        self, images: Tensor, labels: Tensor, step: int, data_pass: int, lr: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """One optimizer step; a loss that is not finite leaves everything as it was, in this step and all that follow.

        Returns the mean loss, the mean number of correct clean and adversarial images (training mode), all of shape ()
        and on the device, and the forward-equivalents spent per image. The host never waits for the device; whether
        a loss was not finite stands in `guard`.
        """
        drawn = self.plan.draw(self.seed, step, data_pass)
        torch._foreach_zero_([parameter.grad for parameter in self.parameters.values()])
        statistics = flat(self.statistics)
        frozen = None
        if self.teacher is not None:
            with torch.no_grad():
                frozen = self.teacher(images)
        target, losses = frozen, []
        clean_right = adv_right = torch.zeros((), dtype=torch.float64, device=images.device)
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
            clean_right = clean_right + _correct(batch.clean, labels) / len(drawn)
            adv_right = adv_right + _correct(batch.adv, labels) / len(drawn)
            work += spent
            view.scatter_gradients()
        mean_loss = torch.stack(losses).mean()
        if self.sync is not None:
            specs = [self.net.space.spec(subnet.arch) for subnet in drawn]
            mean_loss, clean_right, adv_right = self.sync(specs, torch.stack([mean_loss, clean_right, adv_right]))
        self.guard.watch(mean_loss, step)
        self._update(lr, step)
        self.guard.restore_(self.statistics, statistics)
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
        if objective.needs_clean or record is not None or subnet.guides or objective.inner == "kl_clean":
            with torch.set_grad_enabled(objective.needs_clean), self._autocast():
                clean = view(images, record=record, update_running=True).float()
            work += 3 if objective.needs_clean else 1
        if objective.inner is None:
            return Batch(labels, clean=clean, adv=clean), work
        known = Batch(labels, clean=None if clean is None else clean.detach(), teacher=target)
        inner = INNER_OBJECTIVES[objective.inner](known)
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
            steps=self.take_steps,
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
        average, weight = list(self.average.values()), self.guard.alive * (1 - decay)
        with torch.no_grad():
            torch._foreach_lerp_(average, list(self.parameters.values()), [weight.to(average[0].dtype)] * len(average))

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


def _correct(logits: Tensor | None, labels: Tensor) -> Tensor | float:
    """Number of correctly classified images, float64 of shape (); 0 where nothing was computed."""
    return 0.0 if logits is None else (logits.detach().argmax(1) == labels).sum(dtype=torch.float64)
