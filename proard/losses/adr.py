"""ADR: adversarial training on soft labels from the average of the network's own weights."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from proard.losses.objectives import OBJECTIVES, Batch, Objective


def adr_loss(adv: Tensor, average: Tensor, labels: Tensor, *, soft_weight: float, temperature: float) -> Tensor:
    """Cross-entropy on adversarial images with labels that mix the truth and the averaged network's clean outputs.

    Parameters
    ----------
    adv : Tensor of shape (batch, classes)
        The network's logits on adversarial images.
    average : Tensor of shape (batch, classes)
        Logits of the network with averaged weights on the clean images. No gradient flows into them.
    labels : Tensor of shape (batch,)
        Class indices.
    soft_weight : float in [0, 1]
        Weight of the soft labels (the paper's lambda).
    temperature : float
        Of the soft labels (the paper's tau).

    Returns
    -------
    Tensor of shape ()
        CE(S(x'), l p + (1 - l) y), nats, averaged over images, where p are the averaged network's outputs and
        l = clip(lambda - (max_k p_k - p_y), 0, 1): the more the averaged network prefers another class, the less it
        counts, so that the true class keeps the largest share.

    References
    ----------
    Wu et al., Annealing Self-Distillation Rectification Improves Adversarial Training, ICLR 2024, arXiv:2305.12118.
    """
    soft = (average.detach() / temperature).softmax(1)
    missed = soft.amax(1, keepdim=True) - soft.gather(1, labels[:, None])
    weight = (soft_weight - missed).clamp(0, 1)
    hard = F.one_hot(labels, soft.shape[1]).to(soft)
    return F.cross_entropy(adv, weight * soft + (1 - weight) * hard)


def annealed(ends: tuple[float, float], progress: float) -> float:
    """A value on half a cosine from the first end to the second, at a share of the training."""
    first, last = ends
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def _adr(batch: Batch, *, soft_weight: tuple[float, float], temperature: tuple[float, float]) -> Tensor:
    """ADR at this share of the training."""
    now = {"soft_weight": soft_weight, "temperature": temperature}
    options = {name: annealed(ends, batch.progress) for name, ends in now.items()}
    return adr_loss(batch.adv, batch.average, batch.labels, **options)


OBJECTIVES["adr"] = Objective("ce", _adr, frozenset({"adv", "average"}))
