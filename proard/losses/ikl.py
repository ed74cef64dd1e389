"""IKL: TRADES with the divergence decoupled into soft labels and a distance of logits weighted by class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.losses.objectives import OBJECTIVES, Batch, Memory, Objective


def ikl_loss(
    clean: Tensor, adv: Tensor, labels: Tensor, class_weights: Tensor, *, soft_weight: float = 4.0, beta: float = 20.0
) -> Tensor:
    """Cross-entropy on clean images, soft labels on adversarial ones, and a weighted distance of logit differences.

    Parameters
    ----------
    clean, adv : Tensor of shape (batch, classes)
        The network's logits. The gradient flows through both, but not through the soft labels.
    labels : Tensor of shape (batch,)
        Class indices, which choose the weights.
    class_weights : Tensor of shape (classes, classes)
        Rows that sum to 1: the mean output for images of a class in the pass before.
    soft_weight, beta : float
        Weights of the soft labels and of the distance (the released code's alpha and beta on CIFAR-10).

    Returns
    -------
    Tensor of shape ()
        CE(S(x), y) + alpha CE(S(x'), s(x)) + beta / 4 sum_jk p_j p_k (D_jk(x) - D_jk(x'))^2, where p are the weights of
        class y and D_jk = S_j - S_k; nats, averaged over images.

    Notes
    -----
    The double sum is twice the variance of S(x) - S(x') under p, which is what is computed. In the KL divergence the
    distance acts on the adversarial logits alone and is weighted by each image's own output: there both are changed.
    The attack ascends the divergence to s(x).

    References
    ----------
    Cui et al., Decoupled Kullback-Leibler Divergence Loss, NeurIPS 2024, arXiv:2305.13948, equation of L_IKL.
    """
    soft = F.cross_entropy(adv, clean.detach().softmax(1))
    weights, moved = class_weights.to(clean)[labels], clean - adv
    mean = (weights * moved).sum(1, keepdim=True)
    variance = (weights * (moved - mean) ** 2).sum(1)
    return F.cross_entropy(clean, labels) + soft_weight * soft + beta / 2 * variance.mean()


def _memory(classes: int, **options: float) -> Memory:
    """Equal weights; no outputs yet."""
    return {
        "class_weights": torch.full((classes, classes), 1 / classes),
        "class_outputs": torch.zeros(classes, classes),
        "data_pass": torch.zeros(1),
    }


def _remember(batch: Batch, *, temperature: float, **options: float) -> Memory:
    """Outputs summed by class over the pass; when a new one begins, the weights that follow from the one before."""
    old = batch.memory
    begins = old["data_pass"] != batch.data_pass
    sums = old["class_outputs"].sum(1, keepdim=True)
    found = torch.where(sums > 0, old["class_outputs"] / sums.clamp_min(1), old["class_weights"])
    outputs = (batch.clean.detach() / temperature).softmax(1).to(sums)
    kept = old["class_outputs"] * (~begins).to(sums)
    return {
        "class_weights": torch.where(begins, found, old["class_weights"]),
        "class_outputs": kept.index_add(0, batch.labels, outputs),
        "data_pass": torch.full_like(old["data_pass"], batch.data_pass),
    }


def _ikl(batch: Batch, *, temperature: float, **options: float) -> Tensor:
    """IKL at the remembered weights."""
    return ikl_loss(batch.clean, batch.adv, batch.labels, batch.memory["class_weights"], **options)


OBJECTIVES["ikl"] = Objective("kl_clean", _ikl, frozenset({"clean", "adv"}), _memory, _remember)
