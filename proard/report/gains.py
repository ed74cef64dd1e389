"""Supernets trained in several ways: accuracies of some subnets with their intervals, as a figure and as lines."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from proard.report.svg import COLOURS, STYLE

LOOKS = {  # subnet: colour, marker, shift in rows
    "largest": (COLOURS["navy"], "s", -0.24),
    "mean": (COLOURS["blue"], "o", -0.08),
    "smallest": (COLOURS["sky"], "^", 0.08),
    "worst": (COLOURS["orange"], "v", 0.24),
}
PANELS = {"clean_acc": "Clean accuracy", "robust_acc": "Robust accuracy"}


def headline(table: pd.DataFrame, *, eps: float) -> pd.DataFrame:
    """The GAINS rows of the headline: worst case over all attacks on test, at the radius nearest to `eps`."""
    rows = table[(table["split"] == "test") & (table["attack"] == "worst")]
    return rows[rows["eps"] == min(rows["eps"].unique(), key=lambda value: abs(value - eps))]


def gain_lines(rows: pd.DataFrame) -> list[str]:
    """A line of text per training with its mean subnet; `rows` are those of `headline`."""
    return [
        f"{row['group']:<20} mean of {row['num_archs']} subnets on test: clean {row['clean_acc']:.1%}, robust "
        f"{row['robust_acc']:.1%} ({row['robust_acc_low']:.1%} to {row['robust_acc_high']:.1%}); "
        f"{row['train_forward_equivalents']:,} forward-equivalents, {row['train_macs']:.3g} MACs"
        for _, row in rows[rows["subnet"] == "mean"].iterrows()
    ]


def gains_figure(rows: pd.DataFrame) -> Figure:
    """Clean and robust accuracy: a line per training, a mark per subnet, its interval as a bar.

    Parameters
    ----------
    rows : DataFrame
        GAINS rows of one attack, such as `headline`'s.
    """
    names = list(dict.fromkeys(rows["group"]))
    first = rows.iloc[0]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 1.5 + 0.62 * len(names)))
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (column, label) in zip(axes, PANELS.items(), strict=True):
            for subnet, look in LOOKS.items():
                _draw_subnet(axis, rows[rows["subnet"] == subnet], names, column, subnet, look)
            axis.set_title(label)
            axis.set_xlabel("%")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))
            axis.grid(visible=False, axis="y")
        axes[0].set_yticks(range(len(names)), names)
        axes[0].set_ylim(len(names) - 0.5, -0.5)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, [_named(name, first) for name in labels], loc="lower center", ncols=len(labels))
        figure.tight_layout(rect=(0, 0.34 / figure.get_figheight(), 1, 1), w_pad=2.5)
    return figure


def _draw_subnet(
    axis: Axes, rows: pd.DataFrame, names: list[str], column: str, subnet: str, look: tuple[str, str, float]
) -> None:
    """Draw one kind of subnet in every line."""
    colour, marker, shift = look
    rows = rows.set_index("group").loc[names]
    places = np.arange(len(names)) + shift
    axis.hlines(places, rows[f"{column}_low"], rows[f"{column}_high"], color=colour, linewidth=1.3, alpha=0.7)
    axis.scatter(rows[column], places, s=30, marker=marker, color=colour, linewidths=0, zorder=3, label=subnet)


def _named(subnet: str, facts: pd.Series) -> str:
    """Label of a mark."""
    of_all = f"of {facts['num_archs']} subnets"
    return {"mean": f"mean {of_all}", "worst": f"worst {of_all}"}.get(subnet, f"{subnet} subnet")
