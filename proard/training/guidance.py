"""Networks that a step asks beside the subnet it trains, and the passes that a loss needs beyond the usual two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from proard.losses import Batch, loss_gradient, mix_logits
from proard.space import Work

Network = Callable[[Tensor], Tensor]
ANY_PASS = Work(1.0)  # through a network whose size is not known


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
    teacher_price, control_price : Work
        What it takes to ask them about one image.
    gradient : Tensor of shape (batch, channels, height, width), optional
        The teacher's input gradient at the clean images, where it is known already.
    """

    target: Tensor | None
    teacher: Network | None
    control: Network | None = None
    progress: float = 0.0
    data_pass: int = 0
    teacher_price: Work = ANY_PASS
    control_price: Work = ANY_PASS
    gradient: Tensor | None = None

    def gradient_of(self, images: Tensor, labels: Tensor) -> Tensor:
        """The teacher's input gradient of the cross-entropy, image by image; of shape (batch, pixels)."""
        inputs = images.detach().requires_grad_()
        with torch.enable_grad():
            return loss_gradient(self.teacher(inputs).float(), inputs, labels).flatten(1)

    def led_by(self, target: Tensor, guide: Network, *, frozen_weight: float, price: Work = ANY_PASS) -> Guidance:
        """The same step with the dynamic teacher, alone or mixed with the frozen one; `price` is the guide's."""
        if self.teacher is None:
            return replace(self, target=target, teacher=guide, teacher_price=price)
        frozen = self.teacher

        def both(images: Tensor) -> Tensor:
            return mix_logits(frozen(images), guide(images), first_weight=frozen_weight)

        mixed = None if self.target is None else mix_logits(self.target, target, first_weight=frozen_weight)
        return replace(self, target=mixed, teacher=both, teacher_price=self.teacher_price + price)


def side_by_side(student: Network, teacher: Network) -> Network:
    """Logits of both networks for the same images, (batch, 2 * classes): an attack's gradient passes through both."""
    return lambda images: torch.cat([student(images), teacher(images)], 1)


def guided(batch: Batch, needs: frozenset[str], guidance: Guidance) -> tuple[Batch, Work]:
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
    Work
        What that took per image.
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
    by_control = len({"control", "control_adv"} & asked.keys())
    work = (len(asked) - by_control) * guidance.teacher_price + by_control * guidance.control_price
    for name, where in (("teacher_gradient", images), ("teacher_gradient_adv", adversarial)):
        if name in needs and name == "teacher_gradient" and guidance.gradient is not None:
            asked[name] = guidance.gradient
        elif name in needs:
            asked[name] = guidance.gradient_of(where, batch.labels).view(where.shape)
            work += 2 * guidance.teacher_price
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
