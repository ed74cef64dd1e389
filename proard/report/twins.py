"""Compares subnets with twins of the same arch that were trained alone: gap, paired interval, figure."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from proard.artifacts import ArtifactError
from proard.artifacts.tables import IDENTITY
from proard.evaluation.comparison import gain_over, image_weights
from proard.report.figures import log_macs
from proard.report.svg import COLOURS, STYLE
from proard.report.text import count

MEASURES = ("clean", "robust")
POOLED = "mean"
POINTS = FuncFormatter(lambda share, _: f"{100 * share:g}")


def gaps_of(outcomes: pd.DataFrame, *, bootstraps: int, seed: int) -> list[dict[str, Any]]:
    """Gap of every arch and of their mean, on every split, under every attack, clean and robust.

    Parameters
    ----------
    outcomes : DataFrame
        Rows of TRAININGS; every arch with its twin of every seed and the subnet beside it.
    bootstraps : int
        Redraws of the images, the same for all archs.
    seed : int
        Seed of the redraws.

    Returns
    -------
    list of dict
        Rows of GAPS, by MACs; the mean over archs last, under the name `mean`.

    Raises
    ------
    ArtifactError
        An arch lacks its subnet, its twin or a seed, or was measured on other images than the others.

    Notes
    -----
    A twin is paired with the subnet of its seed, image by image. With several seeds, the interval covers the choice of
    seeds and of images (`estimate`); with one, of images only. If all twins have one supernet beside them, the seeds
    are those of the twins alone.
    """
    rows: list[dict[str, Any]] = []
    for (split, attack), part in outcomes.groupby(["split", "attack"], sort=False):
        if part["num_images"].nunique() > 1:
            raise ArtifactError(f"outcomes on {split} are of different numbers of images; rerun measure_experiment")
        groups = [group for _, group in sorted(part.groupby("arch_id"), key=lambda entry: entry[1]["macs"].iloc[0])]
        number = int(part["num_images"].iloc[0])
        weights = image_weights(number, bootstraps=bootstraps, seed=seed)
        for measure in MEASURES:
            subnets, twins = (_stacked(groups, role, measure) for role in ("subnet", "twin"))
            if subnets.shape != twins.shape:
                raise ArtifactError("a twin lacks the subnet of its seed; rerun measure_experiment")
            common = {"split": split, "attack": attack, "measure": measure, "num_images": number, "seed": seed}
            common["num_seeds"] = len(twins)
            for index, group in enumerate(groups):
                arch = {name: group[name].iloc[0] for name in IDENTITY}
                rows.append({**arch, **common, **_gap(subnets[:, [index]], twins[:, [index]], weights)})
            rows.append({"arch_id": POOLED, **common, **_gap(subnets, twins, weights)})
    return rows


def _stacked(groups: list[pd.DataFrame], role: str, measure: str) -> np.ndarray:
    """Outcomes of all subnets or of all twins, of shape (seeds, archs, images)."""
    found, seeds = [], set()
    for group in groups:
        rows = group[group["role"] == role].drop_duplicates("train_seed").sort_values("train_seed")
        if rows.empty:
            raise ArtifactError(f"arch {group['arch_id'].iloc[0]} lacks its {role}; rerun measure_experiment")
        seeds.add(tuple(rows["train_seed"]))
        found.append(np.stack(rows[measure].to_list()).astype(bool))
    if len(seeds) > 1:
        raise ArtifactError("archs have twins of different seeds; rerun train_experiment for those that are missing")
    return np.stack(found, axis=1)


def _gap(subnets: np.ndarray, twins: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """Accuracies of subnets and twins of shape (seeds, archs, images), means over archs, and their difference."""
    gap = gain_over(subnets, twins, weights, "mean")
    each = subnets.mean(axis=(1, 2)) - twins.mean(axis=(1, 2))
    return {
        "subnet_acc": float(subnets.mean()),
        "twin_acc": float(twins.mean()),
        "gap": gap.value,
        "gap_low": gap.low,
        "gap_high": gap.high,
        "gap_sd_over_seeds": float(each.std(ddof=1)) if len(each) > 1 else None,
        "subnet_only": float((subnets & ~twins).mean()),
        "twin_only": float((~subnets & twins).mean()),
    }


def headline(gaps: pd.DataFrame) -> pd.DataFrame:
    """The rows of the headline: test, worst case over all attacks."""
    return gaps[(gaps["split"] == "test") & (gaps["attack"] == "worst")]


def gap_lines(gaps: list[dict[str, Any]]) -> list[str]:
    """The headline's rows as text, in percentage points."""
    lines = []
    for _, row in headline(pd.DataFrame(gaps)).iterrows():
        what = "mean of the archs" if row["arch_id"] == POOLED else f"{count(row['macs'])} MACs"
        span = f"{100 * row['gap_low']:+.1f} to {100 * row['gap_high']:+.1f}"
        accuracies = f"subnet {row['subnet_acc']:.1%}, twin {row['twin_acc']:.1%}"
        lines.append(f"{row['measure']}, {what}: {accuracies}, gap {100 * row['gap']:+.1f} points ({span})")
    return lines


def gap_figure(gaps: list[dict[str, Any]]) -> Figure:
    """Gap against MACs with its interval, clean and robust; the band is the mean of the archs."""
    table = headline(pd.DataFrame(gaps))
    over = "images" if table["num_seeds"].max() == 1 else "seeds and images"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.9))
        for axis, measure in zip(figure.subplots(1, 2, sharey=True), MEASURES, strict=True):
            rows = table[table["measure"] == measure]
            archs, mean = rows[rows["arch_id"] != POOLED], rows[rows["arch_id"] == POOLED].iloc[0]
            axis.axhspan(mean["gap_low"], mean["gap_high"], color=COLOURS["sky"], alpha=0.25, label="mean of the archs")
            axis.axhline(0, color=COLOURS["ink"], linewidth=0.8)
            spans = [archs["gap"] - archs["gap_low"], archs["gap_high"] - archs["gap"]]
            look = {"color": COLOURS["blue"], "capsize": 3, "label": f"arch, 95 % over {over}"}
            axis.errorbar(archs["macs"].astype(float), archs["gap"], yerr=np.abs(spans), fmt="o", **look)
            axis.set_title(f"{measure.capitalize()} accuracy")
            axis.yaxis.set_major_formatter(POINTS)
            log_macs(axis, archs["macs"].astype(float))
        figure.axes[0].set_ylabel("subnet minus twin, points")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=2)
        figure.tight_layout(rect=(0, 0.08, 1, 1), w_pad=2.5)
    return figure
