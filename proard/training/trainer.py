"""The tensors of a training and one step on them: forward, attack, backward, update, average."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import compress
from operator import not_

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.attacks import pgd, take_steps
from proard.config import Phase, TrainControl, TrainTeacher
from proard.data import Views
from proard.kernels import CapturedSteps
from proard.losses import INNER_OBJECTIVES, Batch, kl_to_teacher
from proard.nets import Supernet
from proard.nets.view import Statistics, SubnetView
from proard.space import Arch
from proard.training.attentive import settle
from proard.training.guard import Guard, flat
from proard.training.guidance import Guidance, guided, passed, side_by_side
from proard.training.inner import Inner
from proard.training.perturbation import perturbed
from proard.training.plan import Drawn, Plan
from proard.training.sync import gradient_sync
from proard.training.teacher_table import TeacherTable


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
    control : callable, optional
        Plainly trained network: images to logits.
    inner : Inner, optional
        What the attacks of a step start from and how many steps they take; by default each attacks for itself.
    table : TeacherTable, optional
        Where the teacher's logits are kept.
    """

    def __init__(
        self,
        net: Supernet,
        settings: TrainTeacher | TrainControl | Phase,
        plan: Plan,
        eps: float,
        teacher: Callable[[Tensor], Tensor] | None,
        seed: int,
        control: Callable[[Tensor], Tensor] | None = None,
        *,
        inner: Inner | None = None,
        table: TeacherTable | None = None,
    ) -> None:
        self.net, self.settings, self.plan, self.eps, self.teacher, self.seed = net, settings, plan, eps, teacher, seed
        self.inner, self.table = inner or Inner(settings.attack, eps=eps), table
        self.control, self.total_steps = control, 1
        self.attack_dtype = getattr(torch, settings.attack.dtype)
        self.train_dtype = getattr(torch, settings.dtype)
        captured = settings.attack.graph == "auto"
        self.take_steps = CapturedSteps(take_steps, batch_size=settings.batch_size) if captured else take_steps
        self.parameters = dict(net.named_parameters())
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        spared = [p.ndim == 1 or ".transforms." in name for name, p in self.parameters.items()]
        plain = list(compress(self.parameters.values(), spared))  # norms, biases, kernel transforms (identity at first)
        decayed = list(compress(self.parameters.values(), map(not_, spared)))
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
        memory = {} if plan.memory is None else plan.memory(net.space.settings.classes)
        self.memory = {name: tensor.to(net.mean.device) for name, tensor in memory.items()}
        self.guard, self.sync = Guard(net.mean.device), gradient_sync(net)
        self.optimizer.found_inf = self.guard.failed
        self.statistics = [buffer for name, buffer in net.named_buffers() if "running" in name]
        self.statistics += self.memory.values()
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.best = {name: value.clone() for name, value in self.average.items()}

    # --- one step ----------------------------------------------------------------------------------------------

    @property
    def needs_views(self) -> bool:
        """Whether `step` must be told which views its images are."""
        return self.table is not None or self.inner.carried is not None

    def step(
        self,
        images: Tensor,
        labels: Tensor,
        step: int,
        data_pass: int,
        lr: float,
        generator: torch.Generator,
        views: Views | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """One optimizer step; a loss that is not finite leaves everything as it was, in this step and all that follow.

        Returns the mean loss, the mean number of correct clean and adversarial images (training mode), all of shape ()
        and on the device, and the forward-equivalents spent per image. The host never waits for the device; whether
        a loss was not finite stands in `guard`.
        """
        drawn = self.plan.draw(self.seed, step, data_pass)
        torch._foreach_zero_([parameter.grad for parameter in self.parameters.values()])
        statistics = flat(self.statistics)
        asked = any(subnet.objective.needs_target or subnet.rivals for subnet in drawn)
        frozen, work = self._ask_teacher(images, views) if asked else (None, 0)
        losses, clean_right = [], torch.zeros((), dtype=torch.float64, device=images.device)
        adv_right = clean_right
        guidance = Guidance(frozen, self.teacher, self.control, min(step / self.total_steps, 1.0), data_pass)
        drawn, scored = settle(drawn, lambda arch: self._score(arch, images, labels, frozen))
        drawn = self.inner.begin(drawn, self.net.space, step=step, data_pass=data_pass, views=views)
        work += scored
        for subnet in drawn:
            view = SubnetView(self.net, subnet.arch)
            batch, spent = self._forward(view, subnet, images, labels, guidance, generator)
            loss, more = self._backward(view, subnet, batch, len(drawn))
            losses.append(loss.detach())
            if subnet.guides:
                guide = partial(view, frozen=True)
                guidance = guidance.led_by(batch.clean.detach(), guide, frozen_weight=self.plan.frozen_weight)
            clean_right = clean_right + _correct(batch.clean, labels) / len(drawn)
            adv_right = adv_right + _correct(batch.adv, labels) / len(drawn)
            work += spent + more
            view.scatter_gradients()
        mean_loss = torch.stack(losses).mean()
        if self.sync is not None:
            specs = [self.net.space.spec(subnet.arch) for subnet in drawn]
            mean_loss, clean_right, adv_right = self.sync(specs, torch.stack([mean_loss, clean_right, adv_right]))
        self.guard.watch(mean_loss, step)
        self._update(lr, step)
        self.guard.restore_(self.statistics, statistics)
        return mean_loss, clean_right, adv_right, work

    @torch.no_grad()
    def _ask_teacher(self, images: Tensor, views: Views | None) -> tuple[Tensor | None, float]:
        """The frozen teacher's logits where there is one, and the forward-equivalents per image that they took."""
        if self.teacher is None:
            return None, 0
        if self.table is None:
            return self.teacher(images), 1
        logits, computed = self.table(self.teacher, images, views)
        return logits, computed / len(images)

    def _forward(
        self,
        view: SubnetView,
        subnet: Drawn,
        images: Tensor,
        labels: Tensor,
        guidance: Guidance,
        generator: torch.Generator,
    ) -> tuple[Batch, int]:
        """Clean pass, attack on this very subnet, adversarial pass; with the forward-equivalents they took."""
        attack, objective = self.settings.attack, subnet.objective
        record: Statistics | None = {} if attack.bn_mode == "clean_batch" and objective.inner else None
        clean, work, needs = None, 0, objective.needs
        source = images.detach().requires_grad_() if "teacher_gradient" in needs else images
        if objective.needs_clean or record is not None or subnet.guides or objective.inner == "kl_clean":
            with torch.set_grad_enabled(objective.needs_clean), self._autocast():
                clean = view(source, record=record, update_running=True).float()
            work += 3 if objective.needs_clean else 1
        batch = Batch(labels, clean=clean, teacher=guidance.target, images=source, memory=self.memory)
        if objective.inner is None:
            batch, asked = guided(replace(batch, adv=clean), needs, guidance)
            batch, more = passed(batch, needs - {"clean"}, self._train_pass(view), reach=1.0)
            return batch, work + asked + more
        known = replace(batch, clean=None if clean is None else clean.detach())
        inner = INNER_OBJECTIVES[objective.inner](known)
        if attack.bn_mode == "batch":

            def predict(x: Tensor) -> Tensor:
                return view(x, frozen=True)

        else:
            predict = view.folded(record if record is not None else view.running_statistics(), dtype=self.attack_dtype)
        options = self.inner.options(images)
        if objective.inner == "kl_teacher_adv":  # every step asks the teacher as well
            predict, work = side_by_side(predict, guidance.teacher), work + 2 * options["num_steps"]
        adversarial = pgd(predict, inner, images, **options, generator=generator, steps=self.take_steps)
        self.inner.keep(subnet, images, adversarial)
        adversarial.requires_grad_("teacher_gradient_adv" in needs)
        with self._autocast():
            adv = view(adversarial, update_running=clean is None).float()
        batch, asked = guided(replace(batch, adv=adv, adversarial=adversarial), needs, guidance)
        needs, reach = needs - {"clean", "adv"}, self._option("helper_reach")
        batch, more = passed(batch, needs, self._train_pass(view), reach=reach)
        return batch, work + asked + more + 2 * options["num_steps"] + 3

    def _backward(self, view: SubnetView, subnet: Drawn, batch: Batch, count: int) -> tuple[Tensor, int]:
        """The loss and its gradients / `count`, at perturbed weights where asked for, with the extra work of that."""
        objective, options, gamma = subnet.objective, subnet.options, self._option("awp_gamma")
        if objective.remember is not None:
            for name, value in objective.remember(batch, **options).items():
                self.memory[name].copy_(value)
        loss = objective.loss(batch, **options)
        if not gamma or batch.progress * self.settings.epochs < self._option("awp_warmup_epochs"):
            (loss / count).backward()
            return loss, 0
        weights = [leaf for leaves in view.leaves.values() for leaf in leaves if leaf.ndim > 1] + [view.head_weight]
        with perturbed(weights, loss, gamma=gamma):
            predict, reach = self._train_pass(view), self._option("helper_reach")
            batch, more = passed(batch, objective.needs, predict, reach=reach)
            loss = objective.loss(batch, **options)
            (loss / count).backward()
        return loss, more

    def _option(self, name: str) -> float:
        """A loss setting; 0 in a plain training, which has none."""
        return getattr(self.settings, name, 0.0)

    def _train_pass(self, view: SubnetView) -> Callable[[Tensor], Tensor]:
        """The subnet in training mode; running statistics stay."""

        def predict(images: Tensor) -> Tensor:
            with self._autocast():
                return view(images).float()

        return predict

    def _score(self, arch: Arch, images: Tensor, labels: Tensor, target: Tensor | None) -> Tensor:
        """A subnet's loss on clean images: divergence from the frozen teacher, or cross-entropy without one."""
        with self._autocast():
            logits = SubnetView(self.net, arch)(images, frozen=True).float()
        return F.cross_entropy(logits, labels) if target is None else kl_to_teacher(logits, target).mean()

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
        self.inner.commit(self.guard.failed)
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
        groups["memory"] = self.memory
        groups["inner"] = self.inner.tensors()
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
