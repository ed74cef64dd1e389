"""Compares subnets with twins of the same arch that were trained alone: gap, paired interval, figure."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from proard.artifacts import ArtifactError
from proard.evaluation.comparison import image_weights, redrawn_mean
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
        Rows of TRAININGS; every arch with its subnet and at least one twin.
    bootstraps : int
        Samples of the images, the same for all archs: percentiles 2.5 and 97.5 of the gap are its interval.
    seed : int
        Seed of the samples.

    Returns
    -------
    list of dict
        Rows of GAPS, by MACs; the mean over archs last, under the name `mean`.

    Raises
    ------
    ArtifactError
        An arch lacks its subnet or its twin, or was measured on other images than the others.

    Notes
    -----
    An image's difference is the subnet's outcome minus the mean of its twins'. The interval covers the choice of images
    only, not the seeds: see the spread over the twins' seeds; the supernet has one seed.
    """
    rows: list[dict[str, Any]] = []
    for (split, attack), part in outcomes.groupby(["split", "attack"], sort=False):
        if part["num_images"].nunique() > 1:
            raise ArtifactError(f"outcomes on {split} are of different numbers of images; rerun measure_experiment")
        pairs = [
            _pair(group) for _, group in sorted(part.groupby("arch_id"), key=lambda entry: entry[1]["macs"].iloc[0])
        ]
        number = int(part["num_images"].iloc[0])
        for measure in MEASURES:
            found = [_difference(subnet, twins, measure) for subnet, twins in pairs]
            differences = np.stack([difference for difference, _ in found])  # (archs, images)
            weights = image_weights(number, bootstraps=bootstraps, seed=seed)
            drawn = redrawn_mean(differences, weights)  # (bootstraps, archs)
            common = {"split": split, "attack": attack, "measure": measure, "num_images": number, "seed": seed}
            of_archs = [
                {
                    **{name: subnet[name] for name in ("arch_id", "genotype", "arch", "macs", "params")},
                    **facts,
                    **common,
                }
                for (subnet, _), (_, facts) in zip(pairs, found, strict=True)
            ]
            names = ("subnet_acc", "twin_acc", "subnet_only", "twin_only")
            pooled = {name: float(np.mean([facts[name] for _, facts in found])) for name in names}
            of_archs.append(
                {"arch_id": POOLED, "num_seeds": min(facts["num_seeds"] for _, facts in found), **pooled, **common}
            )
            columns = np.concatenate([drawn, drawn.mean(1, keepdims=True)], axis=1)
            for row, values in zip(of_archs, columns.T, strict=True):
                low, high = np.percentile(values, [2.5, 97.5]).tolist()
                rows.append({**row, "gap": row["subnet_acc"] - row["twin_acc"], "gap_low": low, "gap_high": high})
    return rows


def _pair(group: pd.DataFrame) -> tuple[pd.Series, pd.DataFrame]:
    """The subnet and the twins of one arch; the subnet's rows, one per twin, are equal."""
    subnets, twins = group[group["role"] == "subnet"], group[group["role"] == "twin"].drop_duplicates("train_seed")
    if subnets.empty or twins.empty:
        raise ArtifactError(f"arch {group['arch_id'].iloc[0]} lacks its subnet or its twin; rerun measure_experiment")
    return subnets.iloc[0], twins


def _difference(subnet: pd.Series, twins: pd.DataFrame, measure: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Difference by image, of shape (images,), and the other columns of the row."""
    own = np.asarray(subnet[measure], dtype=bool)
    others = np.stack([np.asarray(mask, dtype=bool) for mask in twins[measure]])  # (seeds, images)
    each = own.mean() - others.mean(1)
    facts = {
        "num_seeds": len(others),
        "subnet_acc": float(own.mean()),
        "twin_acc": float(others.mean()),
        "subnet_only": float((own & ~others).mean()),
        "twin_only": float((~own & others).mean()),
        "gap_sd_over_seeds": float(each.std(ddof=1)) if len(each) > 1 else None,
    }
    return own - others.mean(0), facts


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
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.9))
        for axis, measure in zip(figure.subplots(1, 2, sharey=True), MEASURES, strict=True):
            rows = table[table["measure"] == measure]
            archs, mean = rows[rows["arch_id"] != POOLED], rows[rows["arch_id"] == POOLED].iloc[0]
            axis.axhspan(mean["gap_low"], mean["gap_high"], color=COLOURS["sky"], alpha=0.25, label="mean of the archs")
            axis.axhline(0, color=COLOURS["ink"], linewidth=0.8)
            spans = [archs["gap"] - archs["gap_low"], archs["gap_high"] - archs["gap"]]
            look = {"color": COLOURS["blue"], "capsize": 3, "label": "arch, 95 % over images"}
            axis.errorbar(archs["macs"].astype(float), archs["gap"], yerr=np.abs(spans), fmt="o", **look)
            axis.set_title(f"{measure.capitalize()} accuracy")
            axis.yaxis.set_major_formatter(POINTS)
            log_macs(axis, archs["macs"].astype(float))
        figure.axes[0].set_ylabel("subnet minus twin, points")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=2)
        figure.tight_layout(rect=(0, 0.08, 1, 1), w_pad=2.5)
    return figure
