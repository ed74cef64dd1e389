"""Networks trained alone: means over seeds as a table, and the figures that compare them."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pandas as pd
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from proard.report.context import Context, Section, section
from proard.report.figures import PERCENT
from proard.report.svg import COLOURS, STYLE, to_svg
from proard.report.text import percent, pixels

INT, FLOAT, TEXT = pa.int64(), pa.float64(), pa.string()
SUMMARY: dict[str, tuple[pa.DataType, str]] = {
    "group": (TEXT, "student without its seed"),
    "net": (TEXT, "network"),
    "loss": (TEXT, "loss of the training"),
    "macs": (INT, "multiply-accumulates of one image"),
    "params": (INT, "trained numbers"),
    "split": (TEXT, "train, val or test"),
    "attack": (TEXT, "attack; worst: worst case per image of the shared ones; own: that of the training"),
    "eps": (FLOAT, "pixel units of [0, 1]"),
    "seeds": (INT, "trainings"),
    "num_images": (INT, "images"),
    "clean_acc": (FLOAT, "fraction, mean over seeds"),
    "clean_acc_sd": (FLOAT, "fraction, standard deviation over seeds; empty for one seed"),
    "robust_acc": (FLOAT, "fraction, mean over seeds"),
    "robust_acc_sd": (FLOAT, "fraction, standard deviation over seeds; empty for one seed"),
    "val_robust_acc": (FLOAT, "fraction of val at the kept epoch, mean over seeds"),
    "lr": (FLOAT, "highest learning rate"),
    "epochs": (FLOAT, "passes over the training images"),
    "train_steps": (INT, "attack steps of the training"),
    "train_step_size": (FLOAT, "pixel units of [0, 1]"),
    "train_gradients": (FLOAT, "backward passes of one image, mean over seeds"),
    "train_forward_equivalents": (FLOAT, "image forward-equivalents, mean over seeds"),
    "seconds_per_epoch": (FLOAT, "wall seconds per pass, mean over seeds"),
    "peak_memory": (INT, "greatest resident memory of a training, bytes"),
}
FIXED = ("net", "loss", "macs", "params", "num_images", "lr", "epochs", "train_steps", "train_step_size")
MEANS = ("val_robust_acc", "train_gradients", "train_forward_equivalents", "seconds_per_epoch")
FIGURES = ("accuracy_figure", "own_figure", "eps_figure", "cost_figure")
SHOWN = 40  # groups in a figure: those of the highest robust accuracy on val
CYCLE = [COLOURS[name] for name in ("blue", "orange", "green", "gold", "sky", "navy", "muted", "ink")]
MARKERS = "o^sDvP*X"
KINDS = {"clean": (COLOURS["muted"], "o"), "own": (COLOURS["orange"], "^"), "worst": (COLOURS["blue"], "s")}


def networks_of(table: pd.DataFrame) -> pd.DataFrame:
    """TRAININGS rows of whole networks on test, without subnets of supernets."""
    return table[(table["role"] != "subnet") & (table["split"] == "test")]


def summary_of(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the seeds of every (group, attack, eps), in the order of `table`.

    Parameters
    ----------
    table : DataFrame
        TRAININGS rows of networks.
    """
    rows = []
    for (group, split, attack, eps), found in table.groupby(["group", "split", "attack", "eps"], sort=False):
        first = found.iloc[0]
        row = {"group": group, "split": split, "attack": attack, "eps": eps, "seeds": len(found)}
        row |= {name: first[name] for name in FIXED} | {name: found[name].mean() for name in MEANS}
        for kind in ("clean_acc", "robust_acc"):
            row |= {kind: found[kind].mean(), f"{kind}_sd": found[kind].std() if len(found) > 1 else None}
        rows.append({**row, "peak_memory": found["peak_memory"].max()})
    return pd.DataFrame(rows, columns=list(SUMMARY))


def summary_lines(summary: pd.DataFrame, *, eps: float) -> list[str]:
    """A line per group: clean, every attack at the radius nearest to `eps`, gradients; for the terminal."""
    at = summary[summary["eps"] == nearest(summary, eps)]
    attacks = list(dict.fromkeys(at["attack"]))
    width = max(map(len, at["group"]))
    lines = [" ".join([f"{'student':<{width}}", f"{'clean':>12}", *(f"{name:>12}" for name in attacks), "gradients"])]
    for group, rows in at.groupby("group", sort=False):
        first, by_attack = rows.iloc[0], rows.set_index("attack")
        cells = [f"{_spread(first, 'clean_acc'):>12}"]
        cells += [
            f"{_spread(by_attack.loc[name], 'robust_acc') if name in by_attack.index else '–':>12}" for name in attacks
        ]
        lines.append(" ".join([f"{group:<{width}}", *cells, f"{first['train_gradients'] / 1e6:8.2f}M"]))
    return lines


def trained_students(context: Context) -> Section | None:
    """Students that were trained one by one, and those of the supernet if the table has them."""
    table = context.results.get("trained_students")
    if table is None:
        return None
    table = networks_of(table)
    if table.empty:
        return None
    summary = summary_of(table)
    at = summary[summary["eps"] == nearest(summary, context.eps)]
    shared = [name for name in dict.fromkeys(at["attack"]) if name not in ("own", "worst")]
    return section(
        "trained",
        "One by one",
        "Students trained one by one",
        context=context,
        attacks=["own", *shared, "worst"],
        groups=[
            (group, rows.iloc[0], {row["attack"]: row for _, row in rows.iterrows()})
            for group, rows in at.groupby("group", sort=False)
        ],
        images=at["num_images"].max(),
        eps=at["eps"].iloc[0],
        spread=_spread,
    )


def nearest(summary: pd.DataFrame, eps: float) -> float:
    """The measured radius that is nearest to this one."""
    return min(summary["eps"].unique(), key=lambda value: abs(value - eps))


def figures_of(table: pd.DataFrame, summary: pd.DataFrame, *, eps: float, title: str) -> dict[str, str]:
    """All figures as SVG, by name.

    Parameters
    ----------
    table, summary : DataFrame
        TRAININGS rows and their `summary_of`.
    eps : float
        The threat's radius in pixel units.
    title : str
        Title for screen readers, before each figure's own.
    """
    kept = summary[summary["group"].isin(shown_groups(summary))]
    at = kept[kept["eps"] == nearest(summary, eps)]
    drawn = {
        "accuracy_figure": (accuracy_figure(at), "clean and robust accuracy of every student"),
        "own_figure": (own_figure(at), "accuracy under a training's own attack and in the worst case"),
        "eps_figure": (eps_figure(kept), "worst-case accuracy over the radius of the attack"),
        "cost_figure": (cost_figure(at, table), "worst-case accuracy over the gradients of the training"),
    }
    return {name: to_svg(figure, f"{title}: {words}") for name, (figure, words) in drawn.items()}


def shown_groups(summary: pd.DataFrame) -> list[str]:
    """Groups in order; if a figure cannot hold all, those most robust on val (test chooses nothing)."""
    best = summary.drop_duplicates("group").set_index("group")["val_robust_acc"].fillna(0)
    chosen = set(best.sort_values(ascending=False, kind="stable").index[:SHOWN])
    return [group for group in best.index if group in chosen]


def accuracy_figure(at: pd.DataFrame) -> Figure:
    """A line of dots per group: clean, under its own attack, in the worst case; bars are one standard deviation."""
    groups = list(dict.fromkeys(at["group"]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 1.3 + 0.27 * len(groups)))
        axis = figure.subplots()
        for kind, (colour, marker) in KINDS.items():
            rows = at[at["attack"] == ("worst" if kind == "clean" else kind)]
            column = "clean_acc" if kind == "clean" else "robust_acc"
            places = [groups.index(group) for group in rows["group"]]
            axis.errorbar(
                rows[column], places, xerr=rows[f"{column}_sd"].astype(float).fillna(0), fmt=marker, color=colour,
                markersize=5.5, elinewidth=1.1, label=_label(kind),
            )  # fmt: skip
        axis.set_yticks(range(len(groups)), groups)
        axis.set_ylim(len(groups) - 0.5, -0.5)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter(PERCENT)
        axis.set_xlabel(f"accuracy on test, %, eps {pixels(float(at['eps'].iloc[0]))}")
        figure.legend(loc="lower center", ncols=3)
        figure.tight_layout(rect=(0, 0.32 / figure.get_figheight(), 1, 1))
    return figure


def own_figure(at: pd.DataFrame) -> Figure:
    """Every group's accuracy under its own training attack against that in the worst case."""
    both = at.pivot(index="group", columns="attack", values="robust_acc")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.6))
        axis = figure.subplots()
        if "own" in both:
            both = both.dropna(subset=["own", "worst"])
            steps = at.drop_duplicates("group").set_index("group")["train_steps"].reindex(both.index)
            for index, count in enumerate(sorted(steps.unique())):
                look: dict[str, Any] = {"color": CYCLE[index % len(CYCLE)], "marker": MARKERS[index % len(MARKERS)]}
                words = f"{count:.0f} step" + ("s" if count > 1 else "")
                rows = both[steps == count]
                axis.scatter(rows["worst"], rows["own"], s=34, linewidths=0, label=words, **look)
            top = 1.05 * float(both[["own", "worst"]].max().max() or 1)
            axis.plot((0, top), (0, top), color=COLOURS["muted"], linewidth=0.9, zorder=1)
            axis.set(xlim=(0, top), ylim=(0, top))
            axis.legend(title="training attack", loc="lower right")
        axis.set(xlabel="worst case of the shared attacks, %", ylabel="own training attack, %")
        axis.xaxis.set_major_formatter(PERCENT)
        axis.yaxis.set_major_formatter(PERCENT)
        figure.tight_layout()
    return figure


def eps_figure(summary: pd.DataFrame) -> Figure:
    """Worst-case accuracy of every group against the radius; at radius 0 the clean accuracy."""
    worst = summary[summary["attack"] == "worst"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.8, 4.4))
        axis = figure.subplots()
        for index, (group, rows) in enumerate(worst.groupby("group", sort=False)):
            rows = rows.sort_values("eps")
            line, turn = index % len(CYCLE), index // len(CYCLE)
            axis.plot(
                [0, *(255 * rows["eps"])], [rows["clean_acc"].iloc[0], *rows["robust_acc"]], color=CYCLE[line],
                marker=MARKERS[line], markersize=4.5, linestyle=("-", "--", ":", "-.")[turn % 4], label=group,
            )  # fmt: skip
        axis.set(xlabel="eps, in 255ths", ylabel="worst-case accuracy on test, %")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(PERCENT)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7.5)
        figure.tight_layout()
    return figure


def cost_figure(at: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Worst-case accuracy against the number of gradients of a training, every seed a dot."""
    worst = table[(table["attack"] == "worst") & (table["eps"] == at["eps"].iloc[0])]
    worst = worst[worst["group"].isin(at["group"])]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.8, 4.4))
        axis = figure.subplots()
        for index, (group, rows) in enumerate(worst.groupby("group", sort=False)):
            look: dict[str, Any] = {
                "color": CYCLE[index % len(CYCLE)],
                "marker": MARKERS[index // len(CYCLE) % len(MARKERS)],
            }
            axis.scatter(rows["train_gradients"], rows["robust_acc"], s=30, linewidths=0, label=group, **look)
        _million(axis)
        axis.set_ylabel("worst-case accuracy on test, %")
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(PERCENT)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7.5)
        figure.tight_layout()
    return figure


def _million(axis: Axes) -> None:
    """Gradients in millions."""
    axis.set_xlim(left=0)
    axis.set_xlabel("gradients of the training, millions of images")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}"))


def _label(kind: str) -> str:
    """Label of a kind of accuracy in the legend."""
    return {"clean": "clean", "own": "own training attack", "worst": "worst case of the shared attacks"}[kind]


def _spread(row: pd.Series, column: str) -> str:
    """A mean in percent and its standard deviation where there is one."""
    deviation = row[f"{column}_sd"]
    return percent(row[column]) + ("" if deviation is None or pd.isna(deviation) else f" ± {percent(deviation)}")
