"""Hypervolume after every generation, of every search, on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    "cost": (TEXT, "cost column that was minimised; of two, the first"),
    "clean_acc_best": (FLOAT, "fraction, predicted; 0 of the normalised objective"),
    "clean_acc_worst": (FLOAT, "fraction, predicted; 1 of the normalised objective"),
    "robust_acc_best": (FLOAT, "fraction, predicted; 0 of the normalised objective"),
    "robust_acc_worst": (FLOAT, "fraction, predicted; 1 of the normalised objective"),
    "cost_best": (FLOAT, "unit of the cost column; 0 of the normalised objective"),
    "cost_worst": (FLOAT, "unit of the cost column; 1 of the normalised objective"),
    "second_cost": (TEXT, "the other cost column that was minimised; empty if there was one"),
    "second_cost_best": (FLOAT, "unit of that column; 0 of the normalised objective"),
    "second_cost_worst": (FLOAT, "unit of that column; 1 of the normalised objective"),
    "reference_point": (FLOAT, "each normalised objective of the reference point"),
    "seed": (INT, "seed of the search"),
}


def history(
    archives: Mapping[str, Archive], *, cost_names: Sequence[str], seed: int, exhaustive: Exhaustive | None = None
) -> list[dict[str, Any]]:
    """Rows of `HISTORY`, one per search and generation.

    Parameters
    ----------
    archives : mapping of str to Archive
        What each search evaluated.
    cost_names : sequence of str
        Cost columns that were minimised, one or two.
    exhaustive : Exhaustive, optional
        The whole space. The scale is that of the whole space if given, else that of all archives together.
    """
    best = None
    if exhaustive is None:
        scale = Scale.of(np.concatenate([archive.objectives for archive in archives.values()]))
    else:
        scale = exhaustive.scale
        best = hypervolume(exhaustive.front.objectives, scale)
    common: dict[str, Any] = {
        "exhaustive_hypervolume": best,
        "clean_acc_best": -scale.best[0],
        "clean_acc_worst": -scale.worst[0],
        "robust_acc_best": -scale.best[1],
        "robust_acc_worst": -scale.worst[1],
        "reference_point": scale.reference,
        "seed": seed,
    }
    for prefix, name, low, high in zip(("", "second_"), cost_names, scale.best[2:], scale.worst[2:], strict=False):
        common |= {f"{prefix}cost": name, f"{prefix}cost_best": low, f"{prefix}cost_worst": high}
    rows = []
    for name, archive in archives.items():
        front, done = archive.objectives[:0], 0
        for generation in range(1, int(archive.generations.max()) + 1):
            new = archive.objectives[archive.generations == generation]
            front, done = np.concatenate([front, new]), done + len(new)
            front = front[non_dominated(front)]
            progress = {"search": name, "generation": generation, "evaluations": done, "front_size": len(front)}
            volume = hypervolume(front, scale)
            relative = volume / best if best else None
            rows.append({**progress, "hypervolume": volume, "relative_hypervolume": relative, **common})
    return rows
