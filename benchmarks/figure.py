"""The ladder of the training step as a figure: both ratios, lever by lever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from proard.report.svg import COLOURS, STYLE


def ladder_figure(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Bars of the ratios of every row of `bench_step`, the released step at the top; None without such rows.

    Where several runs of the ladder are among the rows, the first one (its space, its scale) is drawn.
    """
    steps = [row for row in rows if row["bench"] == "step" and "ratio_plain" in row]
    if not steps:
        return None
    steps = [row for row in steps if _run(row) == _run(steps[0])]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 0.42 * len(steps) + 1.55))
        axis = figure.subplots()
        looks = (("ratio_total", "released", "blue", -0.18), ("ratio_plain", "plain", "orange", 0.18))
        for key, name, colour, offset in looks:
            places = [index + offset for index in range(len(steps))]
            values = [row[key] for row in steps]
            axis.barh(places, values, height=0.34, color=COLOURS[colour], label=f"times faster than the {name} step")
            for place, value in zip(places, values, strict=True):
                axis.annotate(f"{value:.2f}", (value, place), (3, 0), textcoords="offset points", va="center", size=8)
        axis.axvline(1, color=COLOURS["muted"], linewidth=0.8)
        axis.set_yticks(range(len(steps)), [row["lever"] for row in steps])
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        axis.set_xlim(0, 1.12 * max(max(row["ratio_total"], row["ratio_plain"]) for row in steps))
        first = steps[0]
        figure.suptitle(
            f"Training step, {first['space']} at width {first['width_scale']:g}, batch {first['batch']}, "
            f"PGD-{first['num_steps']}" + (" (noisy run)" if first.get("noisy") else ""),
            x=0.01,
            ha="left",
            size=12,
            weight="bold",
        )
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        figure.legend(loc="lower right", ncols=2)
    return figure


def _run(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells one run of the ladder from another."""
    return tuple(row.get(key) for key in ("space", "width_scale", "batch", "num_steps", "seed"))
