"""The tensors of a training and one step on them: forward, attack, backward, update, average."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.attacks import pgd, start_point, take_steps
from proard.config import Phase, Student, TrainControl, TrainTeacher, UserError
from proard.data import Views
from proard.kernels import CapturedSteps, computed_type
from proard.losses import INNER_OBJECTIVES, Batch, kl_to_teacher
from proard.nets import FixedNet, FixedView, Supernet
from proard.nets.view import Statistics, SubnetView
from proard.space import Arch, Work, one_pass
from proard.training.guard import Guard, flat
from proard.training.guidance import Guidance, guided, passed, side_by_side
from proard.training.inner import Inner
from proard.training.optimizer import make_optimizer, optimizer_tensors
from proard.training.perturbation import perturbed
from proard.training.plan import Drawn, Plan, pace, settle
from proard.training.ranks import Share
from proard.training.sync import GradientSync
from proard.training.teacher_table import TeacherTable


class Trainer:
    """Weights, momentum and averages of a training, and one step on them.

    Parameters
    ----------
    net : Supernet or FixedNet
        Changed in place by `step`.
    settings : TrainTeacher, TrainControl, Phase or Student
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
    table, gradient_table : TeacherTable, optional
        Where the teacher's logits and its input gradients are kept.
    share : Share, optional
        The part of every batch that this process is given; by default all of it.

    Notes
    -----
    Work is counted where it is done. A teacher or control without a `spec` costs no multiply-accumulates.
    """

    def __init__(
        self,
        net: Supernet | FixedNet,
        settings: TrainTeacher | TrainControl | Phase | Student,
        plan: Plan,
        eps: float,
        teacher: Callable[[Tensor], Tensor] | None,
        seed: int,
        control: Callable[[Tensor], Tensor] | None = None,
        *,
        inner: Inner | None = None,
        table: TeacherTable | None = None,
        gradient_table: TeacherTable | None = None,
        share: Share | None = None,
    ) -> None:
        self.share = share or Share()
        if self.share.several and isinstance(net, FixedNet) and net.norms():
            raise UserError(
                "batch norm over several processes is that of elastic networks; train this one in one process"
            )
        self.net, self.settings, self.plan, self.eps, self.teacher, self.seed = net, settings, plan, eps, teacher, seed
        self.inner = inner or Inner(settings.attack, eps=eps, share=self.share)
        self.table, self.gradient_table = table, gradient_table
        self.gradients = 0  # backward passes of one image in the newest step
        self.control, self.total_steps = control, 1
        self.teacher_price, self.control_price = _price(teacher), _price(control)
        self.attack_dtype, self.train_dtype = (
            getattr(torch, computed_type(name, net.mean.device)) for name in (settings.attack.dtype, settings.dtype)
        )
        captured = settings.attack.graph == "auto"
        own_images = len(range(settings.batch_size)[self.share.part])
        self.take_steps = CapturedSteps(take_steps, batch_size=own_images) if captured else take_steps
        self.parameters = dict(net.named_parameters())
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = make_optimizer(self.parameters, settings)
        memory = {} if plan.memory is None else plan.memory(net.space.settings.classes)
        self.memory = {name: tensor.to(net.mean.device) for name, tensor in memory.items()}
        self.guard = Guard(net.mean.device)
        self.sync = GradientSync(net, self.share.ranks) if self.share.several else None
        self.optimizer.found_inf = self.guard.failed
        self.statistics = [buffer for name, buffer in net.named_buffers() if "running" in name]
        self.statistics += self.memory.values()
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.best = {name: value.clone() for name, value in self.average.items()}

    # --- one step ----------------------------------------------------------------------------------------------

    @property
    def needs_views(self) -> bool:
        """Whether `step` must be told which views its images are."""
        return any(kept is not None for kept in (self.table, self.gradient_table, self.inner.carried))

    def step(
        self,
        images: Tensor,
        labels: Tensor,
        step: int,
        data_pass: int,
        lr: float,
        generator: torch.Generator,
        views: Views | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Work]:
        """One optimizer step; if loss or gradient are not finite, it leaves all as it was, as do those that follow.

        `images` and `labels` are this process's part of the batch, `views` those of all of it. Returns the mean loss,
        the mean number of correct clean and adversarial images (training mode), all of shape () and on the device, and
        the work spent per image. The host never waits for the device; a failure stands in `guard`.
        """
        drawn, self.gradients = self.plan.draw(self.seed, step, data_pass), 0
        if self._option("clean_noise"):
            around = {"eps": self._option("clean_noise") * self.eps, "norm": self.inner.norm}
            images = start_point(images, **around, start="uniform", generator=generator)
        torch._foreach_zero_([parameter.grad for parameter in self.parameters.values()])
        statistics = flat(self.statistics)
        asked = any(subnet.objective.needs_target or subnet.rivals for subnet in drawn)
        frozen, work = self._ask_teacher(images, views) if asked else (None, Work())
        losses, clean_right = [], torch.zeros((), dtype=torch.float64, device=images.device)
        adv_right = clean_right
        prices = {"teacher_price": self.teacher_price, "control_price": self.control_price}
        progress = min(step / self.total_steps, 1.0)
        guidance = Guidance(frozen, self.teacher, self.control, progress, data_pass, **prices)
        if self.gradient_table is not None:
            mine = views[self.share.part]
            kept, computed = self.gradient_table(guidance.gradient_of, images, mine, labels)
            guidance = replace(guidance, gradient=kept.view(images.shape))
            work += 2 * self._per_image(computed, len(images)) * self.teacher_price
        drawn, scored = settle(drawn, lambda arch: self._score(arch, images, labels, frozen))
        drawn = self.inner.begin(drawn, self.net.space, step=step, data_pass=data_pass, views=views)
        work = sum((self._price(arch) for arch in scored), start=work)
        decay = self._option("complexity_decay")
        for subnet in drawn:
            view = self._view(subnet.arch)
            batch, spent = self._forward(view, subnet, images, labels, guidance, generator)
            share = pace(self.net.space, subnet.arch, progress=guidance.progress, decay=decay)
            loss, more = self._backward(view, subnet, batch, len(drawn) / share)
            price = self._price(subnet.arch)
            losses.append(loss.detach())
            if subnet.guides:
                guide = partial(view, frozen=True)
                guidance = guidance.led_by(
                    batch.clean.detach(), guide, frozen_weight=self.plan.frozen_weight, price=price
                )
            clean_right = clean_right + _correct(batch.clean, labels) / len(drawn)
            adv_right = adv_right + _correct(batch.adv, labels) / len(drawn)
            work += spent + more * price + Work(weight_gradients=1.0)
            view.scatter_gradients()
        mean_loss = torch.stack(losses).mean()
        if self.sync is not None:
            specs = [self.net.space.spec(subnet.arch) for subnet in drawn]
            measures = torch.stack([mean_loss * self.share.weight, clean_right, adv_right])
            mean_loss, clean_right, adv_right = self.sync(specs, measures)
        self.guard.watch(mean_loss, step, [parameter.grad for parameter in self.parameters.values()])
        self._update(lr, step)
        self.guard.restore_(self.statistics, statistics)
        return mean_loss, clean_right, adv_right, work

    @torch.no_grad()
    def _ask_teacher(self, images: Tensor, views: Views | None) -> tuple[Tensor | None, Work]:
        """The frozen teacher's logits where there is one, and the work per image that they took."""
        if self.teacher is None:
            return None, Work()
        if self.table is None:
            return self.teacher(images), self.teacher_price
        logits, computed = self.table(self.teacher, images, views[self.share.part])
        if self.share.several:
            self.table.keep(views, self.share.whole(logits))
        return logits, self._per_image(computed, len(images)) * self.teacher_price

    def _per_image(self, computed: int, images: int) -> float:
        """Images that were computed, over all processes, per image of the batch."""
        if self.share.several:
            computed, images = int(self.share.total(torch.tensor(computed))), self.share.count
        return computed / images

    def _price(self, arch: Arch) -> Work:
        """What one pass of one image through a subnet costs."""
        return one_pass(self.net.space.spec(arch).macs)

    def _forward(
        self,
        view: SubnetView,
        subnet: Drawn,
        images: Tensor,
        labels: Tensor,
        guidance: Guidance,
        generator: torch.Generator,
    ) -> tuple[Batch, Work]:
        """Clean pass, attack on this very subnet, adversarial pass; with the work they took."""
        attack, objective = self.settings.attack, subnet.objective
        crafts = attack.crafted_on == "student"
        record: Statistics | None = {} if attack.bn_mode == "clean_batch" and objective.inner and crafts else None
        self.gradients += len({"teacher_gradient", "teacher_gradient_adv"} & objective.needs)
        clean, own, asked, needs = None, 0, Work(), objective.needs
        price = self._price(subnet.arch)
        source = images.detach().requires_grad_() if "teacher_gradient" in needs else images
        if objective.needs_clean or record is not None or subnet.guides or objective.inner == "kl_clean":
            with torch.set_grad_enabled(objective.needs_clean), self._autocast():
                clean = view(source, record=record, update_running=True).float()
            own += 3 if objective.needs_clean else 1
        batch = Batch(labels, clean=clean, teacher=guidance.target, images=source, memory=self.memory)
        if objective.inner is None:
            batch, asked = guided(replace(batch, adv=clean), needs, guidance)
            batch, more = passed(batch, needs - {"clean"}, self._train_pass(view), reach=1.0)
            return batch, asked + (own + more) * price
        known = replace(batch, clean=None if clean is None else clean.detach())
        inner = INNER_OBJECTIVES[objective.inner](known)
        if not crafts:
            predict = guidance.teacher
        elif attack.bn_mode == "batch":

            def predict(x: Tensor) -> Tensor:
                return view(x, frozen=True)

        else:
            predict = view.folded(record if record is not None else view.running_statistics(), dtype=self.attack_dtype)
        options = self.inner.options(images)
        self.gradients += options["num_steps"]
        if objective.inner == "kl_teacher_adv":  # every step asks the teacher as well
            predict = side_by_side(predict, guidance.teacher)
            asked += 2 * options["num_steps"] * guidance.teacher_price
        adversarial = pgd(predict, inner, images, **options, generator=generator, steps=self.take_steps)
        self.inner.keep(subnet, images, adversarial)
        adversarial.requires_grad_("teacher_gradient_adv" in needs)
        with self._autocast():
            adv = view(adversarial, update_running=clean is None).float()
        batch, beyond = guided(replace(batch, adv=adv, adversarial=adversarial), needs, guidance)
        needs, reach = needs - {"clean", "adv"}, self._option("helper_reach")
        batch, more = passed(batch, needs, self._train_pass(view), reach=reach)
        attacked = price if crafts else guidance.teacher_price
        return batch, asked + beyond + 2 * options["num_steps"] * attacked + (own + more + 3) * price

    def _backward(self, view: SubnetView, subnet: Drawn, batch: Batch, count: float) -> tuple[Tensor, int]:
        """The loss and its gradients / `count`, at perturbed weights where asked for, and the passes this added."""
        objective, options, gamma = subnet.objective, subnet.options, self._option("awp_gamma")
        count = count / self.share.weight  # parts of a mean over the batch
        if objective.remember is not None:
            for name, value in objective.remember(self.share.whole_batch(batch), **options).items():
                self.memory[name].copy_(value)
        loss = objective.loss(batch, **options)
        self.gradients += 1
        if not gamma or batch.progress * self.settings.epochs < self._option("awp_warmup_epochs"):
            (loss / count).backward()
            return loss, 0
        self.gradients += 1
        with perturbed(view.weights, loss * self.share.weight, gamma=gamma, totals=self.share.totals):
            predict, reach = self._train_pass(view), self._option("helper_reach")
            batch, more = passed(batch, objective.needs, predict, reach=reach)
            loss = objective.loss(batch, **options)
            (loss / count).backward()
        return loss, more

    def _view(self, arch: Arch) -> SubnetView | FixedView:
        """The network at this arch, for one step."""
        if isinstance(self.net, FixedNet):
            return FixedView(self.net)
        return SubnetView(self.net, arch, total=self.share.total if self.share.several else None)

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
            logits = self._view(arch)(images, frozen=True).float()
        loss = F.cross_entropy(logits, labels) if target is None else kl_to_teacher(logits, target).mean()
        return self.share.mean(loss)

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
        groups = {"net": self.net.state_dict(), "average": self.average, "best": self.best}
        groups |= {"momentum": {}, **optimizer_tensors(self.optimizer, self.parameters)}
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


def _price(network: object) -> Work:
    """What asking a frozen network about one image costs; nothing where there is none."""
    return Work() if network is None else one_pass(getattr(getattr(network, "spec", None), "macs", 0))


def _correct(logits: Tensor | None, labels: Tensor) -> Tensor | float:
    """Number of correctly classified images, float64 of shape (); not a number where nothing was computed."""
    return float("nan") if logits is None else (logits.detach().argmax(1) == labels).sum(dtype=torch.float64)
