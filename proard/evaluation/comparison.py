"""Statistics of supernets measured at the same archs and images: means with intervals over seeds and images.

Outcomes are bool arrays of shape (seeds, archs, images): whether a seed's subnet classifies an image correctly. Archs
are in the order of increasing MACs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

from proard.artifacts import ArtifactError
from proard.config import UserError

SUBNETS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # accuracies of shape (..., archs) to (...)
    "mean": lambda accuracy: accuracy.mean(axis=-1),
    "worst": lambda accuracy: accuracy.min(axis=-1),
    "smallest": lambda accuracy: accuracy[..., 0],
    "largest": lambda accuracy: accuracy[..., -1],
}
CHUNK = 100  # redraws at a time
COUNTED = ("optimizer_steps", "train_images", "train_forward_equivalents")
SPENT = (*COUNTED, "train_macs", "train_seconds")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval."""

    value: float
    low: float
    high: float


def image_weights(images: int, *, bootstraps: int, seed: int) -> np.ndarray:
    """How often each image occurs in each redraw, of shape (bootstraps, images); every comparison uses the same."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=bootstraps)


def redrawn_mean(outcomes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over images, the last axis of `outcomes`, in every redraw: of shape (bootstraps, ...) without that axis."""
    flat = outcomes.reshape(-1, outcomes.shape[-1]).T.astype(np.float64)  # (images, networks)
    parts = [weights[start : start + CHUNK] @ flat for start in range(0, len(weights), CHUNK)]
    return np.concatenate(parts).reshape(len(weights), *outcomes.shape[:-1]) / outcomes.shape[-1]


def redrawn(outcomes: np.ndarray, weights: np.ndarray, subnet: str) -> np.ndarray:
    """A subnet statistic in every redraw of the images, of shape (bootstraps, seeds)."""
    return SUBNETS[subnet](redrawn_mean(outcomes, weights))


def estimate(per_seed: np.ndarray, per_redraw: np.ndarray) -> Estimate:
    """Mean over seeds, with an interval for the choice of seeds and of images.

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
        quantile at n - 1 degrees of freedom (4.30 for three seeds), b the standard deviation over the redraws. With
        one seed the interval is for the choice of images only.
    """
    count, value = len(per_seed), float(per_seed.mean())
    over_seeds = 0.0
    if count > 1:
        over_seeds = float(student_t.ppf(0.975, count - 1) * per_seed.std(ddof=1) / np.sqrt(count))
    over_images = 1.959963984540054 * float(per_redraw.std(ddof=1)) if len(per_redraw) > 1 else 0.0
    half = float(np.hypot(over_seeds, over_images))
    return Estimate(value, value - half, value + half)


def accuracy_of(outcomes: np.ndarray, weights: np.ndarray, subnet: str) -> Estimate:
    """Accuracy of `mean`, `worst`, `smallest` or `largest` subnet; each redraw selects its own worst subnet."""
    per_seed = SUBNETS[subnet](outcomes.mean(axis=-1))
    return estimate(per_seed, redrawn(outcomes, weights, subnet).mean(axis=1))


def gain_over(outcomes: np.ndarray, baseline: np.ndarray, weights: np.ndarray, subnet: str) -> Estimate:
    """Accuracy minus the baseline's, paired by seed and image.

    Raises
    ------
    ValueError
        The two differ in the number of seeds, archs or images.
    """
    if outcomes.shape != baseline.shape:
        raise ValueError(f"outcomes of shape {outcomes.shape} against a baseline of shape {baseline.shape}")
    per_seed = SUBNETS[subnet](outcomes.mean(axis=-1)) - SUBNETS[subnet](baseline.mean(axis=-1))
    per_redraw = redrawn(outcomes, weights, subnet) - redrawn(baseline, weights, subnet)
    return estimate(per_seed, per_redraw.mean(axis=1))


def gains_of(outcomes: pd.DataFrame, *, baseline: str | None, bootstraps: int, seed: int) -> list[dict[str, Any]]:
    """Accuracy of every group of supernets and its gain over the baseline group, with intervals: rows of GAINS.

    Parameters
    ----------
    outcomes : DataFrame
        TRAININGS rows of supernets.
    baseline : str, optional
        Name of a group; default: the first one.
    bootstraps, seed : int
        Number of redraws of the images, the same for all groups, and their seed.

    Raises
    ------
    ArtifactError
        The groups were measured with other seeds, at other archs or on other images.
    """
    groups = list(dict.fromkeys(outcomes["group"]))
    baseline = baseline or groups[0]
    spent = outcomes.drop_duplicates(["group", "train_seed"]).groupby("group")[list(SPENT)].mean()
    rows: list[dict[str, Any]] = []
    for (split, attack, eps), measured in outcomes.groupby(["split", "attack", "eps"], sort=False):
        found = {name: _stacked(part) for name, part in measured.groupby("group", sort=False)}
        keys = {name: key for name, (key, _) in found.items()}
        strange = [name for name in groups if keys.get(name) != keys.get(baseline)]
        if strange:
            raise ArtifactError(
                f"{', '.join(strange[:6])} and {baseline} were not measured with the same seeds, archs and images; "
                "rerun measure_experiment for these"
            )
        key, right = keys[baseline], {name: stacked for name, (_, stacked) in found.items()}
        count = right[baseline]["clean"].shape[-1]
        weights = image_weights(count, bootstraps=bootstraps, seed=seed)
        for name in groups:
            facts = {"group": name, "split": split, "attack": attack, "eps": eps, "baseline": baseline}
            facts |= {"num_seeds": len(key[0]), "num_archs": len(key[1]), "num_images": count}
            facts |= spent.loc[name].to_dict() | {column: round(spent.loc[name, column]) for column in COUNTED}
            for subnet in SUBNETS:
                rows.append({**facts, "subnet": subnet, **_statistics(right[name], right[baseline], weights, subnet)})
    return rows


def _stacked(rows: pd.DataFrame) -> tuple[tuple[Any, ...], dict[str, np.ndarray]]:
    """Seeds, archs and images of one group, and its clean and robust outcomes of shape (seeds, archs, images)."""
    trainings = [part.sort_values("macs", kind="stable") for _, part in rows.groupby("train_seed")]
    archs = {tuple(part["arch_id"]) for part in trainings}
    counts = set(rows["num_images"])
    if len(archs) > 1 or len(counts) > 1:
        raise ArtifactError(f"seeds of {rows['group'].iloc[0]} were not measured alike; rerun measure_experiment")
    key = (tuple(sorted(set(rows["train_seed"]))), *archs, *counts)
    kinds = ("clean", "robust")
    return key, {kind: np.stack([np.stack(part[kind].to_list()) for part in trainings]).astype(bool) for kind in kinds}


def _statistics(
    outcomes: Mapping[str, np.ndarray], baseline: Mapping[str, np.ndarray], weights: np.ndarray, subnet: str
) -> dict[str, float]:
    """Accuracy and gain of one group, clean and robust, with their intervals."""
    row: dict[str, float] = {}
    for kind in outcomes:
        found = {
            "acc": accuracy_of(outcomes[kind], weights, subnet),
            "gain": gain_over(outcomes[kind], baseline[kind], weights, subnet),
        }
        for what, value in found.items():
            row |= {f"{kind}_{what}": value.value, f"{kind}_{what}_low": value.low, f"{kind}_{what}_high": value.high}
    return row


def check_equal_effort(outcomes: pd.DataFrame) -> None:
    """Raise an error if trainings with the same rule of equal effort differ in effort by more than its tolerance.

    Raises
    ------
    UserError
        Names the training with the most effort and the one with the least.
    """
    counted = {"forward_equivalents": "train_forward_equivalents", "gradients": "train_gradients"}
    counted["steps"] = "optimizer_steps"
    for text, rows in outcomes.dropna(subset=["effort"]).groupby("effort", sort=False):
        rule = json.loads(text)
        (name,) = counted.keys() & rule.keys()
        amounts = rows.groupby("training")[counted[name]].first()
        least, most = amounts.idxmin(), amounts.idxmax()
        if amounts[most] > (1 + rule["tolerance"]) * amounts[least]:
            raise UserError(
                f"{most} took {amounts[most]:,} {name.replace('_', '-')}, {least} {amounts[least]:,}: more than "
                f"effort.tolerance, {rule['tolerance']:g}, apart; raise it, or leave effort out of one"
            )
