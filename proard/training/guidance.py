"""Networks that a step asks beside the subnet it trains, and the passes that a loss needs beyond the usual two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from proard.losses import Batch, loss_gradient, mix_logits

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Guidance:
    """Who guides a subnet in this step.

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
    """

    target: Tensor | None
    teacher: Network | None
    control: Network | None = None
    progress: float = 0.0
    data_pass: int = 0

    def led_by(self, target: Tensor, guide: Network, *, frozen_weight: float) -> Guidance:
        """The same step with the dynamic teacher, alone or mixed with the frozen one."""
        if self.teacher is None:
            return replace(self, target=target, teacher=guide)
        frozen = self.teacher

        def both(images: Tensor) -> Tensor:
            return mix_logits(frozen(images), guide(images), first_weight=frozen_weight)

        mixed = None if self.target is None else mix_logits(self.target, target, first_weight=frozen_weight)
        return replace(self, target=mixed, teacher=both)


def side_by_side(student: Network, teacher: Network) -> Network:
    """Logits of both networks for the same images, (batch, 2 * classes): an attack's gradient passes through both."""
    return lambda images: torch.cat([student(images), teacher(images)], 1)


def guided(batch: Batch, needs: frozenset[str], guidance: Guidance) -> tuple[Batch, int]:
    """Fill in what the teacher and the control say beyond the clean logits.

    Parameters
    ----------
    batch : Batch
        With `images`, and `adversarial` where there was an attack.
    needs : frozenset of str
        Fields that the loss reads.
    guidance : Guidance
        Whom to ask.

    Returns
    -------
    Batch
        The batch with these fields, none of them carrying a graph.
    int
        Forward-equivalents of it per image.
    """
    images, adversarial = batch.images, batch.adversarial
    asked: dict[str, Tensor] = {}
    with torch.no_grad():
        if "teacher_adv" in needs:
            asked["teacher_adv"] = guidance.teacher(adversarial)
        if "teacher_mirrored" in needs:
            asked["teacher_mirrored"] = guidance.teacher(2 * images - adversarial)
        if "control" in needs:
            asked["control"] = guidance.control(images)
        if "control_adv" in needs:
            asked["control_adv"] = guidance.control(adversarial)
    work = len(asked)
    for name, where in (("teacher_gradient", images), ("teacher_gradient_adv", adversarial)):
        if name in needs:
            inputs = where.detach().requires_grad_()
            asked[name] = loss_gradient(guidance.teacher(inputs).float(), inputs, batch.labels)
            work += 2
    progress = {"progress": guidance.progress, "data_pass": guidance.data_pass}
    return replace(batch, **asked, **progress), work


def passed(batch: Batch, fields: frozenset[str], predict: Network, *, reach: float) -> tuple[Batch, int]:
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
    int
        Forward-equivalents per image, the backward pass counted.
    """
    images, adversarial = batch.images, batch.adversarial
    where = {
        "clean": lambda: images,
        "adv": lambda: adversarial,
        "mirrored": lambda: 2 * images - adversarial,
        "beyond": lambda: images + reach * (adversarial - images),
    }
    fresh = {name: predict(at()) for name, at in where.items() if name in fields}
    second = len({"teacher_gradient", "teacher_gradient_adv"} & fields)  # input gradient, and backward through it
    return replace(batch, **fresh), 3 * (len(fresh) + second)
