"""Every training objective once: what it looks at, what its adversary ascends, what it remembers, where its teacher is.

`OBJECTIVES` names the objectives, `INNER_OBJECTIVES` what an adversary may ascend; `with_igdm` and `with_kdiga` add a
term to any objective that has a teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from proard.losses.alignment import igdm_term, kdiga_term
from proard.losses.inner import CrossEntropy, InnerObjective, KLBetweenNets, KLToTarget, Margin

Memory = dict[str, Tensor]
ABSENT: Any = None  # in a field of a batch that its objective does not need, and so does not read


@dataclass(frozen=True)
class Batch:
    """What an objective may look at, all for one subnet and one batch; what it does not need is `ABSENT`.

    Attributes
    ----------
    labels : Tensor of shape (batch,)
    clean, adv : Tensor of shape (batch, classes), optional
        The network's logits on the clean and on the adversarial images.
    teacher, teacher_adv : Tensor of shape (batch, classes), optional
        The teacher's logits on the clean and on the adversarial images.
    images, adversarial : Tensor of shape (batch, channels, height, width), optional
        Network inputs; they require a gradient where the network's input gradient is part of the loss.
    mirrored, teacher_mirrored : Tensor of shape (batch, classes), optional
        Network and teacher at x - (x' - x).
    beyond : Tensor of shape (batch, classes), optional
        The network's logits at x + h (x' - x), outside the ball.
    average : Tensor of shape (batch, classes), optional
        Logits of the network with averaged weights on the clean images.
    teacher_gradient, teacher_gradient_adv : Tensor of shape (batch, channels, height, width), optional
        The teacher's input gradient of the cross-entropy at the clean and at the adversarial images.
    control, control_adv : Tensor of shape (batch, classes), optional
        A plainly trained network's logits on the clean and on the adversarial images.
    progress : float in [0, 1]
        Share of the training that is done.
    data_pass : int
        Number of the pass over the data.
    memory : dict of Tensor
        What the objective carries from step to step.
    """

    labels: Tensor
    clean: Tensor = ABSENT
    teacher: Tensor = ABSENT
    adv: Tensor = ABSENT
    images: Tensor = ABSENT
    adversarial: Tensor = ABSENT
    teacher_adv: Tensor = ABSENT
    mirrored: Tensor = ABSENT
    teacher_mirrored: Tensor = ABSENT
    beyond: Tensor = ABSENT
    average: Tensor = ABSENT
    teacher_gradient: Tensor = ABSENT
    teacher_gradient_adv: Tensor = ABSENT
    control: Tensor = ABSENT
    control_adv: Tensor = ABSENT
    progress: float = 0.0
    data_pass: int = 0
    memory: Memory = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """A training objective.

    Attributes
    ----------
    inner : str or None
        What the adversary ascends, by name; None: no attack.
    loss : callable
        `loss(batch, **options)`: one number to descend.
    needs : frozenset of str
        Fields of `Batch` that the loss reads, `labels` apart.
    memory : callable, optional
        `memory(classes, **options)`: what is remembered before the first step.
    remember : callable, optional
        `remember(batch, **options)`: the memory after this batch, on which the loss is then computed.
    unweighted : callable, optional
        `unweighted(**options)`: those of `needs` that the loss does not read under these options.
    """

    inner: str | None
    loss: Callable[..., Tensor]
    needs: frozenset[str]
    memory: Callable[..., Memory] | None = None
    remember: Callable[..., Memory] | None = None
    unweighted: Callable[..., frozenset[str]] | None = None

    @property
    def needs_clean(self) -> bool:
        """Whether gradients flow through the network's logits on clean images."""
        return "clean" in self.needs

    @property
    def needs_teacher(self) -> bool:
        """Whether there must be a teacher."""
        return self.teacher_at is not None

    @property
    def needs_target(self) -> bool:
        """Whether loss or adversary read the teacher's logits on the clean images."""
        return "teacher" in self.needs or self.inner in ("kl_teacher", "kl_class")

    @property
    def teacher_at(self) -> Literal["clean", "adv", "both"] | None:
        """Where the teacher is asked; None: nowhere.

        `clean`: its outputs depend on the stored view of an image alone, so that they may be cached. `adv` and `both`:
        it must be asked in every step, at images that this very student has made.
        """
        at_clean = self.needs_target or "teacher_gradient" in self.needs
        at_adv = not {"teacher_adv", "teacher_mirrored", "teacher_gradient_adv"}.isdisjoint(self.needs)
        at_adv = at_adv or self.inner == "kl_teacher_adv"
        if at_clean and at_adv:
            return "both"
        return "clean" if at_clean else "adv" if at_adv else None


INNER_OBJECTIVES: dict[str, Callable[[Batch], InnerObjective]] = {
    "ce": lambda batch: CrossEntropy(batch.labels),
    "margin": lambda batch: Margin(batch.labels),
    "kl_clean": lambda batch: KLToTarget(batch.clean),
    "kl_teacher": lambda batch: KLToTarget(batch.teacher),
    "kl_teacher_adv": lambda batch: KLBetweenNets(),
    "kl_class": lambda batch: KLToTarget(batch.teacher / batch.memory["adv_temperature"][batch.labels, None]),
}

OBJECTIVES: dict[str, Objective] = {}  # by name; every module of losses adds its own


# --- add-ons ------------------------------------------------------------------------------------------------------


def scaled(objective: Objective, *, scale: float) -> Objective:
    """The objective times a number: releases that average a divergence over classes, too, have 1 / classes of it."""
    return replace(objective, loss=lambda batch, **options: scale * objective.loss(batch, **options))


def with_igdm(objective: Objective, *, weight: float) -> Objective:
    """Add `weight` times `igdm_term`, which grows with the share of the training that is done (the paper's epoch / E).

    Raises
    ------
    ValueError
        The objective has no attack, and with it no direction along which to match.
    """
    if objective.inner is None:
        raise ValueError("igdm_weight needs a loss with an attack")

    def loss(batch: Batch, **options: float) -> Tensor:
        term = igdm_term(batch.adv, batch.mirrored, batch.teacher_adv, batch.teacher_mirrored)
        return objective.loss(batch, **options) + weight * batch.progress * term

    needs = objective.needs | {"adv", "mirrored", "teacher_adv", "teacher_mirrored"}
    return replace(objective, loss=loss, needs=needs)


def with_kdiga(objective: Objective, *, weight: float, norm: str = "l2", at: str = "clean") -> Objective:
    """Add `weight` times `kdiga_term` at the clean or at the adversarial images (`at`: clean, adv).

    Raises
    ------
    ValueError
        Adversarial images of an objective without an attack.
    """
    if at == "adv" and objective.inner is None:
        raise ValueError("kdiga_at: adv needs a loss with an attack")

    def loss(batch: Batch, **options: float) -> Tensor:
        if at == "clean":
            term = kdiga_term(batch.clean, batch.images, batch.labels, batch.teacher_gradient, norm=norm)
        else:
            term = kdiga_term(batch.adv, batch.adversarial, batch.labels, batch.teacher_gradient_adv, norm=norm)
        return objective.loss(batch, **options) + weight * term

    fields = {"clean", "teacher_gradient"} if at == "clean" else {"adv", "teacher_gradient_adv"}
    return replace(objective, loss=loss, needs=objective.needs | fields)
