"""Compares pairs of networks on the same images: whether the one with the gradient nearer the teacher's is robust."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from proard.artifacts import wilson


def mean_interval(values: NDArray[np.float64], *, bootstraps: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Mean over images with its 95 % percentile bootstrap interval."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(bootstraps, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


@dataclass(frozen=True)
class Pairing:
    """Two networks on the same images.

    Attributes
    ----------
    first_only, second_only : int
        Number of images on which only this one is robust.
    mcnemar_p : float
        Two-sided exact P value of equal robust accuracy.
    first_nearer : float
        Share of images at which the first network's gradient gap is the smaller one; ties count one half.
    gap_p : float
        Two-sided P value of Wilcoxon's signed-rank test of equal gaps; 1 where all are equal.
    nearer_robust : float
        Among the images on which exactly one of them is robust, the share at which that one has the smaller gap; NaN
        without such images.
    nearer_robust_low, nearer_robust_high : float
        Its 95 % Wilson interval.
    nearer_robust_p : float
        Two-sided exact P value of a share of one half: alignment does not predict which of the two is robust.
    """

    first_only: int
    second_only: int
    mcnemar_p: float
    first_nearer: float
    gap_p: float
    nearer_robust: float
    nearer_robust_low: float
    nearer_robust_high: float
    nearer_robust_p: float


def pairing(
    first_robust: NDArray[np.bool_],
    second_robust: NDArray[np.bool_],
    first_gap: NDArray[np.float64],
    second_gap: NDArray[np.float64],
) -> Pairing:
    """Compare two networks image by image.

    An image is often hard or easy for both networks, and hard images have large gradients. This alone correlates
    alignment with robustness over images. Only images on which exactly one of two networks is robust show whether it
    is the better aligned one.

    Parameters
    ----------
    first_robust, second_robust : ndarray of shape (n,)
        bool, by image.
    first_gap, second_gap : ndarray of shape (n,)
        Norm of the difference of the network's input gradient from the teacher's.
    """
    first_only, second_only = first_robust & ~second_robust, second_robust & ~first_robust
    discordant = int(first_only.sum() + second_only.sum())
    difference = second_gap - first_gap  # positive where the first is nearer
    nearer = (difference > 0) + 0.5 * (difference == 0)
    agreeing = np.where(first_only, difference > 0, difference < 0)[(first_only | second_only) & (difference != 0)]
    wins, decided = int(agreeing.sum()), len(agreeing)
    low, high = wilson(wins, decided) if decided else (float("nan"), float("nan"))
    return Pairing(
        first_only=int(first_only.sum()),
        second_only=int(second_only.sum()),
        mcnemar_p=_even_p(int(first_only.sum()), discordant),
        first_nearer=float(nearer.mean()),
        gap_p=float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0,
        nearer_robust=wins / decided if decided else float("nan"),
        nearer_robust_low=low,
        nearer_robust_high=high,
        nearer_robust_p=_even_p(wins, decided),
    )


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """P values corrected for as many comparisons by the step-down method of Holm (1979), in the order given."""
    order, count = np.argsort(p_values), len(p_values)
    corrected = np.maximum.accumulate((count - np.arange(count)) * p_values[order])
    found = np.empty(count)
    found[order] = np.minimum(corrected, 1.0)
    return found


def _even_p(successes: int, trials: int) -> float:
    """Two-sided exact P value of a share of one half; 1 without trials."""
    return float(stats.binomtest(successes, trials).pvalue) if trials else 1.0
