"""Hypervolume after every generation, of every search, on one scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from proard.artifacts.tables import FLOAT, INT, TEXT
from proard.search.evaluations import Archive
from proard.search.exhaustive import Exhaustive
from proard.search.fronts import Scale, hypervolume, non_dominated

HISTORY: dict[str, tuple[pa.DataType, str]] = {
    "search": (TEXT, "nsga2 or random"),
    "generation": (INT, "number of generations; for random search, a cut at as many evaluations"),
    "evaluations": (INT, "different archs evaluated so far"),
    "front_size": (INT, "non-dominated archs among them"),
    "hypervolume": (
        FLOAT,
        "of all evaluated so far, share of the box from the best values to 10 % of their range beyond the worst",
    ),
    "exhaustive_hypervolume": (FLOAT, "of the whole space within max_cost, same scale; empty where it is too large"),
    "relative_hypervolume": (FLOAT, "hypervolume / exhaustive_hypervolume; empty where the space is too large"),
    "cost": (TEXT, "cost column that was minimised"),
    "clean_acc_best": (FLOAT, "fraction, predicted; 0 of the normalised objective"),
    "clean_acc_worst": (FLOAT, "fraction, predicted; 1 of the normalised objective"),
    "robust_acc_best": (FLOAT, "fraction, predicted; 0 of the normalised objective"),
    "robust_acc_worst": (FLOAT, "fraction, predicted; 1 of the normalised objective"),
    "cost_best": (FLOAT, "unit of the cost column; 0 of the normalised objective"),
    "cost_worst": (FLOAT, "unit of the cost column; 1 of the normalised objective"),
    "reference_point": (FLOAT, "each normalised objective of the reference point"),
    "seed": (INT, "seed of the search"),
}


def history(
    archives: Mapping[str, Archive], *, cost_name: str, seed: int, exhaustive: Exhaustive | None = None
) -> list[dict[str, Any]]:
    """Rows of `HISTORY`, one per search and generation.

    Parameters
    ----------
    archives : mapping of str to Archive
        What each search evaluated.
    cost_name : str
        Cost column that was minimised.
    exhaustive : Exhaustive, optional
        The whole space. The scale is that of the whole space if given, else that of all archives together.
    """
    best = None
    if exhaustive is None:
        scale = Scale.of(np.concatenate([archive.objectives for archive in archives.values()]))
    else:
        scale = exhaustive.scale
        best = hypervolume(exhaustive.front.objectives, scale)
    common = {
        "exhaustive_hypervolume": best,
        "cost": cost_name,
        "clean_acc_best": -scale.best[0],
        "clean_acc_worst": -scale.worst[0],
        "robust_acc_best": -scale.best[1],
        "robust_acc_worst": -scale.worst[1],
        "cost_best": scale.best[2],
        "cost_worst": scale.worst[2],
        "reference_point": scale.reference,
        "seed": seed,
    }
    rows = []
    for name, archive in archives.items():
        front, done = np.zeros((0, 3)), 0
        for generation in range(1, int(archive.generations.max()) + 1):
            new = archive.objectives[archive.generations == generation]
            front, done = np.concatenate([front, new]), done + len(new)
            front = front[non_dominated(front)]
            progress = {"search": name, "generation": generation, "evaluations": done, "front_size": len(front)}
            volume = hypervolume(front, scale)
            relative = volume / best if best else None
            rows.append({**progress, "hypervolume": volume, "relative_hypervolume": relative, **common})
    return rows
