"""Losses of robust training without a teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.losses.divergence import kl_to_teacher
from proard.losses.objectives import OBJECTIVES, Objective

HELPER_REACH = 2.0  # HAT's helper images: the clean image plus this multiple of the perturbation


def sat_loss(adv: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy on adversarial images: standard adversarial training (SAT), also called PGD-AT.

    Parameters
    ----------
    adv : Tensor of shape (batch, classes)
        The network's logits on adversarial images.
    labels : Tensor of shape (batch,)
        Class indices.

    Returns
    -------
    Tensor of shape ()
        -log p_y(x') in nats, averaged over images.

    References
    ----------
    Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, arXiv:1706.06083, eq. 2.1.
    """
    return F.cross_entropy(adv, labels)


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


def mart_loss(clean: Tensor, adv: Tensor, labels: Tensor, *, beta: float = 6.0) -> Tensor:
    """Boosted cross-entropy on adversarial images plus a divergence that counts most where clean images are missed.

    Parameters
    ----------
    clean, adv : Tensor of shape (batch, classes)
        The network's logits; the gradient flows through both, also through the weight 1 - p_y(x).
    labels : Tensor of shape (batch,)
        Class indices.
    beta : float
        Weight of the divergence (the paper's lambda; 5 to 6 in the literature).

    Returns
    -------
    Tensor of shape ()
        -log p_y(x') - log(1 - max_{k != y} p_k(x')) + beta (1 - p_y(x)) KL(p(x) || p(x')), nats, averaged over images.

    Notes
    -----
    log(1 - p_k) is computed from the logits of the other classes; the authors' code takes log(1.0001 - p_k), which
    caps it at 9.2.

    References
    ----------
    Wang et al., Improving Adversarial Robustness Requires Revisiting Misclassified Examples, ICLR 2020.
    """
    true = labels[:, None]
    strongest = adv.detach().scatter(1, true, -torch.inf).argmax(1, keepdim=True)
    log_others = adv.scatter(1, strongest, -torch.inf).logsumexp(1) - adv.logsumexp(1)  # log(1 - p_k), (batch,)
    boosted = F.cross_entropy(adv, labels, reduction="none") - log_others
    missed = 1 - clean.softmax(1).gather(1, true)[:, 0]
    return (boosted + beta * missed * kl_to_teacher(adv, clean)).mean()


def hat_loss(
    clean: Tensor,
    adv: Tensor,
    beyond: Tensor,
    labels: Tensor,
    helper_adv: Tensor,
    *,
    beta: float = 2.5,
    helper_weight: float = 0.5,
) -> Tensor:
    """TRADES plus cross-entropy beyond the adversarial image, where a plainly trained helper says what it is.

    Parameters
    ----------
    clean, adv, beyond : Tensor of shape (batch, classes)
        The network's logits at x, at x' and at x + h (x' - x), which is outside the ball; h is 2 in the paper.
    labels : Tensor of shape (batch,)
        Class indices of the clean images.
    helper_adv : Tensor of shape (batch, classes)
        Logits of a plainly trained network at x'; its choice is the label beyond.
    beta : float
        Weight of the divergence.
    helper_weight : float
        Weight of the helper term (the paper's gamma).

    Returns
    -------
    Tensor of shape ()
        CE(f(x), y) + beta KL(f(x) || f(x')) + gamma CE(f(x + h r), argmax helper(x')), nats, averaged over images.

    Notes
    -----
    Points beyond are not clipped to the pixel range, as in the authors' code. ProARD's copy passes no helper: its
    labels are the trained network's own, which makes the term empty.

    References
    ----------
    Rade and Moosavi-Dezfooli, Reducing Excessive Margin to Achieve a Better Accuracy vs. Robustness Trade-off,
    ICLR 2022.
    """
    return trades_loss(clean, adv, labels, beta=beta) + helper_weight * F.cross_entropy(beyond, helper_adv.argmax(1))


# --- the objectives of training -------------------------------------------------------------------------------------

OBJECTIVES.update(
    {
        "plain": Objective(None, lambda batch: F.cross_entropy(batch.clean, batch.labels), frozenset({"clean"})),
        "pgd_at": Objective("ce", lambda batch: sat_loss(batch.adv, batch.labels), frozenset({"adv"})),
        "trades": Objective(
            "kl_clean",
            lambda batch, beta: trades_loss(batch.clean, batch.adv, batch.labels, beta=beta),
            frozenset({"clean", "adv"}),
        ),
        "mart": Objective(
            "ce",
            lambda batch, beta: mart_loss(batch.clean, batch.adv, batch.labels, beta=beta),
            frozenset({"clean", "adv"}),
        ),
        "hat": Objective(
            "kl_clean",
            lambda batch, **options: hat_loss(
                batch.clean, batch.adv, batch.beyond, batch.labels, batch.control_adv, **options
            ),
            frozenset({"clean", "adv", "beyond", "control_adv"}),
        ),
    }
)
OBJECTIVES["sat"] = OBJECTIVES["pgd_at"]  # its other name in the literature
