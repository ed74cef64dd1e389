"""The figure that compares variants of a training: accuracies of some subnets with their intervals."""

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


def variants_figure(table: pd.DataFrame) -> Figure:
    """Clean and robust accuracy of each variant: a line per variant, a mark per subnet, its interval as a bar.

    Parameters
    ----------
    table : DataFrame
        Rows with the columns of `artifacts.variants.COMPARED`. The worst case on test is shown.
    """
    rows = table[(table["split"] == "test") & (table["attack"] == "worst")]
    names = list(dict.fromkeys(rows["variant"]))
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
    """One kind of subnet in every line."""
    colour, marker, shift = look
    rows = rows.set_index("variant").loc[names]
    places = np.arange(len(names)) + shift
    axis.hlines(places, rows[f"{column}_low"], rows[f"{column}_high"], color=colour, linewidth=1.3, alpha=0.7)
    axis.scatter(rows[column], places, s=30, marker=marker, color=colour, linewidths=0, zorder=3, label=subnet)


def _named(subnet: str, facts: pd.Series) -> str:
    """What a mark stands for."""
    of_all = f"of {facts['num_archs']} subnets"
    return {"mean": f"mean {of_all}", "worst": f"worst {of_all}"}.get(subnet, f"{subnet} subnet")
