"""The teaching networks of a step: frozen, dynamic, control; and the passes that a loss needs beyond the usual two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from proard.data import Views
from proard.losses import Batch, loss_gradient, mix_logits
from proard.nets.modules import present
from proard.training.counted import Counted, Forward, StepTally, counted
from proard.training.plan import Drawn
from proard.training.ranks import BatchPart
from proard.training.teacher_table import TeacherTable


@dataclass(frozen=True)
class Guidance:
    """The teachers of a subnet in this step.

    Attributes
    ----------
    target : Tensor of shape (batch, classes), optional
        The teacher's logits on the clean images, where a loss of the step reads them.
    teacher : callable, optional
        The same teacher at any images; differentiable with respect to them.
    control : callable, optional
        The plainly trained network.
    progress, data_pass : float, int
        Share of the training that is done; number of the pass over the data.
    gradient : Tensor of shape (batch, channels, height, width), optional
        The teacher's input gradient at the clean images, where it comes from a table.
    """

    target: Tensor | None
    teacher: Forward | None
    control: Forward | None = None
    progress: float = 0.0
    data_pass: int = 0
    gradient: Tensor | None = None

    def gradient_of(self, images: Tensor, labels: Tensor) -> Tensor:
        """The teacher's input gradient of the cross-entropy, image by image; of shape (batch, pixels)."""
        return input_gradient_of(present(self.teacher), images, labels)


def input_gradient_of(network: Forward, images: Tensor, labels: Tensor) -> Tensor:
    """A network's input gradient of the cross-entropy, image by image; of shape (batch, pixels)."""
    inputs = images.detach().requires_grad_()
    with torch.enable_grad():
        return loss_gradient(network(inputs).float(), inputs, labels).flatten(1)


class Teachers:
    """The teaching networks of a training.

    Parameters
    ----------
    frozen : callable, optional
        Frozen teacher: images to logits.
    control : callable, optional
        Plainly trained network: images to logits.
    tally : StepTally
        Receives their passes.
    frozen_weight : float
        The frozen teacher's share of a target that it gives together with a dynamic one.
    logits, gradients : TeacherTable, optional
        Where the frozen teacher's logits and input gradients at clean views are kept.
    part : BatchPart, optional
        The part of every batch that this process is given.
    """

    def __init__(
        self,
        frozen: Forward | None,
        control: Forward | None,
        tally: StepTally,
        *,
        frozen_weight: float = 1.0,
        logits: TeacherTable | None = None,
        gradients: TeacherTable | None = None,
        part: BatchPart | None = None,
    ) -> None:
        self.frozen, self.control = counted(frozen, tally), counted(control, tally)
        self.frozen_weight, self.logits, self.gradients, self.part = (
            frozen_weight,
            logits,
            gradients,
            part or BatchPart(),
        )

    @property
    def needs_views(self) -> bool:
        """Whether `begin` must be given the views."""
        return self.logits is not None or self.gradients is not None

    def begin(
        self,
        drawn: Sequence[Drawn],
        images: Tensor,
        labels: Tensor,
        views: Views | None,
        *,
        progress: float,
        data_pass: int,
    ) -> Guidance:
        """The frozen teacher's part of a step; `views` are those of the whole batch, images and labels of this part."""
        read = any(subnet.objective.needs_target or subnet.rivals for subnet in drawn)
        target = self._target(self.frozen, images, views) if read and self.frozen is not None else None
        gradient = None
        if self.gradients is not None:
            gradient = self._gradient(self.gradients, images, labels, present(views)).view(images.shape)
        return Guidance(target, self.frozen, self.control, progress, data_pass, gradient)

    def led_by(self, guidance: Guidance, logits: Tensor, dynamic: Forward) -> Guidance:
        """The same step with the dynamic teacher, alone or mixed with the frozen one; `logits` are its own."""
        if self.frozen is None:
            return replace(guidance, target=logits, teacher=dynamic)
        frozen, weight = self.frozen, self.frozen_weight

        def both(images: Tensor) -> Tensor:
            return mix_logits(frozen(images), dynamic(images), first_weight=weight)

        mixed = None if guidance.target is None else mix_logits(guidance.target, logits, first_weight=weight)
        return replace(guidance, target=mixed, teacher=both)

    @torch.no_grad()
    def _target(self, frozen: Counted[Forward], images: Tensor, views: Views | None) -> Tensor:
        """Logits at the clean images, by a pass or from the table."""
        if self.logits is None:
            return frozen(images)
        logits, computed = self.logits(frozen.net, images, present(views)[self.part.rows])
        if self.part.several:
            self.logits.keep(present(views), self.part.whole(logits))
        frozen.count(self._per_image(computed, len(images)))
        return logits

    def _gradient(self, table: TeacherTable, images: Tensor, labels: Tensor, views: Views) -> Tensor:
        """Input gradients at the clean images from the table; of shape (batch, pixels)."""
        frozen = present(self.frozen)

        def gradient(rows: Tensor, truth: Tensor) -> Tensor:
            return input_gradient_of(frozen.net, rows, truth)

        kept, computed = table(gradient, images, views[self.part.rows], labels)
        frozen.count(2 * self._per_image(computed, len(images)))
        return kept

    def _per_image(self, computed: int, images: int) -> float:
        """Images that were computed, over all processes, per image of the batch."""
        if self.part.several:
            computed, images = int(self.part.total(torch.tensor(computed))), self.part.count
        return computed / images


def add_teacher_outputs(batch: Batch, needs: frozenset[str], guidance: Guidance) -> Batch:
    """Fill in the outputs of teacher and control beyond the clean logits.

    Parameters
    ----------
    batch : Batch
        With `images`, and `adversarial` where there was an attack.
    needs : frozenset of str
        Fields that the loss reads.
    guidance : Guidance
        The networks.

    Returns
    -------
    Batch
        The batch with these fields, none of them carrying a graph.
    """
    images, adversarial = batch.images, batch.adversarial
    outputs: dict[str, Any] = {}
    with torch.no_grad():
        if "teacher_adv" in needs:
            outputs["teacher_adv"] = present(guidance.teacher)(adversarial)
        if "teacher_mirrored" in needs:
            outputs["teacher_mirrored"] = present(guidance.teacher)(2 * images - adversarial)
        if "control" in needs:
            outputs["control"] = present(guidance.control)(images)
        if "control_adv" in needs:
            outputs["control_adv"] = present(guidance.control)(adversarial)
    if "teacher_gradient" in needs:
        known = guidance.gradient
        outputs["teacher_gradient"] = guidance.gradient_of(images, batch.labels) if known is None else known
    if "teacher_gradient_adv" in needs:
        outputs["teacher_gradient_adv"] = guidance.gradient_of(adversarial, batch.labels)
    outputs = {name: value.view(images.shape) if "gradient" in name else value for name, value in outputs.items()}
    return replace(batch, **outputs, progress=guidance.progress, data_pass=guidance.data_pass)


def add_student_outputs(batch: Batch, fields: frozenset[str], predict: Forward, *, reach: float) -> Batch:
    """Compute the network's own logits where a loss reads them.

    Parameters
    ----------
    batch : Batch
        With `images`, and `adversarial` where there was an attack.
    fields : frozenset of str
        Which to compute: among `clean`, `adv`, `mirrored`, `beyond`; others are left alone.
    predict : callable
        The network in training mode, as it is now.
    reach : float
        `beyond` lies at this multiple of the perturbation.

    Returns
    -------
    Batch
        With fresh logits.
    """
    images, adversarial = batch.images, batch.adversarial
    where: dict[str, Callable[[], Tensor]] = {
        "clean": lambda: images,
        "adv": lambda: adversarial,
        "mirrored": lambda: (2 * images - adversarial).detach(),
        "beyond": lambda: (images + reach * (adversarial - images)).detach(),
    }
    outputs: dict[str, Any] = {name: predict(at()) for name, at in where.items() if name in fields}
    return replace(batch, **outputs)
