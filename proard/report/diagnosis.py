"""Networks compared with their teacher: figures and the page's section on bound, radii and alignment."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from proard.config import TEACHER
from proard.report.context import Context, Section, section
from proard.report.svg import COLOURS, STYLE
from proard.report.text import NORMS, pixels

TERMS = {
    "loss_gap": ("|l_S − l_T| at the image", COLOURS["navy"]),
    "alignment": ("ε · gradient gap", COLOURS["blue"]),
    "student_linearity": ("linearisation error, student", COLOURS["orange"]),
    "teacher_linearity": ("linearisation error, teacher", COLOURS["gold"]),
}
LINES = [COLOURS[name] for name in ("blue", "orange", "sky", "navy", "gold", "dot")]
DASHES = ["-", (0, (4, 2)), (0, (1, 1.5))]
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g}")
LONGEST = 2.5  # longest bar that is not cut, in units of the panel's median
LABEL = {"facecolor": COLOURS["paper"], "edgecolor": "none", "pad": 1.5}


def bound_figure(summary: pd.DataFrame | None) -> Figure | None:
    """The four terms stacked for every network and radius, with the measured left side."""
    if summary is None:
        return None
    rows = summary[(summary["network"] != TEACHER) & summary["eps"].notna()]
    names = list(dict.fromkeys(rows["network"]))
    if not names:
        return None
    radii = sorted(rows["eps"].unique())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 1.5 + 0.42 * len(names)))
        axes = figure.subplots(1, len(radii), sharey=True, squeeze=False)[0]
        for axis, eps in zip(axes, radii, strict=True):
            _draw_terms(axis, rows[rows["eps"] == eps], names)
            norm = NORMS.get(rows["norm"].iloc[0], "")
            axis.set_title(f"{norm} ≤ {pixels(eps)}")
            axis.set_xlabel("nats, mean over images")
        axes[0].set_yticks(range(len(names)), names)
        axes[0].set_ylim(len(names) - 0.4, -0.6)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=3)
        figure.tight_layout(rect=(0, 0.52 / figure.get_figheight(), 1, 1), w_pad=1.5)
    return figure


def _draw_terms(axis: Axes, rows: pd.DataFrame, names: list[str]) -> None:
    """Stacked bars of one radius; one far longer than the others is cut, with a label "measured of length"."""
    table = rows.pivot_table(index="network", columns="quantity", values=["value", "low", "high"]).loc[names]
    places, start = np.arange(len(names)), np.zeros(len(names))
    for term, (label, colour) in TERMS.items():
        width = table["value"][term].to_numpy()
        axis.barh(places, width, left=start, height=0.62, color=colour, label=label)
        start = start + width
    left = table["value"]["left"].to_numpy()
    reach = np.stack([left - table["low"]["left"].to_numpy(), table["high"]["left"].to_numpy() - left])
    look: dict[str, Any] = {"fmt": "D", "color": COLOURS["ink"], "ms": 4.5, "mec": COLOURS["paper"], "elinewidth": 1}
    axis.errorbar(left, places, xerr=reach.clip(min=0), label="measured under attack, mean and 95 % interval", **look)
    limit = 1.05 * min(start.max(), LONGEST * float(np.median(start)))
    for place in np.flatnonzero(start > limit):
        words = f"{left[place]:.3g} of {start[place]:.3g} →"
        axis.text(0.98 * limit, float(place), words, ha="right", va="center", color=COLOURS["ink"], bbox=LABEL)
    axis.set_xlim(0, limit)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.grid(visible=False, axis="y")


def radius_figure(radii: pd.DataFrame | None) -> Figure | None:
    """Share of images that are correct with at least a radius, against the radius: a panel per method and noise."""
    if radii is None or radii.empty:
        return None
    panels = list(radii.groupby(["method", "norm", "sigma"], dropna=False, sort=False))
    names = list(dict.fromkeys(radii["network"]))
    looks = _looks(names)
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.1 * lines + 0.25 * -(-len(names) // 5)))
        axes = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
        for axis, ((method, norm, sigma), rows) in zip(axes, panels, strict=False):
            for name in names:
                of_network = rows[rows["network"] == name]
                if not of_network.empty:
                    grid, share = certified_curve(of_network)
                    scale = 255 if norm == "linf" else 1
                    axis.plot(scale * grid, share, drawstyle="steps-pre", label=name, **looks[name])
            axis.set_title(f"CLEVER, {NORMS[norm]}" if method == "clever" else f"smoothing, σ {sigma:g}")
            axis.set_xlabel(f"{NORMS[norm]} radius{' · 255' if norm == 'linf' else ''}")
            axis.set_xlim(left=0)
            axis.set_ylim(0, 1)
            axis.xaxis.set_major_locator(MaxNLocator(4))
            axis.yaxis.set_major_formatter(PERCENT)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        for axis in axes[::columns]:
            axis.set_ylabel("correct within the radius, %")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=min(5, len(names)))
        below = 0.3 + 0.25 * (-(-len(names) // 5) - 1)
        figure.tight_layout(rect=(0, below / figure.get_figheight(), 1, 1))
    return figure


def certified_curve(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Radii in ascending order, from 0 to the method's limit, and the share of correct images with at least it.

    An image that is misclassified, or at which smoothing abstains, counts at no radius.
    """
    found = np.sort(rows.loc[rows["correct"], "radius"].to_numpy(float))
    grid = np.unique(np.concatenate([[0.0], found, [rows["limit"].max()]]))
    share = (len(found) - np.searchsorted(found, grid, side="left")) / len(rows)
    return grid, share


def _looks(names: list[str]) -> dict[str, dict[str, object]]:
    """Colour and dashes of every network; the teacher's is green."""
    looks: dict[str, dict[str, object]] = {}
    for place, name in enumerate(name for name in names if name != TEACHER):
        dashes = DASHES[place // len(LINES) % len(DASHES)]
        looks[name] = {"color": LINES[place % len(LINES)], "linestyle": dashes, "linewidth": 1.5}
    return {TEACHER: {"color": COLOURS["green"], "linewidth": 1.5}, **looks}


def diagnosis(context: Context) -> Section | None:
    """Terms of the bound, radii and pairs of networks."""
    summary = context.results.get("diagnosis_summary")
    if summary is None:
        return None
    eps = summary["eps"].max()
    whole = summary[summary["eps"].isna() | (summary["eps"] == eps)]
    radii = whole[whole["quantity"].isin(["clever_radius", "smoothing_radius"])]
    kinds = list(radii[["quantity", "norm", "sigma"]].drop_duplicates().itertuples(index=False))
    networks = []
    for name, rows in whole.groupby("network", sort=False):
        values = rows[rows["sigma"].isna()].set_index("quantity")["value"]
        networks.append((name, rows["macs"].iloc[0], values, [_radius_value(rows, *kind) for kind in kinds]))
    pairs = context.results.get("diagnosis_pairs")
    return section(
        "diagnosis",
        "Diagnosis",
        "Students and their teacher",
        context=context,
        terms=[label for label, _ in TERMS.values()],
        sizes=[*TERMS, "right", "left", "cosine"],
        kinds=[_radius_words(*kind) for kind in kinds],
        networks=networks,
        images=whole["num_images"].max(),
        eps=eps,
        pairs=[] if pairs is None else pairs[pairs["eps"] == pairs["eps"].max()].to_dict("records"),
    )


def _radius_words(quantity: str, norm: str, sigma: float) -> str:
    """Heading of a radius."""
    if quantity == "clever_radius":
        return f"CLEVER {NORMS[norm]}{' · 255' if norm == 'linf' else ''}"
    return f"smoothing σ {sigma:g}"


def _radius_value(rows: pd.DataFrame, quantity: str, norm: str, sigma: float) -> str:
    """Mean radius of one network."""
    same_noise = rows["sigma"].isna() if pd.isna(sigma) else rows["sigma"] == sigma
    found = rows[(rows["quantity"] == quantity) & (rows["norm"] == norm) & same_noise]["value"]
    return "–" if found.empty else f"{found.iloc[0] * (255 if norm == 'linf' else 1):.3g}"
