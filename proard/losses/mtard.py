"""MTARD: a robust and a plain teacher, whose terms are balanced during the training."""

from __future__ import annotations

import torch
from torch import Tensor

from proard.losses.divergence import kl_to_teacher
from proard.losses.objectives import OBJECTIVES, Batch, Memory, Objective


def mtard_loss(
    student_clean: Tensor, student_adv: Tensor, clean_teacher: Tensor, robust_teacher_adv: Tensor, *, adv_share: Tensor
) -> Tensor:
    """Two teachers: a robust one at adversarial images, a plainly trained one at clean images.

    Parameters
    ----------
    student_clean, student_adv : Tensor of shape (batch, classes)
        Student logits.
    clean_teacher, robust_teacher_adv : Tensor of shape (batch, classes)
        The plainly trained network at x, the robust teacher at x'.
    adv_share : Tensor of shape (1,)
        Share of the adversarial term, moved by `balanced_share` from 0.5 on.

    Returns
    -------
    Tensor of shape ()
        w KL(t_robust(x') || s(x')) + (1 - w) KL(t_clean(x) || s(x)), nats, averaged over images.

    References
    ----------
    Zhao et al., Enhanced Accuracy and Robustness via Multi-Teacher Adversarial Distillation, ECCV 2022.
    """
    adv = kl_to_teacher(student_adv, robust_teacher_adv.detach()).mean()
    clean = kl_to_teacher(student_clean, clean_teacher.detach()).mean()
    share = adv_share.to(adv).sum()  # of shape (), in the losses' precision
    return share * adv + (1 - share) * clean


def balanced_share(share: Tensor, losses: Tensor, first: Tensor, *, balance_rate: float = 0.025) -> Tensor:
    """MTARD's next share of the adversarial term: it drifts to the term that has fallen less.

    Parameters
    ----------
    share : Tensor of shape (1,)
        Share before.
    losses, first : Tensor of shape (2,)
        Adversarial and clean divergence, of this batch and of the first batch of the training.
    balance_rate : float in [0, 1]
        Rate of the drift.

    Returns
    -------
    Tensor of shape (1,)
        w + rate (r_adv / (r_adv + r_clean) - w) with r = loss / first loss.

    Notes
    -----
    The authors' code lowers the rate with the learning rate, by 10 at epochs 215, 260 and 285 of 300; here it is
    constant. Subnets of one step move one share in turn.
    """
    relative = losses / first.clamp_min(torch.finfo(first.dtype).tiny)
    return share + balance_rate * (relative[:1] / relative.sum().clamp_min(torch.finfo(share.dtype).tiny) - share)


def _mtard_memory(classes: int, *, balance_rate: float) -> Memory:
    """Equal shares; the first losses are unknown (0)."""
    return {"adv_share": torch.full((1,), 0.5), "first_losses": torch.zeros(2)}


def _mtard_remember(batch: Batch, *, balance_rate: float) -> Memory:
    """The first batch's losses, and the share of this batch."""
    pairs = ((batch.adv, batch.teacher_adv), (batch.clean, batch.control))
    losses = torch.stack([kl_to_teacher(*pair).detach().mean() for pair in pairs])
    first = batch.memory["first_losses"]
    first = torch.where(first == 0, losses.to(first), first)
    share = balanced_share(batch.memory["adv_share"], losses.to(first), first, balance_rate=balance_rate)
    return {"adv_share": share, "first_losses": first}


def _mtard(batch: Batch, *, balance_rate: float) -> Tensor:
    """MTARD at the remembered share."""
    share = batch.memory["adv_share"]
    return mtard_loss(batch.clean, batch.adv, batch.control, batch.teacher_adv, adv_share=share)


OBJECTIVES["mtard"] = Objective(
    "ce",
    _mtard,
    frozenset({"clean", "adv", "teacher_adv", "control"}),
    _mtard_memory,
    _mtard_remember,
)
