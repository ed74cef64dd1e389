"""Losses and inner objectives: logits in, numbers out; no model, no attack, no setting.

All KL divergences are summed over classes and averaged over images (natural units), whatever the number of classes.
`OBJECTIVES` names each training objective once, with what its paper's adversary ascends; `INNER_OBJECTIVES` names what
an adversary may ascend instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.kernels import softmax_difference


class InnerObjective(Protocol):
    """What an attack ascends, per image, with its gradient with respect to the logits in closed form."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Values of shape (batch,)."""

    def logit_gradient(self, logits: Tensor) -> Tensor:
        """Gradient of the summed values, of shape (batch, classes)."""


class KLToTarget:
    """KL(softmax(target) || softmax(logits)): gradient softmax(logits) - softmax(target).

    Parameters
    ----------
    target_logits : Tensor of shape (batch, classes)
        Fixed target, detached.
    """

    def __init__(self, target_logits: Tensor) -> None:
        self.target_logits = target_logits.detach().float()
        self.target = self.target_logits.softmax(1)

    def __call__(self, logits: Tensor) -> Tensor:
        """KL divergence in nats, of shape (batch,)."""
        return kl_to_teacher(logits, self.target_logits)

    def logit_gradient(self, logits: Tensor) -> Tensor:
        """Closed-form gradient of the summed divergence."""
        return softmax_difference(logits, self.target)


class CrossEntropy:
    """Cross-entropy to the labels: gradient softmax(logits) - one_hot(labels)."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __call__(self, logits: Tensor) -> Tensor:
        """Cross-entropy in nats, of shape (batch,)."""
        return F.cross_entropy(logits, self.labels, reduction="none")

    def logit_gradient(self, logits: Tensor) -> Tensor:
        """Closed-form gradient of the summed cross-entropy."""
        return softmax_difference(logits, self.labels)


class Margin:
    """Largest wrong logit minus the true one: positive exactly where the image is misclassified.

    References
    ----------
    Carlini and Wagner, Towards Evaluating the Robustness of Neural Networks, 2017, arXiv:1608.04644, objective f6.
    """

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __call__(self, logits: Tensor) -> Tensor:
        """Margin in logit units, of shape (batch,)."""
        true = logits.gather(1, self.labels[:, None])[:, 0]
        return logits.scatter(1, self.labels[:, None], -torch.inf).amax(1) - true

    def logit_gradient(self, logits: Tensor) -> Tensor:
        """+1 at the strongest wrong class, -1 at the true one."""
        wrong = logits.scatter(1, self.labels[:, None], -torch.inf).argmax(1, keepdim=True)
        gradient = torch.zeros_like(logits).scatter_(1, wrong, 1.0)
        return gradient.scatter_(1, self.labels[:, None], -1.0)


def kl_to_teacher(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) of every image, in nats, of shape (batch,)."""
    log_teacher = teacher_logits.log_softmax(1)
    return (log_teacher.exp() * (log_teacher - student_logits.log_softmax(1))).sum(1)


def rslad_loss(
    student_clean: Tensor, student_adv: Tensor, teacher_clean: Tensor, *, adv_weight: float = 5 / 6
) -> Tensor:
    """Pull clean and adversarial student outputs to the teacher's clean soft labels.

    Parameters
    ----------
    student_clean, student_adv : Tensor of shape (batch, classes)
        Student logits on the clean and on the adversarial images.
    teacher_clean : Tensor of shape (batch, classes)
        Teacher logits on the clean images. No gradient flows into them.
    adv_weight : float in [0, 1]
        Share of the adversarial term.

    Returns
    -------
    Tensor of shape ()
        KL(teacher || student) in nats, summed over classes, averaged over images.

    Notes
    -----
    The authors' code also averages over classes: its values are smaller by that factor.

    References
    ----------
    Zi et al., Revisiting Adversarial Robustness Distillation, ICCV 2021, arXiv:2108.07969.
    """
    teacher = teacher_clean.detach()
    clean, adv = kl_to_teacher(student_clean, teacher), kl_to_teacher(student_adv, teacher)  # (batch,)
    return (adv_weight * adv + (1 - adv_weight) * clean).mean()


def trades_loss(clean: Tensor, adv: Tensor, labels: Tensor, *, beta: float = 6.0) -> Tensor:
    """Cross-entropy on clean images plus beta times the divergence between clean and adversarial outputs.

    Parameters
    ----------
    clean, adv : Tensor of shape (batch, classes)
        The network's logits; the gradient flows through both.
    labels : Tensor of shape (batch,)
        Class indices.
    beta : float
        Weight of the divergence (the paper's 1/lambda).

    Returns
    -------
    Tensor of shape ()
        Nats, averaged over images.

    References
    ----------
    Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019,
    arXiv:1901.08573, eq. 5.
    """
    return F.cross_entropy(clean, labels) + beta * kl_to_teacher(adv, clean).mean()


def mix_logits(first: Tensor, second: Tensor, *, first_weight: float) -> Tensor:
    """Logits whose softmax is `first_weight` of the first's and the rest of the second's; (batch, classes)."""
    probabilities = first_weight * first.softmax(1) + (1 - first_weight) * second.softmax(1)
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


@dataclass(frozen=True)
class Batch:
    """What an objective may look at, all for one subnet and one batch.

    Attributes
    ----------
    labels : Tensor of shape (batch,)
    clean : Tensor of shape (batch, classes), optional
        The network's logits on the clean images.
    teacher : Tensor of shape (batch, classes), optional
        The teacher's logits on the clean images.
    adv : Tensor of shape (batch, classes), optional
        The network's logits on the adversarial images.
    """

    labels: Tensor
    clean: Tensor | None = None
    teacher: Tensor | None = None
    adv: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """A training objective: the adversary's goal by name (None: no attack) and the loss, with what the loss needs."""

    inner: str | None
    loss: Callable[..., Tensor]
    needs_clean: bool
    needs_teacher: bool
    options: tuple[str, ...] = ()


INNER_OBJECTIVES: dict[str, Callable[[Batch], InnerObjective]] = {
    "ce": lambda batch: CrossEntropy(batch.labels),
    "margin": lambda batch: Margin(batch.labels),
    "kl_clean": lambda batch: KLToTarget(batch.clean),
    "kl_teacher": lambda batch: KLToTarget(batch.teacher),
}
OBJECTIVES: dict[str, Objective] = {
    "plain": Objective(None, lambda batch: F.cross_entropy(batch.clean, batch.labels), True, False),
    "pgd_at": Objective(
        "ce",
        lambda batch: F.cross_entropy(batch.adv, batch.labels),
        False,
        False,
    ),
    "trades": Objective(
        "kl_clean",
        lambda batch, beta: trades_loss(batch.clean, batch.adv, batch.labels, beta=beta),
        True,
        False,
        ("beta",),
    ),
    "rslad": Objective(
        "kl_teacher",
        lambda batch, adv_weight: rslad_loss(batch.clean, batch.adv, batch.teacher, adv_weight=adv_weight),
        True,
        True,
        ("adv_weight",),
    ),
}
