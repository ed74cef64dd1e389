"""Quality of predictions on held-out archs, the ceiling set by label noise, and the columns of both tables."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
from scipy.stats import kendalltau, rankdata

from proard.artifacts.tables import FLAG, FLOAT, INT, TEXT

QUALITY: dict[str, tuple[pa.DataType, str]] = {
    "model": (TEXT, "name of the model"),
    "chosen": (FLAG, "the model with the best mean cross-validated tau of robust_acc; the predictor is this one"),
    "target": (TEXT, "clean_acc or robust_acc"),
    "num_train": (INT, "archs that the model was fitted on for this row"),
    "num_held_out": (INT, "held-out archs of this row"),
    "cv_tau": (FLOAT, "Kendall tau-b, mean over the folds of the training archs"),
    "kendall_tau": (FLOAT, "Kendall tau-b of predicted and measured, held-out archs"),
    "kendall_tau_low": (FLOAT, "95 % bootstrap over held-out archs"),
    "kendall_tau_high": (FLOAT, "95 % bootstrap over held-out archs"),
    "spearman": (FLOAT, "Spearman's rho of predicted and measured, held-out archs"),
    "spearman_low": (FLOAT, "95 % bootstrap over held-out archs"),
    "spearman_high": (FLOAT, "95 % bootstrap over held-out archs"),
    "r2": (FLOAT, "share of the variance explained, held-out archs"),
    "rmse": (FLOAT, "fraction, root of the mean squared error, held-out archs"),
    "top_k": (INT, "the k of top_k_regret"),
    "top_k_regret": (FLOAT, "fraction, best measured value minus the best measured among the k predicted best"),
    "noise_ceiling": (FLOAT, "Kendall tau to the label expected of a predictor without any error, held-out archs"),
    "noise_ceiling_low": (FLOAT, "95 % bootstrap over held-out archs"),
    "noise_ceiling_high": (FLOAT, "95 % bootstrap over held-out archs"),
    "noise_ceiling_all": (FLOAT, "the same from all archs"),
    "noise_ceiling_all_low": (FLOAT, "95 % bootstrap over all archs"),
    "noise_ceiling_all_high": (FLOAT, "95 % bootstrap over all archs"),
    "tau_over_ceiling": (FLOAT, "kendall_tau / noise_ceiling; exceeds 1 by sampling noise only"),
    "seconds": (FLOAT, "wall seconds of cross-validation and fit, both targets"),
    "seed": (INT, "seed of split, folds and model"),
}
HELD_OUT: dict[str, tuple[pa.DataType, str]] = {
    "arch_id": (TEXT, "stable hash of the canonical arch"),
    "macs": (INT, "multiply-accumulates of one image"),
    "model": (TEXT, "the chosen model, fitted on the other archs"),
    "clean_acc": (FLOAT, "fraction, measured"),
    "robust_acc": (FLOAT, "fraction, measured"),
    "predicted_clean_acc": (FLOAT, "fraction, predicted"),
    "predicted_robust_acc": (FLOAT, "fraction, predicted"),
    "seed": (INT, "seed of split and model"),
}


def kendall_tau(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's tau-b of two vectors; NaN where one of them is constant."""
    return float(kendalltau(first, second, method="asymptotic").statistic)


def noise_ceiling(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's tau that a predictor without any error would have with noisy labels.

    Parameters
    ----------
    first, second : ndarray of shape (n,)
        The label of the same archs on two disjoint halves of the images.

    Returns
    -------
    float in [0, 1]
        (2 / pi) arcsin sqrt(r), with r = 2 h / (1 + h) and h Pearson's correlation of the halves; 0 where h is not
        positive, NaN where a half is constant.

    Notes
    -----
    r is the reliability of a label on all images (Spearman-Brown). sqrt(r) is its correlation with the accuracy without
    noise. The arcsine converts it into Kendall's tau of a bivariate normal distribution (Greiner). Noise is that of the
    choice of images.

    References
    ----------
    Spearman, Correlation calculated from faulty data, 1910; Kendall, Rank Correlation Methods, 1948.
    """
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    half = float(np.corrcoef(first, second)[0, 1])
    reliability = min(2 * half / (1 + half), 1.0) if half > 0 else 0.0
    return float(2 / np.pi * np.arcsin(np.sqrt(reliability)))


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rho of two vectors; NaN where one of them is constant."""
    ranks = np.stack([rankdata(first), rankdata(second)])
    if np.any(np.ptp(ranks, axis=1) == 0):
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def r2(measured: np.ndarray, predicted: np.ndarray) -> float:
    """Share of the variance that predictions explain; negative if the mean predicts better, NaN without variance."""
    variance = np.square(measured - measured.mean()).sum()
    return float(1 - np.square(measured - predicted).sum() / variance) if variance > 0 else float("nan")


def rmse(measured: np.ndarray, predicted: np.ndarray) -> float:
    """Root of the mean squared error."""
    return float(np.sqrt(np.square(measured - predicted).mean()))


def top_k_regret(measured: np.ndarray, predicted: np.ndarray, k: int) -> float:
    """Loss from measuring only the k archs with the highest predictions.

    Parameters
    ----------
    measured, predicted : ndarray of shape (n,)
        Values of the same archs.
    k : int
        Number of archs that are measured; among equal predictions the earlier archs count.

    Returns
    -------
    float, at least 0
        max(measured) - max(measured among those k).
    """
    best = np.argsort(-predicted, kind="stable")[:k]
    return float(measured.max() - measured[best].max())


def bootstrap_interval(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    first: np.ndarray,
    second: np.ndarray,
    *,
    draws: int,
    seed: int,
) -> tuple[float, float]:
    """95 % percentile interval of a statistic of paired vectors, over resampled pairs.

    Resamples of equally long vectors are the same at the same seed, so that models are compared on equal draws.
    """
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        rows = rng.integers(0, len(first), len(first))
        values.append(statistic(first[rows], second[rows]))
    finite = np.asarray(values)[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)
