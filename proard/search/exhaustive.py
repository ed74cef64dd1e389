"""Evaluation of a whole space, if it is small enough: its exact front and its range of objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from proard.search.evaluations import Archive, Canonical, Cost, Predict
from proard.search.fronts import Scale, non_dominated
from proard.space.sampling import BLOCK, genotype_blocks


@dataclass(frozen=True)
class Exhaustive:
    """Result of evaluating every arch within the cost limits.

    Attributes
    ----------
    size : int
        Number of those archs.
    front : Archive
        The non-dominated ones, all in generation 1; of archs with equal objectives all are kept.
    scale : Scale
        Of all of them.
    """

    size: int
    front: Archive
    scale: Scale


def exhaustive(
    predict: Predict,
    cost: Cost,
    choices: Sequence[int],
    canonical: Canonical,
    *,
    up_to: int,
    max_cost: Sequence[float] | None = None,
    rows: int = BLOCK,
    on_block: Callable[[int, int], None] = lambda archs, size: None,
) -> Exhaustive | None:
    """Evaluate every arch within the limits, if there are at most `up_to`.

    Parameters
    ----------
    predict, cost, choices, canonical, max_cost
        As of `nsga2`.
    up_to : int
        Largest number of archs; with 0 nothing is evaluated.
    rows : int
        Archs that are evaluated at a time.
    on_block : callable
        Called after each block with the numbers of archs in it and in total.

    Returns
    -------
    Exhaustive or None
        None if there are more archs, or none within the limits.

    Notes
    -----
    Archs are counted before any is predicted, and counting ends at the bound. Blocks are merged into one front as they
    come, so that memory does not grow with the space.
    """

    def affordable(genotypes: np.ndarray) -> np.ndarray:
        return np.all(cost(genotypes) <= max_cost, axis=1)

    keep, size = None if max_cost is None else affordable, 0
    for block in genotype_blocks(choices, canonical, keep=keep, rows=rows):
        size += len(block)
        if size > up_to:
            return None
    if not size:
        return None
    first = cost(np.zeros((1, len(choices)), dtype=np.int64))  # (1, costs)
    genotypes, objectives = np.zeros((0, len(choices)), dtype=np.int64), np.zeros((0, 2 + first.shape[1]))
    low, high = np.full((2, objectives.shape[1]), np.nan)
    for block in genotype_blocks(choices, canonical, keep=keep, rows=rows):
        values = np.column_stack([-predict(block), cost(block)])
        low, high = np.fmin(low, values.min(axis=0)), np.fmax(high, values.max(axis=0))
        best = non_dominated(values)
        genotypes, objectives = np.concatenate([genotypes, block[best]]), np.concatenate([objectives, values[best]])
        best = non_dominated(objectives)
        genotypes, objectives = genotypes[best], objectives[best]
        on_block(len(block), size)
    costs = objectives[:, 2:].astype(first.dtype)
    front = Archive(genotypes, -objectives[:, :2], costs, np.ones(len(genotypes), dtype=np.int64))
    return Exhaustive(size, front, Scale(tuple(low.tolist()), tuple(high.tolist())))
