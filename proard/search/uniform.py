"""Random search, the baseline of NSGA-II."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from proard.search.evaluations import Archive, Canonical, Cost, Evaluations, Predict


def random(
    predict: Predict,
    cost: Cost,
    choices: Sequence[int],
    canonical: Canonical,
    *,
    generations: Sequence[int],
    max_cost: Sequence[float] | None = None,
    seed: int = 0,
) -> Archive:
    """Evaluate random archs, every gene uniform and independent, each arch once.

    Parameters
    ----------
    generations : sequence of int
        Archs per generation, as many as NSGA-II evaluated, for a comparison at equal evaluations. A generation here
        is only a part of the sequence.

    Returns
    -------
    Archive
        As of `nsga2`, whose other parameters and errors are the same.
    """
    evaluations = Evaluations(predict, cost, choices, canonical, max_cost=max_cost)
    draws = evaluations.draw(sum(generations), np.random.default_rng([seed, 1]))
    for part in np.split(draws, np.cumsum(generations)[:-1]):
        if len(part):
            evaluations.evaluate(part)
    return evaluations.archive()
