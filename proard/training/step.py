"""One training step: subnets, teacher outputs; for each subnet clean pass, attack, adversarial pass and loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.attacks import pgd, start_point
from proard.config import Threat, TrainingSettings
from proard.data import Views
from proard.kernels import computed_type
from proard.losses import HELPER_REACH, Batch, kl_to_teacher
from proard.losses.objectives import ABSENT
from proard.nets.trainee import Statistics, Trainee, View
from proard.space import Arch, Work
from proard.training.attacker import Attacker
from proard.training.carried import CarriedPerturbations
from proard.training.counted import Counted, Forward, StepTally
from proard.training.perturbation import perturbed
from proard.training.plan import Drawn, Plan, choose_winners, pace
from proard.training.ranks import BatchPart
from proard.training.recurring import Given, Recurring, recurring
from proard.training.teacher_table import table_for
from proard.training.teachers import Teachers, add_student_outputs, add_teacher_outputs
from proard.training.update import Update


@dataclass(frozen=True)
class StepBatch:
    """Inputs of one step.

    Attributes
    ----------
    images : Tensor of shape (batch, channels, height, width)
        This process's part of the batch, in [0, 1].
    labels : Tensor of shape (batch,)
    generator : torch.Generator
        Source of noise.
    step, data_pass : int
        Numbers of the step and of the pass over the data.
    lr : float
        Learning rate.
    position : float, optional
        Position of the step among those that the training plans; by default its number.
    views : Views, optional
        Which views the images of the whole batch are, where the step `needs_views`.
    """

    images: Tensor
    labels: Tensor
    generator: torch.Generator
    step: int = 0
    data_pass: int = 0
    lr: float = 0.0
    position: float | None = None
    views: Views | None = None


@dataclass(frozen=True)
class StepResult:
    """Results of one step: tensors of shape () on the device, for the whole batch; work per image.

    Attributes
    ----------
    loss : Tensor
        Mean over subnets and images.
    clean, robust : Tensor
        Correct clean and adversarial images in training mode, mean over subnets.
    work : Work
        Passes through all networks.
    gradients : int
        Backward passes of one image.
    """

    loss: Tensor
    clean: Tensor
    robust: Tensor
    work: Work
    gradients: int


class TrainingStep:
    """The step of a training; its collaborators are made once, by `training_step`.

    Attributes
    ----------
    teachers : Teachers
        Frozen, dynamic and control network.
    attacker : Attacker
        Crafts adversarial images.
    update : Update
        Moves the weights.
    tally : StepTally
        Counts every pass of the newest step.
    recurring : Recurring, optional
        Graphs of the subnets that recur.
    """

    def __init__(
        self,
        net: Trainee,
        settings: TrainingSettings,
        plan: Plan,
        *,
        seed: int,
        total_steps: int,
        tally: StepTally,
        teachers: Teachers,
        attacker: Attacker,
        update: Update,
        recurring: Recurring | None = None,
    ) -> None:
        self.net, self.settings, self.plan, self.seed, self.total_steps = net, settings, plan, seed, total_steps
        self.tally, self.teachers, self.attacker, self.update = tally, teachers, attacker, update
        self.recurring = recurring
        self.memory, self.part = update.memory, update.part
        self.dtype = torch_type(settings.dtype, net)

    @property
    def needs_views(self) -> bool:
        """Whether a batch must say which views its images are."""
        return self.teachers.needs_views or self.attacker.carried is not None

    def __call__(self, batch: StepBatch) -> StepResult:
        """Make one optimizer step. From a loss or gradient on that is not finite, no step changes anything.

        The host never waits for the device; `update.guard` remembers a failure.
        """
        images, labels, views, data_pass = batch.images, batch.labels, batch.views, batch.data_pass
        threat = self.attacker.threat
        self.tally.begin()
        self.update.begin()
        if self.settings.clean_noise:
            eps = self.settings.clean_noise * threat.eps
            images = start_point(images, eps=eps, norm=threat.norm, start="uniform", generator=batch.generator)
        position = batch.step if batch.position is None else batch.position
        progress = min(position / self.total_steps, 1.0)
        drawn = self.plan.draw(self.seed, batch.step, data_pass)
        guidance = self.teachers.begin(drawn, images, labels, views, progress=progress, data_pass=data_pass)
        drawn = choose_winners(drawn, lambda arch: self._score(arch, images, labels, guidance.target))
        drawn = self.attacker.begin(drawn, self.net.space, step=position, data_pass=data_pass, views=views)
        losses, clean_right, adv_right = [], *torch.zeros(2, dtype=torch.float64, device=images.device)
        train: Callable[..., tuple[dict[str, Tensor], Forward]] = self._train
        if self.recurring is not None and self.recurring.fits(images, drawn):
            train = partial(self.recurring.train, self._train, self.attacker)
        for subnet in drawn:
            rate = pace(self.net.space, subnet.arch, progress=progress, decay=self.settings.complexity_decay)
            found, network = train(subnet, Given(images, labels, guidance, batch.generator, len(drawn) / rate))
            losses.append(found["loss"])
            if subnet.guides:
                guidance = self.teachers.led_by(guidance, found["logits"], network)
            clean_right = clean_right + found.get("clean", nan) / len(drawn)
            adv_right = adv_right + found.get("robust", nan) / len(drawn)
        specs = [self.net.space.spec(subnet.arch) for subnet in drawn]
        right = (clean_right, adv_right)
        loss, clean, robust = self.update(torch.stack(losses).mean(), right, specs, lr=batch.lr, step=batch.step)
        self.attacker.commit(self.update.guard.failed)
        return StepResult(loss, clean, robust, self.tally.work, self.tally.gradients)

    # --- parts of a step ---------------------------------------------------------------------------------------

    def _student(self, arch: Arch) -> Counted[View]:
        """The network at this arch, for one step, its passes counted."""
        view = self.net.view(arch, total=self.part.total if self.part.several else None)
        return Counted(view, self.tally, macs=view.spec.macs, trained=True)

    def _train(self, subnet: Drawn, given: Given, **attacked: Any) -> tuple[dict[str, Tensor], Forward]:
        """All passes of a subnet, its gradients / `given.count` added to the network's; and the subnet, frozen.

        Results: its loss, its correct clean and adversarial images, its clean logits, as far as computed.
        """
        student = self._student(subnet.arch)
        seen = self._passes(student, subnet, given, **attacked)
        found = {"loss": self._backward(student, subnet, seen, given.count)}
        for name, logits in (("clean", seen.clean), ("robust", seen.adv)):
            if logits is not None:
                found[name] = (logits.detach().argmax(1) == given.labels).sum(dtype=torch.float64)
        if seen.clean is not None:
            found["logits"] = seen.clean.detach()
        student.net.scatter_gradients()
        return found, partial(student, frozen=True)

    def _passes(self, student: Counted[View], subnet: Drawn, given: Given, **attacked: Any) -> Batch:
        """Clean pass, attack on this very subnet, adversarial pass, and what else its loss reads."""
        images, labels, guidance = given.images, given.labels, given.guidance
        objective = subnet.objective
        needs, clean = objective.needs, ABSENT
        average = self._averaged(subnet.arch, images) if "average" in needs else ABSENT  # before there is a graph
        statistics: Statistics | None = {} if self.attacker.needs_statistics(objective) else None
        source = images.detach().requires_grad_() if "teacher_gradient" in needs else images
        if objective.needs_clean or statistics is not None or subnet.guides or objective.inner == "kl_clean":
            with torch.set_grad_enabled(objective.needs_clean), self._autocast():
                clean = student(source, record=statistics, update_running=True).float()
        target = ABSENT if guidance.target is None else guidance.target
        batch = Batch(labels, clean=clean, teacher=target, images=source, average=average, memory=self.memory)
        if objective.inner is None:
            batch, known = replace(batch, adv=clean), {"clean"}
        else:
            inputs = replace(batch, clean=clean if clean is ABSENT else clean.detach(), images=images)
            adversarial = self.attacker.craft(
                student, subnet, inputs, statistics, guidance, given.generator, **attacked
            )
            adversarial.requires_grad_("teacher_gradient_adv" in needs)
            with self._autocast():
                adv = student(adversarial, update_running=clean is ABSENT).float()
            batch, known = replace(batch, adv=adv, adversarial=adversarial), {"clean", "adv"}
        batch = add_teacher_outputs(batch, needs, guidance)
        return self._student_outputs(batch, needs - known, student)

    @torch.no_grad()
    def _averaged(self, arch: Arch, images: Tensor) -> Tensor:
        """Logits of the network with averaged weights, normalised by the batch's own statistics."""
        with self.update.averaged(), self._autocast():
            return self._student(arch)(images, frozen=True).float()

    def _student_outputs(self, batch: Batch, fields: frozenset[str], student: Counted[View]) -> Batch:
        """The batch with fresh logits of the subnet in training mode; running statistics keep their values."""

        def predict(images: Tensor) -> Tensor:
            with self._autocast():
                return student(images).float()

        return add_student_outputs(batch, fields, predict, reach=HELPER_REACH)

    def _backward(self, student: Counted[View], subnet: Drawn, batch: Batch, count: float) -> Tensor:
        """The loss, without graph, and its gradients / `count`, at perturbed weights where the settings say so."""
        objective, options, awp = subnet.objective, subnet.options, self.settings.awp
        count = count / self.part.weight  # parts of a mean over the batch
        if objective.remember is not None:
            for name, value in objective.remember(self.part.whole_batch(batch), **options).items():
                self.memory[name].copy_(value)
        loss = objective.loss(batch, **options)
        self.tally.gradients += 1
        self.tally.work += Work(weight_gradients=1.0)
        if awp is None or batch.progress * self.settings.epochs < awp.warmup_epochs:
            (loss / count).backward()
            return loss.detach()
        self.tally.gradients += 1
        totals = self.part.totals
        with perturbed(student.net.weights, loss * self.part.weight, gamma=awp.gamma, totals=totals):
            loss = objective.loss(self._student_outputs(batch, objective.needs, student), **options)
            (loss / count).backward()
        return loss.detach()

    def _score(self, arch: Arch, images: Tensor, labels: Tensor, target: Tensor | None) -> Tensor:
        """A subnet's loss on clean images: divergence from the frozen teacher, or cross-entropy without one."""
        with self._autocast():
            logits = self._student(arch)(images, frozen=True).float()
        loss = F.cross_entropy(logits, labels) if target is None else kl_to_teacher(logits, target).mean()
        return self.part.mean(loss)

    def _autocast(self) -> torch.autocast:
        """Mixed precision of the training passes, where asked for."""
        device, enabled = self.net.mean.device.type, self.dtype is not torch.float32
        return torch.autocast(device, dtype=torch.bfloat16, enabled=enabled)

    # --- state -------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resumed training needs, by name."""
        groups = self.update.tensors() | {"inner": self.attacker.tensors()}
        return {f"{group}.{name}": tensor for group, members in groups.items() for name, tensor in members.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` returned."""
        for key, tensor in self.tensors().items():
            tensor.copy_(tensors[key])


def training_step(
    net: Trainee,
    settings: TrainingSettings,
    plan: Plan,
    *,
    threat: Threat,
    seed: int = 0,
    total_steps: int = 1,
    teacher: Forward | None = None,
    control: Forward | None = None,
    padded_shape: tuple[int, int, int, int] | None = None,
    part: BatchPart | None = None,
    search: Callable[..., Tensor] = pgd,
    capture: Callable[[Callable[[], object]], Callable[[], object]] | None = None,
) -> TrainingStep:
    """Make the step of a training with all its collaborators.

    Parameters
    ----------
    net : Supernet or FixedNet
        Changed in place by every step.
    settings : TrainTeacher, TrainControl, Phase or Student
        Optimisation, attack and loss.
    plan : Plan
        Subnets and objectives of every step.
    threat : Threat
        Norm and radius, in pixel units.
    seed : int
        Seed of the plan's draws.
    total_steps : int
        Steps that the whole training plans.
    teacher, control : callable, optional
        Frozen teacher and plainly trained network: images to logits.
    padded_shape : tuple of int, optional
        Of the padded training images, (n, height, width, channels). Without it nothing is kept per image: attacks
        start at noise, and teacher outputs are computed in every step.
    part : BatchPart, optional
        The part of every batch that this process is given; by default all of it.
    search : callable
        The attack, with the arguments of `pgd`.
    capture : callable, optional
        As for `kernels.Graphs`, for the passes of subnets that recur; by default CUDA graphs, on a GPU.

    Raises
    ------
    UserError
        `teacher_logits` under a loss that would not read them.
    """
    part, device, tally = part or BatchPart(), net.mean.device, StepTally()
    among = (getattr(settings, "arch_pool", None) or 0) + 2  # subnets that recur
    carried, tables = None, {}
    if settings.attack.carry_passes is not None and padded_shape is not None:
        carried = CarriedPerturbations(
            settings.attack, padded_shape, eps=threat.eps, norm=threat.norm, seed=seed, device=device
        )
    for kept in ("logits", "gradients"):
        if getattr(settings, f"teacher_{kept}") is not None and padded_shape is not None:
            tables[kept] = table_for(kept, net, settings, plan, images=padded_shape[0])
    teachers = Teachers(teacher, control, tally, frozen_weight=plan.frozen_weight, part=part, **tables)
    attacker = Attacker(
        settings.attack,
        tally,
        threat=threat,
        total_steps=total_steps,
        carried=carried,
        part=part,
        dtype=torch_type(settings.dtype, net),
        batch_size=len(range(settings.batch_size)[part.rows]),
        recurring=2 * among,  # each crafts in full or goes on from another
        search=search,
    )
    memory = {} if plan.memory is None else plan.memory(net.space.settings.classes)
    memory = {name: tensor.to(device) for name, tensor in memory.items()}
    update = Update(net, settings, memory=memory, part=part)
    return TrainingStep(
        net,
        settings,
        plan,
        seed=seed,
        total_steps=total_steps,
        tally=tally,
        teachers=teachers,
        attacker=attacker,
        update=update,
        recurring=recurring(settings, tally, among=among, several=part.several, capture=capture),
    )


def torch_type(name: str, net: Trainee) -> torch.dtype:
    """The type in which this device computes what a setting names."""
    return getattr(torch, computed_type(name, net.mean.device))
