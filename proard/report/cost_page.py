"""The page's section on costs: those of each stage, and the supernet compared with students trained one by one."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from proard.report.context import Context, Section, section
from proard.report.costs import CostComparison, by_stage, emissions
from proard.report.svg import COLOURS, STYLE

BUDGET_WORDS = {
    "steps": "as many optimizer steps as all phases",
    "path": "those and the teacher's, whose weights the supernet was initialised with",
}
NUMBERS = (1, 2, 5, 10, 20, 50, 100)
CLAIM = 60  # the paper's "up to 60x"


def cost_figure(comparison: CostComparison) -> Figure:
    """Cost of students trained one by one divided by that of the supernet, against their number."""
    looks = {"mean of the exported students": COLOURS["blue"], "mean of the sampled subnets": COLOURS["orange"]}
    styles = {"steps": "-", "path": (0, (4, 2))}
    numbers = np.geomspace(1, 1000, 60)
    panels = {"Everything counted": comparison.ratio, "Training steps only": comparison.training_ratio}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 4.2))
        for axis, (title, ratio) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
            for name, macs in comparison.sizes.items():
                for budget in comparison.images:
                    look = {"color": looks[name], "linestyle": styles[budget], "label": f"{name}, {budget}"}
                    axis.plot(numbers, [ratio(number, macs, budget) for number in numbers], **look)
            axis.axhline(1, color=COLOURS["ink"], linewidth=0.8)
            axis.axhline(
                CLAIM, color=COLOURS["muted"], linewidth=0.8, linestyle=":", label=f"{CLAIM}, the paper's claim"
            )
            axis.set(xscale="log", yscale="log", xlabel="number of students", title=title)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        figure.axes[0].set_ylabel("cost one by one / cost of the supernet")
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=3)
        figure.tight_layout(rect=(0, 0.12, 1, 1), w_pad=2.5)
    return figure


def costs(context: Context) -> Section | None:
    """The costs of each stage, and the comparison if it is possible."""
    ledgers = context.ledgers
    if ledgers is None or ledgers.empty:
        return None
    metered = ledgers.get("energy_wh", pd.Series(dtype=float)).dropna()
    energy = float(metered.sum()) if len(metered) else None
    return section(
        "costs",
        "Costs",
        "What it cost",
        context=context,
        stages=by_stage(ledgers).to_dict("records"),
        energy=energy,
        grams=None if energy is None else emissions(energy, context.country),
        methods=[] if energy is None else sorted(set(ledgers["energy_method"].dropna())),
        others=sorted(set(ledgers["counted"]) - {"ledger"}),
        found=context.cost_comparison,
        numbers=NUMBERS,
        budget_words=BUDGET_WORDS,
        gib=lambda size: f"{size / 2**30:.1f}",
    )
