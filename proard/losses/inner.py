"""Inner objectives: what an adversary may ascend, per image, with the gradient in closed form."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.kernels import softmax_difference
from proard.losses.divergence import kl_to_teacher


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


class TargetedMargin:
    """Logit of one wrong class minus the true one: where positive, the image is misclassified.

    Parameters
    ----------
    labels, targets : Tensor of shape (batch,)
        True class and wrong class of every image.
    """

    def __init__(self, labels: Tensor, targets: Tensor) -> None:
        self.labels, self.targets = labels[:, None], targets[:, None]

    def __call__(self, logits: Tensor) -> Tensor:
        """Margin in logit units, of shape (batch,)."""
        return (logits.gather(1, self.targets) - logits.gather(1, self.labels))[:, 0]

    def logit_gradient(self, logits: Tensor) -> Tensor:
        """+1 at the target, -1 at the true class."""
        return torch.zeros_like(logits).scatter_(1, self.targets, 1.0).scatter_(1, self.labels, -1.0)


class KLBetweenNets:
    """KL(softmax(teacher) || softmax(student)) with a teacher that moves with the image.

    Logits are those of both networks side by side, (batch, 2 * classes), the student's first, so that the gradient
    reaches the image through both.
    """

    def __call__(self, logits: Tensor) -> Tensor:
        """KL divergence in nats, of shape (batch,)."""
        return kl_to_teacher(*logits.chunk(2, dim=1))

    def logit_gradient(self, logits: Tensor) -> Tensor:
        """Closed form: s - t for the student's half, t (log t - log s - KL) for the teacher's."""
        log_student, log_teacher = (half.log_softmax(1) for half in logits.chunk(2, dim=1))
        teacher, gap = log_teacher.exp(), log_teacher - log_student
        mean_gap = (teacher * gap).sum(1, keepdim=True)
        return torch.cat([log_student.exp() - teacher, teacher * (gap - mean_gap)], 1)
