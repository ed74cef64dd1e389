"""Compare models by cross-validation, keep the best, and report every model's quality on held-out archs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from proard.config import FitPredictor, UserError
from proard.predictor.model import TARGETS, Predictor, fit_pipeline, predict_features
from proard.predictor.quality import bootstrap_interval, kendall_tau, noise_ceiling, r2, rmse, spearman, top_k_regret
from proard.space import SearchSpace

ROBUST = TARGETS.index("robust_acc")


class Fit(NamedTuple):
    """Outcome of `fit`.

    Attributes
    ----------
    predictor : Predictor
        The chosen model, fitted on all archs.
    quality : list of dict
        One row per model and target, with the columns of `QUALITY`.
    held_out : ndarray of shape (held_out,)
        Rows that were held out.
    held_out_predictions : ndarray of shape (held_out, 2)
        Their predictions by the chosen model, fitted on the other rows.
    """

    predictor: Predictor
    quality: list[dict[str, Any]]
    held_out: np.ndarray
    held_out_predictions: np.ndarray


def fit(
    genotypes: np.ndarray,
    targets: np.ndarray,
    space: SearchSpace,
    settings: FitPredictor,
    *,
    seed: int,
    halves: np.ndarray | None = None,
    on_fit: Callable[[int, str], None] = lambda fits, model: None,
) -> Fit:
    """Fit the predictor.

    Parameters
    ----------
    genotypes : ndarray of shape (n, genes)
        Measured archs, each once.
    targets : ndarray of shape (n, 2)
        Their `TARGETS`, fractions.
    halves : ndarray of shape (n, 2, 2), optional
        Targets on two disjoint halves of the images (last axis), for the noise ceiling.
    on_fit : callable
        Called as `on_fit(1, name)` after each fit of a model; `num_fits(settings)` times.

    Raises
    ------
    UserError
        There are too few archs for the settings.
    """
    check_numbers(len(genotypes), settings)
    features, targets = space.features(genotypes), np.asarray(targets, dtype=np.float64)
    macs = space.costs(genotypes)["macs"]
    held_out = held_out_rows(macs, settings.held_out, seed=seed)
    train = np.setdiff1d(np.arange(len(genotypes)), held_out)
    folds = stratified_folds(macs[train], settings.folds, seed=seed)

    scores, predictions, seconds = {}, {}, {}
    for name in settings.models:
        started = time.perf_counter()
        taus = []
        for fold in range(settings.folds):
            inside, outside = train[folds != fold], train[folds == fold]
            pipeline = fit_pipeline(name, space, features[inside], targets[inside], seed=seed)
            guess = predict_features(pipeline, features[outside])
            taus.append([kendall_tau(guess[:, column], targets[outside, column]) for column in range(len(TARGETS))])
            on_fit(1, name)
        scores[name] = np.nan_to_num(taus, nan=0.0).mean(axis=0)  # tau of a constant prediction is NaN
        pipeline = fit_pipeline(name, space, features[train], targets[train], seed=seed)
        predictions[name] = predict_features(pipeline, features[held_out])
        seconds[name] = time.perf_counter() - started
        on_fit(1, name)
    chosen = max(settings.models, key=lambda name: scores[name][ROBUST])

    ceilings = _ceilings(halves, held_out, settings.bootstraps, seed) if halves is not None else [{}] * len(TARGETS)
    quality = [
        {
            "model": name,
            "chosen": name == chosen,
            "target": target,
            "num_train": len(train),
            "num_held_out": len(held_out),
            "cv_tau": float(scores[name][column]),
            **_quality(targets[held_out, column], predictions[name][:, column], settings, seed),
            **ceilings[column],
            "seconds": seconds[name],
            "seed": seed,
        }
        for name in settings.models
        for column, target in enumerate(TARGETS)
    ]
    for row in quality:
        ceiling = row.get("noise_ceiling", float("nan"))
        row["tau_over_ceiling"] = row["kendall_tau"] / ceiling if ceiling > 0 else None
    predictor = Predictor(chosen, space, features, targets, seed=seed)
    on_fit(1, chosen)
    return Fit(predictor, quality, held_out, predictions[chosen])


def num_fits(settings: FitPredictor) -> int:
    """Number of fits: for each model one per fold and one on all training archs; at last the chosen model on all."""
    return len(settings.models) * (settings.folds + 1) + 1


def check_numbers(num_archs: int, settings: FitPredictor) -> None:
    """Check that a table is large enough for the held-out archs and the folds.

    Raises
    ------
    UserError
        The table is too small; the message names the settings and the number of archs they need.
    """
    needed = settings.least_archs
    if num_archs < needed:
        raise UserError(
            f"the table has {num_archs} archs; fit_predictor.held_out {settings.held_out} and folds {settings.folds} "
            f"need at least {needed} (3 per fold beside the held-out ones): raise sample_archs.num_archs, or lower them"
        )


def held_out_rows(macs: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """Rows held out: one at random from each of `count` equally large groups of neighbours in MACs; sorted."""
    rng = np.random.default_rng(seed)
    groups = np.array_split(np.argsort(macs, kind="stable"), count)
    return np.sort([rng.choice(group) for group in groups])


def stratified_folds(macs: np.ndarray, folds: int, *, seed: int) -> np.ndarray:
    """Fold of every row, of shape (n,): `folds` rows that follow each other in MACs go to different folds."""
    rng = np.random.default_rng([seed, 1])
    assignment = np.empty(len(macs), dtype=np.int64)
    order = np.argsort(macs, kind="stable")
    for start in range(0, len(macs), folds):
        block = order[start : start + folds]
        assignment[block] = rng.permutation(folds)[: len(block)]
    return assignment


def _quality(measured: np.ndarray, predicted: np.ndarray, settings: FitPredictor, seed: int) -> dict[str, Any]:
    """Quality columns of one model and target."""
    row: dict[str, Any] = {}
    for name, statistic in {"kendall_tau": kendall_tau, "spearman": spearman}.items():
        row[name] = statistic(measured, predicted)
        row[f"{name}_low"], row[f"{name}_high"] = bootstrap_interval(
            statistic, measured, predicted, draws=settings.bootstraps, seed=seed
        )
    row["r2"], row["rmse"] = r2(measured, predicted), rmse(measured, predicted)
    row["top_k"], row["top_k_regret"] = settings.top_k, top_k_regret(measured, predicted, settings.top_k)
    return row


def _ceilings(halves: np.ndarray, held_out: np.ndarray, draws: int, seed: int) -> list[dict[str, float]]:
    """Noise-ceiling columns of every target."""
    ceilings = []
    for column in range(halves.shape[1]):
        row = {}
        for name, rows in {"noise_ceiling": held_out, "noise_ceiling_all": np.arange(len(halves))}.items():
            first, second = halves[rows, column, 0], halves[rows, column, 1]
            row[name] = noise_ceiling(first, second)
            row[f"{name}_low"], row[f"{name}_high"] = bootstrap_interval(
                noise_ceiling, first, second, draws=draws, seed=seed
            )
        ceilings.append(row)
    return ceilings
