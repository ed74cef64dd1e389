"""Distances between the outputs of two networks, per image, in nats, summed over classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kl_to_teacher(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) of every image, in nats, of shape (batch,)."""
    log_teacher = teacher_logits.log_softmax(1)
    return (log_teacher.exp() * (log_teacher - student_logits.log_softmax(1))).sum(1)


def softened_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """tau^2 KL(softmax(teacher / tau) || softmax(student / tau)) of every image, in nats, of shape (batch,).

    tau^2 keeps the gradient's size: without it the gradient falls with 1 / tau^2 (Hinton et al., arXiv:1503.02531).
    """
    return temperature**2 * kl_to_teacher(student_logits / temperature, teacher_logits / temperature)


def alpha_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float, ratio_clip: float = math.inf
) -> Tensor:
    """Alpha-divergence of the student from the teacher, with a gradient whose importance weights are clipped.

    Parameters
    ----------
    student_logits, teacher_logits : Tensor of shape (batch, classes)
        Gradient flows into the student's only.
    alpha : float
        1 is KL(teacher || student), 0 is KL(student || teacher); below 0 the student pays where it believes in classes
        that the teacher rules out, above 0 where it misses classes of the teacher.
    ratio_clip : float
        Largest (teacher / student)^alpha; at alpha = 0 the largest teacher / student; at alpha = 1 nothing is clipped.

    Returns
    -------
    Tensor of shape (batch,)
        sum_k q_k ((p_k / q_k)^alpha - 1) / (alpha (alpha - 1)), p the teacher's, q the student's probabilities.

    Notes
    -----
    The gradient is -sum_k q_k rho_k grad log q_k with rho = (p / q)^alpha / alpha. It is that of the value where
    nothing is clipped; where something is, value and gradient part, as in the paper.

    References
    ----------
    Wang et al., AlphaNet: Improved Training of Supernets with Alpha-Divergence, ICML 2021, arXiv:2102.07954.
    """
    log_student, log_teacher = student_logits.log_softmax(1), teacher_logits.detach().log_softmax(1)
    log_ratio = log_teacher - log_student.detach()
    student = log_student.detach().exp()
    if alpha == 1:
        weight = log_teacher.exp()
        value = (weight * log_ratio).sum(1)
    elif alpha == 0:
        clipped = log_ratio.clamp(max=math.log(ratio_clip))
        weight = student * (clipped - 1)
        value = -(student * clipped).sum(1)
    else:
        power = (alpha * log_ratio).exp().clamp(max=ratio_clip)
        weight = student * power / alpha
        value = (student * (power - 1)).sum(1) / (alpha * (alpha - 1))
    surrogate = -(weight * log_student).sum(1)
    return value + (surrogate - surrogate.detach())


def mix_logits(first: Tensor, second: Tensor, *, first_weight: float) -> Tensor:
    """Logits whose softmax is `first_weight` of the first's and the rest of the second's; (batch, classes)."""
    probabilities = first_weight * first.softmax(1) + (1 - first_weight) * second.softmax(1)
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
