"""The report's figures. Each function takes tables and returns a figure, or None where its tables are absent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from proard.report.facts import Student, chosen_quality, reference
from proard.report.inputs import Results
from proard.report.svg import COLOURS, STYLE
from proard.report.text import SEARCH_NAMES, decimal, percent
from proard.space.cost import human

SEARCH_LOOKS = {
    "nsga2": (COLOURS["blue"], "o"),
    "random": (COLOURS["orange"], "^"),
    "uniform": (COLOURS["navy"], "s"),
}
ARCH_COLOURS = {"smallest": COLOURS["sky"], "middle": COLOURS["blue"], "largest": COLOURS["navy"]}
CLEAN = (0, (3, 1.5))
TARGETS = {"clean_acc": "Clean accuracy", "robust_acc": "Robust accuracy"}
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g}")


def front_figure(results: Results, students: Sequence[Student]) -> tuple[Figure, dict[str, list[str]]] | None:
    """Every sampled subnet, the fronts and the students: clean and robust accuracy over MACs.

    Returns
    -------
    tuple of (Figure, dict of str to list of str) or None
        The figure, and the tooltip of every point by group id. None without a table of sampled subnets.
    """
    table = results.get("table")
    if table is None:
        return None
    tooltips: dict[str, list[str]] = {}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 4.9))
        axes = figure.subplots(1, 2, sharex=True)
        for axis, (column, label) in zip(axes, TARGETS.items(), strict=True):
            _draw_sampled(axis, table, column, tooltips)
            _draw_predicted(axis, results.get("front"), column)
            _draw_verified(axis, results, column, tooltips)
            _draw_students(axis, students, column, tooltips)
            _draw_references(axis, results, column)
            axis.set_title(label)
            axis.set_ylabel("%")
            axis.yaxis.set_major_formatter(PERCENT)
            log_macs(axis, table["macs"])
        handles, labels = axes[1].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), loc="lower center", ncols=min(4, len(unique)))
        figure.tight_layout(rect=(0, 0.06 + 0.05 * ((len(unique) - 1) // 4), 1, 1), w_pad=2.5)
    return figure, tooltips


def _draw_sampled(axis: Axes, table: pd.DataFrame, column: str, tooltips: dict[str, list[str]]) -> None:
    """Measured subnets of the predictor's table as small dots."""
    points = axis.scatter(
        table["macs"], table[column], s=11, color=COLOURS["dot"], alpha=0.75, linewidths=0, label="sampled subnet, val"
    )
    points.set_gid(f"sampled-{column}")
    tooltips[f"sampled-{column}"] = [_tooltip("sampled subnet", row) for _, row in table.iterrows()]


def _draw_predicted(axis: Axes, front: pd.DataFrame | None, column: str) -> None:
    """The best value that the predictor gives each search's archs up to every cost, as a dashed stair."""
    if front is None:
        return
    for search, (colour, _) in SEARCH_LOOKS.items():
        rows = front[front["found_by"] == search].sort_values("macs")
        if not rows.empty:
            look: dict[str, Any] = {"color": colour, "linestyle": (0, (4, 2)), "linewidth": 1.1, "alpha": 0.9}
            best = rows[f"predicted_{column}"].cummax()
            axis.step(rows["macs"], best, where="post", label=f"{SEARCH_NAMES[search]}, predicted", **look)


def _draw_verified(axis: Axes, results: Results, column: str, tooltips: dict[str, list[str]]) -> None:
    """Verified archs as measured on val under the table's attack, with their intervals."""
    verified = results.get("verified")
    if verified is None:
        return
    rows = verified[(verified["split"] == "val") & (verified["attack"] == results.label_attack)]
    for search, (colour, marker) in SEARCH_LOOKS.items():
        of_search = rows[rows["found_by"] == search]
        if of_search.empty:
            continue
        low, high = f"{column}_low", f"{column}_high"
        if low in of_search and of_search[low].notna().all():
            axis.vlines(of_search["macs"], of_search[low], of_search[high], color=colour, linewidth=0.9, alpha=0.6)
        points = axis.scatter(
            of_search["macs"], of_search[column], s=30, marker=marker, facecolor=colour, edgecolor=COLOURS["paper"],
            linewidths=0.6, zorder=4, label=f"{SEARCH_NAMES[search]}, measured, val",
        )  # fmt: skip
        gid = f"{search}-{column}"
        points.set_gid(gid)
        tooltips[gid] = [_tooltip(f"{SEARCH_NAMES[search]}, val", row) for _, row in of_search.iterrows()]


def _draw_references(axis: Axes, results: Results, column: str) -> None:
    """Teacher and control on val as horizontal lines; a value outside the axis is written at its end."""
    low, high = axis.get_ylim()
    room = 0.35 * (high - low)
    for name, colour, style in (("teacher", COLOURS["green"], "-"), ("control", COLOURS["ink"], ":")):
        value = reference(results, name, column)
        if value is None:
            continue
        if low - room < value < high + room:
            axis.axhline(value, color=colour, linestyle=style, linewidth=1.3, zorder=1, label=f"{name}, val")
            continue
        above = value > high
        words = f"{name} {percent(value)} % {'↑' if above else '↓'}"
        place = (0.02, 0.98, "left", "top") if above else (0.98, 0.03, "right", "bottom")
        axis.text(*place[:2], words, transform=axis.transAxes, ha=place[2], va=place[3])


def _draw_students(axis: Axes, students: Sequence[Student], column: str, tooltips: dict[str, list[str]]) -> None:
    """Exported students as stars, measured on test in the worst case."""
    if not students:
        return
    points = axis.scatter(
        [student.macs for student in students], [student.final[column] for student in students], s=115, marker="*",
        facecolor=COLOURS["gold"], edgecolor=COLOURS["ink"], linewidths=0.8, zorder=5,
        label="exported student, test, worst case",
    )  # fmt: skip
    points.set_gid(f"students-{column}")
    tooltips[f"students-{column}"] = [_tooltip(f"student {one.budget}, test", one.final) for one in students]


def _tooltip(name: str, row: pd.Series) -> str:
    """Text of a point under the mouse pointer."""
    return (
        f"{name} · {human(row['macs'])} MACs · clean {percent(row['clean_acc'])} % · robust "
        f"{percent(row['robust_acc'])} % ({row['attack']})"
    )


def log_macs(axis: Axes, macs: pd.Series) -> None:
    """A logarithmic cost axis with readable ticks."""
    axis.set_xscale("log")
    axis.set_xlabel("multiply-accumulates of one image")
    decades = np.log10(macs.max() / macs.min())
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades > 0.8 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(which="minor", length=0)


def training_figure(results: Results) -> Figure | None:
    """A panel per training: accuracy on val above, loss below, over epochs."""
    runs = [(str(name), rows) for frame in results.histories for name, rows in frame.groupby("phase", sort=False)]
    if not runs:
        return None
    columns = min(4, len(runs))
    lines = -(-len(runs) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.4 * lines + 0.4))
        grid = figure.add_gridspec(2 * lines, columns, height_ratios=[2.2, 1] * lines)
        panels: list[Axes] = []
        for index, (name, rows) in enumerate(runs):
            line, column = divmod(index, columns)
            upper = figure.add_subplot(grid[2 * line, column], sharey=panels[0] if panels else None)
            lower = figure.add_subplot(grid[2 * line + 1, column], sharex=upper)
            panels.append(upper)
            _draw_validation(upper, rows)
            _draw_loss(lower, rows)
            upper.set_title(name)
            upper.tick_params(labelbottom=False, labelleft=column == 0)
            if column == 0:
                upper.set_ylabel("accuracy on val, %")
                lower.set_ylabel("loss, nats")
        panels[0].set_ylim(bottom=0)  # last, since it switches automatic scaling off in all panels
        archs = [name for name in ARCH_COLOURS if any((rows["arch"] == name).any() for _, rows in runs)]
        looks: list[tuple[str, dict[str, Any]]] = [(name, {"color": ARCH_COLOURS[name]}) for name in archs]
        looks += [("robust", {"color": COLOURS["muted"]}), ("clean", {"color": COLOURS["muted"], "linestyle": CLEAN})]
        looks += [("kept epoch", {"color": COLOURS["gold"]})]
        handles = [Line2D([], [], label=name, **look) for name, look in looks]
        figure.legend(handles=handles, loc="lower center", ncols=len(handles))
        figure.tight_layout(rect=(0, 0.28 / figure.get_figheight(), 1, 1))
    return figure


def _draw_validation(axis: Axes, rows: pd.DataFrame) -> None:
    """Clean (dashed) and robust (solid) accuracy of each validated subnet."""
    validated = rows[rows["val_clean_acc"].notna()]
    for arch, of_arch in validated.groupby("arch", sort=False):
        colour = ARCH_COLOURS.get(str(arch), COLOURS["blue"])
        marker = "o" if len(of_arch) < 2 else ""
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4}
        axis.plot(of_arch["epoch"], of_arch["val_clean_acc"], **look, linestyle=CLEAN)
        axis.plot(of_arch["epoch"], of_arch["val_robust_acc"], **look)
    kept = rows.loc[rows["best"].eq(True), "epoch"]
    if not kept.empty:
        axis.axvline(kept.iloc[-1], color=COLOURS["gold"], linewidth=1.2, zorder=1)
    axis.yaxis.set_major_formatter(PERCENT)


def _draw_loss(axis: Axes, rows: pd.DataFrame) -> None:
    """Mean training loss of each epoch."""
    epochs = rows.drop_duplicates("epoch")
    marker = "o" if len(epochs) < 2 else ""
    axis.plot(epochs["epoch"], epochs["loss"], color=COLOURS["muted"], marker=marker, markersize=4)
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=epochs["epoch"].max() > 4))
    axis.yaxis.set_major_locator(MaxNLocator(3))


def predictor_figure(results: Results) -> Figure | None:
    """Measured against predicted accuracy of held-out archs."""
    held_out = results.get("held_out")
    if held_out is None:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.3))
        for axis, (column, label) in zip(figure.subplots(1, 2), TARGETS.items(), strict=True):
            predicted, measured = held_out[f"predicted_{column}"], held_out[column]
            low, high = min(predicted.min(), measured.min()), max(predicted.max(), measured.max())
            margin = 0.05 * (high - low or 0.1)
            limits = low - margin, high + margin
            axis.plot(limits, limits, color=COLOURS["muted"], linewidth=0.9, zorder=1)
            axis.scatter(predicted, measured, s=22, color=COLOURS["blue"], alpha=0.8, linewidths=0)
            axis.set(xlim=limits, ylim=limits, xlabel="predicted, %", ylabel="measured on val, %", aspect="equal")
            axis.set_title(label)
            axis.xaxis.set_major_formatter(PERCENT)
            axis.yaxis.set_major_formatter(PERCENT)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.yaxis.set_major_locator(MaxNLocator(5))
            axis.text(0.03, 0.97, _tau_words(results, column), transform=axis.transAxes, va="top", linespacing=1.5)
        figure.tight_layout(w_pad=3)
    return figure


def _tau_words(results: Results, target: str) -> str:
    """Kendall tau of the chosen model and its ceiling."""
    quality = chosen_quality(results, target)
    if quality is None:
        return ""
    return f"τ {decimal(quality['kendall_tau'])}\nceiling {decimal(quality['noise_ceiling'])}"


def search_figure(results: Results) -> Figure | None:
    """Hypervolume of each search against its number of evaluations."""
    history = results.get("search_history")
    if history is None:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.5))
        axis = figure.subplots()
        for search, (colour, _) in SEARCH_LOOKS.items():
            rows = history[history["search"] == search].sort_values("evaluations")
            if not rows.empty:
                axis.plot(rows["evaluations"], rows["hypervolume"], color=colour, label=SEARCH_NAMES[search])
        whole = history.get("exhaustive_hypervolume")
        if whole is not None and whole.notna().any():
            axis.axhline(whole.max(), color=COLOURS["muted"], linestyle=":", linewidth=1.2, label="whole space")
        axis.set_xlim(left=0)
        axis.set(xlabel="archs evaluated by the predictor", ylabel="hypervolume, predicted")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        figure.legend(loc="lower center", ncols=3)  # below the axes: inside, curves pass through every corner
        figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure
