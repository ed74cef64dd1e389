"""Compares two sets of measured archs by their hypervolume, such as two runs or two searches, over the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from proard.artifacts import ArtifactError, read_table
from proard.config import UserError
from proard.evaluation.comparison import image_weights, redrawn_mean
from proard.search import Scale, hypervolume

KINDS = ("clean", "robust")
WORST = "worst"
OTHERS = ("random", "uniform")  # beside NSGA-II


class Interval(NamedTuple):
    """A value and its 95 % interval over images; NaN where outcomes per image are not known."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class FrontComparison:
    """Hypervolumes of two sets of measured archs.

    Attributes
    ----------
    first, second, difference : Interval
        Hypervolumes as shares of one box; second minus first.
    num_archs : tuple of int
        Archs of either set.
    num_images, bootstraps : int
        Images that all archs were measured on; redraws of these that the intervals come from.
    """

    first: Interval
    second: Interval
    difference: Interval
    num_archs: tuple[int, int]
    num_images: int
    bootstraps: int


@dataclass(frozen=True)
class SearchComparison(FrontComparison):
    """NSGA-II's measured archs (second) beside others (first), under one attack on one split.

    Attributes
    ----------
    other : str
        What found the others: `random` or `uniform`.
    split, attack, costs : str, str, tuple of str
        How all archs were measured; what the searches minimised.
    comparisons : int
        Comparisons that are made at once; each interval covers 1 - 0.05 / comparisons (Bonferroni).
    """

    other: str
    split: str
    attack: str
    costs: tuple[str, ...]
    comparisons: int


def compare_fronts(
    first: pd.DataFrame,
    second: pd.DataFrame,
    *,
    costs: Sequence[str] = ("macs",),
    comparisons: int = 1,
    bootstraps: int = 1000,
    seed: int = 0,
) -> FrontComparison:
    """Hypervolumes in clean accuracy, robust accuracy and costs, on a scale from the range of the archs of both sets.

    The intervals are the 2.5th to 97.5th percentile over images drawn with replacement, the same draws for both sets;
    wider if several comparisons are made at once. They do not cover other archs or other seeds of the training.

    Parameters
    ----------
    first, second : DataFrame
        MEASURED rows, one per arch, under one attack on equally many images. Intervals need outcomes per image on the
        same images; tables of earlier versions have none.
    costs : sequence of str
        Columns of the costs.
    comparisons : int
        Comparisons that are made at once: what lies outside an interval is 5 % divided by their number.
    """
    sets, columns = (first, second), list(costs)
    points = [_objectives(rows["clean_acc"], rows["robust_acc"], rows[columns]) for rows in sets]
    scale = Scale.of(np.concatenate(points))
    values = [hypervolume(place, scale) for place in points]
    spent = [rows[columns].to_numpy(float) for rows in sets]
    number = int(first["num_images"].iloc[0])
    spans = np.full((3, 2), np.nan)
    if _same_images(sets):
        weights = image_weights(number, bootstraps=bootstraps, seed=seed)
        drawn = [[redrawn_mean(np.stack(rows[kind].to_list()), weights) for kind in KINDS] for rows in sets]
        volumes = np.asarray(
            [
                [
                    hypervolume(_objectives(clean[draw], robust[draw], cost), scale)
                    for (clean, robust), cost in zip(drawn, spent, strict=True)
                ]
                for draw in range(bootstraps)
            ]
        )
        tail = 2.5 / comparisons
        both = np.column_stack([volumes, volumes[:, 1] - volumes[:, 0]])
        spans = np.percentile(both, [tail, 100 - tail], axis=0).T
    shares = (*values, values[1] - values[0])
    one, other, difference = (Interval(share, *span) for share, span in zip(shares, spans.tolist(), strict=True))
    return FrontComparison(one, other, difference, (len(first), len(second)), number, bootstraps)


def compare_searches(
    verified: pd.DataFrame, *, costs: Sequence[str] = ("macs",), bootstraps: int = 1000, seed: int = 0
) -> list[SearchComparison]:
    """NSGA-II's measured archs against those of random search, and against those of uniform scaling.

    Where uniform scaling has fewer archs, it is compared with as many of NSGA-II, the nearest in cost.

    Parameters
    ----------
    verified : DataFrame
        Rows of verify_front. The worst case on test is used; without it, the strongest attack there is.
    costs : sequence of str
        Columns that the searches minimised.

    Returns
    -------
    list of SearchComparison
        Empty if NSGA-II or all others have no measured arch.
    """
    split = "test" if (verified["split"] == "test").any() else "val"
    rows = verified[(verified["split"] == split) & verified["found_by"].isin(["nsga2", *OTHERS])]
    if rows.empty:
        return []
    attack = WORST if (rows["attack"] == WORST).any() else str(rows.groupby("attack")["robust_acc"].mean().idxmin())
    rows = rows[rows["attack"] == attack]
    nsga2 = rows[rows["found_by"] == "nsga2"]
    others = {name: rows[rows["found_by"] == name] for name in OTHERS if (rows["found_by"] == name).any()}
    if nsga2.empty:
        return []
    how: dict[str, Any] = {"split": split, "attack": attack, "costs": tuple(costs), "comparisons": len(others)}
    options: dict[str, Any] = {"costs": costs, "comparisons": len(others), "bootstraps": bootstraps, "seed": seed}
    return [
        SearchComparison(**vars(compare_fronts(archs, _nearest(nsga2, archs, costs), **options)), other=name, **how)
        for name, archs in others.items()
    ]


def _nearest(rows: pd.DataFrame, others: pd.DataFrame, costs: Sequence[str]) -> pd.DataFrame:
    """As many rows as there are others, each the nearest in log cost to one of them; all rows if there are no more."""
    if len(rows) <= len(others):
        return rows
    own, wanted = (np.log(part[list(costs)].to_numpy(float)) for part in (rows, others))
    distances = np.abs(own[:, None] - wanted).sum(axis=2)  # (rows, others)
    return rows.iloc[linear_sum_assignment(distances)[0]]


def compare_tables(
    first: Sequence[Path], second: Sequence[Path], *, bootstraps: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Hypervolumes of two sets of measured archs, from their tables alone.

    Parameters
    ----------
    first, second : sequence of path
        Tables of measured archs, such as those of `verify_front`, `merge_table` or `select_student`.

    Returns
    -------
    DataFrame
        A row per split and attack that both have, measured on equally many images: `split`, `attack`, `num_images`;
        `first_archs`, `second_archs`; `first`, `second`, the hypervolumes on a scale from the range of both, and
        `difference`, second minus first; `paired`, the number of archs in both, and `clean_gain`, `robust_gain`, the
        mean of their differences, second minus first, as fractions (NaN if no arch is in both). Hypervolumes,
        difference and gains have the ends of their 95 % interval over images in columns `NAME_low`, `NAME_high`; NaN
        where the tables hold no outcomes per image or were measured on different images.

    Raises
    ------
    UserError
        No rows of the two have equal threat, images and attack.
    """
    groups = [_measured_alike(paths) for paths in (first, second)]
    found = []
    for key in [key for key in groups[0] if key in groups[1]]:
        pair = [group[key].drop_duplicates("arch_id").set_index("arch_id") for group in groups]
        volumes = compare_fronts(*pair, bootstraps=bootstraps, seed=seed)
        row = {**pair[0].iloc[0][["split", "attack", "num_images"]]}
        row |= dict(zip(("first_archs", "second_archs"), volumes.num_archs, strict=True))
        both = pair[0].index.intersection(pair[1].index)
        spans = {name: getattr(volumes, name) for name in ("first", "second", "difference")}
        paired = [rows.loc[both] for rows in pair]
        spans |= {f"{kind}_gain": _gain(paired, kind, bootstraps=bootstraps, seed=seed) for kind in KINDS}
        for name, span in spans.items():
            row |= {name: span.value, f"{name}_low": span.low, f"{name}_high": span.high}
        found.append({**row, "paired": len(both)})
    if not found:
        raise UserError("nothing in the two was measured alike: the same split, images, threat and attack")
    return pd.DataFrame(found)


def verified_tables(run_folder: str | Path) -> list[Path]:
    """Table of the archs that a run measured on test under all attacks."""
    return [Path(run_folder) / "verify_front" / "front.parquet"]


def sampled_tables(run_folder: str | Path) -> list[Path]:
    """Tables of the archs that a run measured on val for its predictor.

    Raises
    ------
    ArtifactError
        The run has none.
    """
    tables = sorted((Path(run_folder) / "evaluate_archs").glob("*/table.parquet"))
    if not tables:
        raise ArtifactError(f"{run_folder} holds no evaluate_archs/SHARD/table.parquet; run that stage")
    return tables


def _objectives(
    clean: np.ndarray | pd.Series, robust: np.ndarray | pd.Series, costs: np.ndarray | pd.DataFrame
) -> np.ndarray:
    """(-clean, -robust, each cost) of every arch, of shape (archs, 2 + costs)."""
    return np.column_stack([-clean, -robust, costs]).astype(np.float64)


def _same_images(sets: Sequence[pd.DataFrame]) -> bool:
    """Whether all rows have outcomes per image, of the same images."""
    if not all("image_set" in rows for rows in sets):
        return False
    images = pd.concat([rows["image_set"] for rows in sets])
    return bool(images.notna().all()) and images.nunique() == 1


def _gain(pair: Sequence[pd.DataFrame], kind: str, *, bootstraps: int, seed: int) -> Interval:
    """Mean accuracy of the second rows minus that of the first, in the same order of archs."""
    value = float((pair[1][f"{kind}_acc"] - pair[0][f"{kind}_acc"]).mean())
    if pair[0].empty or not _same_images(pair):
        return Interval(value, np.nan, np.nan)
    first, second = (np.stack(rows[kind].to_list()).astype(np.float64) for rows in pair)
    weights = image_weights(first.shape[-1], bootstraps=bootstraps, seed=seed)
    drawn = redrawn_mean((second - first).mean(axis=0), weights)
    return Interval(value, *np.percentile(drawn, [2.5, 97.5]).tolist())


def _measured_alike(paths: Sequence[Path]) -> dict[tuple[str, ...], pd.DataFrame]:
    """Rows by what must be equal in two sets of tables; for the worst case this includes its attacks."""
    how = ["attack", "norm", "eps", "step_size", "num_steps", "restarts"]
    alike = ["split", "num_images", "accounting", *how]
    columns = [*alike, "arch_id", "macs", "clean_acc", "robust_acc"]
    rows = pd.concat([read_table(path, columns=columns) for path in paths], ignore_index=True)
    described = pd.Series([" ".join(map(str, row)) for row in rows[how].itertuples(index=False)])
    worst = rows["attack"] == WORST
    attacks = described[~worst].groupby(rows.loc[~worst, "split"]).agg(lambda texts: " ".join(sorted(set(texts))))
    described[worst] = rows.loc[worst, "split"].map(attacks)
    return dict(list(rows.groupby(["split", "num_images", "accounting", "attack", described], sort=False)))
