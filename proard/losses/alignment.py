"""Add-ons to any distillation loss: the student shall change with its input as the teacher does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.losses.divergence import kl_to_teacher

NORMS = ("l2", "l1", "l2_squared")


def loss_gradient(logits: Tensor, images: Tensor, labels: Tensor, *, create_graph: bool = False) -> Tensor:
    """Gradient of the summed cross-entropy with respect to the images, of their shape.

    Parameters
    ----------
    logits : Tensor of shape (batch, classes)
        Computed from `images`, which must have required a gradient then.
    images : Tensor of shape (batch, channels, height, width)
        Network inputs in [0, 1].
    labels : Tensor of shape (batch,)
        Class indices.
    create_graph : bool
        Keep the gradient differentiable with respect to the weights: on for a student, off for a teacher.

    Returns
    -------
    Tensor of the shape of `images`
        Nats per pixel unit. Summed, not averaged over images: each image's gradient is its own loss's. Where batch norm
        uses the batch's statistics, an image's gradient also holds what it does to the others.
    """
    loss = F.cross_entropy(logits, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images, create_graph=create_graph)
    return gradient


def gradient_gap(student_gradient: Tensor, teacher_gradient: Tensor, *, norm: str = "l2") -> Tensor:
    """Norm of the difference of two input gradients, image by image, of shape (batch,).

    `l2` is the KDIGA paper's; `l1` is dual to an L-infinity adversary: eps times it bounds what alignment controls of
    the difference of the two losses in the ball; `l2_squared` has a gradient that fades near zero.
    """
    gap = (student_gradient - teacher_gradient).flatten(1)
    if norm == "l1":
        return gap.abs().sum(1)
    return gap.square().sum(1) if norm == "l2_squared" else torch.linalg.vector_norm(gap, dim=1)


def kdiga_term(
    student_logits: Tensor, images: Tensor, labels: Tensor, teacher_gradient: Tensor, *, norm: str = "l2"
) -> Tensor:
    """Distance of the student's input gradient from the teacher's (KDIGA), by double backward through the student.

    Parameters
    ----------
    student_logits : Tensor of shape (batch, classes)
        At `images`, with their graph.
    images : Tensor of shape (batch, channels, height, width)
        Clean (KDIGA, KDIGA-ARD_C) or adversarial images (KDIGA-ARD_A).
    labels : Tensor of shape (batch,)
        Class indices.
    teacher_gradient : Tensor of the shape of `images`
        `loss_gradient` of the teacher at the same images; a constant.
    norm : {'l2', 'l1', 'l2_squared'}
        Norm of an image's difference.

    Returns
    -------
    Tensor of shape ()
        mean_i || grad CE(S(x_i), y_i) - grad CE(T(x_i), y_i) ||.

    Notes
    -----
    The authors' code takes one L2 norm over the whole batch of gradients of the batch-mean cross-entropy and divides it
    by the batch size; its weights (gamma 1 to 1000) are therefore larger than those that fit here, by up to the square
    of the batch size. A version before October 2021 detached both gradients, which left the term without effect.

    References
    ----------
    Shao et al., How and When Adversarial Robustness Transfers in Knowledge Distillation?, arXiv:2110.12072.
    """
    student_gradient = loss_gradient(student_logits, images, labels, create_graph=True)
    return gradient_gap(student_gradient, teacher_gradient.detach(), norm=norm).mean()


def igdm_term(student_adv: Tensor, student_mirrored: Tensor, teacher_adv: Tensor, teacher_mirrored: Tensor) -> Tensor:
    """Match input gradients by finite differences along the attack (IGDM), without double backward.

    Parameters
    ----------
    student_adv, student_mirrored : Tensor of shape (batch, classes)
        Student logits at x + d and x - d, d = x' - x; the gradient flows through both.
    teacher_adv, teacher_mirrored : Tensor of shape (batch, classes)
        Teacher logits at the same points.

    Returns
    -------
    Tensor of shape ()
        KL(softmax(t(x + d) - t(x - d)) || softmax(s(x + d) - s(x - d))), nats, averaged over images.

    Notes
    -----
    x - d is not clipped to the pixel range, as in the authors' code.

    References
    ----------
    Lee et al., Indirect Gradient Matching for Adversarial Robust Distillation, ICLR 2025, arXiv:2312.03286.
    """
    return kl_to_teacher(student_adv - student_mirrored, (teacher_adv - teacher_mirrored).detach()).mean()
