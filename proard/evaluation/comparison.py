"""Statistics of variants measured on the same subnets and images: means with intervals over seeds and images.

Outcomes are bool arrays of shape (seeds, archs, images): whether a seed's subnet is right on an image. Archs stand in
the order of rising MACs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

SUBNETS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # accuracies of shape (..., archs) to (...)
    "mean": lambda accuracy: accuracy.mean(axis=-1),
    "worst": lambda accuracy: accuracy.min(axis=-1),
    "smallest": lambda accuracy: accuracy[..., 0],
    "largest": lambda accuracy: accuracy[..., -1],
}
CHUNK = 100  # redraws at a time


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval."""

    value: float
    low: float
    high: float


def image_weights(images: int, *, bootstraps: int, seed: int) -> np.ndarray:
    """How often each image occurs in each redraw, of shape (bootstraps, images); the same for all that is compared."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=bootstraps)


def redrawn(outcomes: np.ndarray, weights: np.ndarray, subnet: str) -> np.ndarray:
    """A subnet statistic in every redraw of the images, of shape (bootstraps, seeds)."""
    flat = outcomes.reshape(-1, outcomes.shape[-1]).T.astype(np.float32)  # (images, seeds * archs)
    parts = [weights[start : start + CHUNK].astype(np.float32) @ flat for start in range(0, len(weights), CHUNK)]
    accuracy = np.concatenate(parts).reshape(len(weights), *outcomes.shape[:2]) / outcomes.shape[-1]
    return SUBNETS[subnet](accuracy)


def estimate(per_seed: np.ndarray, per_redraw: np.ndarray) -> Estimate:
    """Mean over seeds, with an interval that covers other seeds and other images.

    Parameters
    ----------
    per_seed : ndarray of shape (seeds,)
        The statistic on all images.
    per_redraw : ndarray of shape (bootstraps,)
        Its mean over seeds in each redraw of the images.

    Returns
    -------
    Estimate
        mean +- sqrt((t s / sqrt(n))^2 + (1.96 b)^2): s is the standard deviation over the n seeds, t Student's 97.5 %
        quantile at n - 1 degrees of freedom (4.30 for three seeds), b the standard deviation over the redraws. With one
        seed the interval is over images alone.
    """
    count, value = len(per_seed), float(per_seed.mean())
    over_seeds = 0.0
    if count > 1:
        over_seeds = float(student_t.ppf(0.975, count - 1) * per_seed.std(ddof=1) / np.sqrt(count))
    over_images = 1.959963984540054 * float(per_redraw.std(ddof=1)) if len(per_redraw) > 1 else 0.0
    half = float(np.hypot(over_seeds, over_images))
    return Estimate(value, value - half, value + half)


def accuracy_of(outcomes: np.ndarray, weights: np.ndarray, subnet: str) -> Estimate:
    """Accuracy of `mean`, `worst`, `smallest` or `largest` subnet; the worst one is found in each redraw anew."""
    per_seed = SUBNETS[subnet](outcomes.mean(axis=-1))
    return estimate(per_seed, redrawn(outcomes, weights, subnet).mean(axis=1))


def gain_over(outcomes: np.ndarray, baseline: np.ndarray, weights: np.ndarray, subnet: str) -> Estimate:
    """Accuracy less the baseline's, seed by seed and image by image.

    Raises
    ------
    ValueError
        The two were not measured with equally many seeds, archs and images.
    """
    if outcomes.shape != baseline.shape:
        raise ValueError(f"outcomes of shape {outcomes.shape} against a baseline of shape {baseline.shape}")
    per_seed = SUBNETS[subnet](outcomes.mean(axis=-1)) - SUBNETS[subnet](baseline.mean(axis=-1))
    per_redraw = redrawn(outcomes, weights, subnet) - redrawn(baseline, weights, subnet)
    return estimate(per_seed, per_redraw.mean(axis=1))
