"""The page's section on costs: what each stage took, and the supernet beside students trained one by one."""

from __future__ import annotations

from html import escape

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from proard.progress import duration
from proard.report.costs import Comparison, by_stage, emissions
from proard.report.svg import COLOURS, STYLE
from proard.report.text import amount
from proard.report.view import Section, View, cell, head

BUDGET_WORDS = {
    "steps": "as many optimizer steps as all phases",
    "path": "those and the teacher's, whose weights the supernet began with",
}
NUMBERS = (1, 2, 5, 10, 20, 50, 100)
CLAIM = 60  # the paper's "up to 60x"


def cost_figure(comparison: Comparison) -> Figure:
    """Cost of students trained one by one over that of the supernet, over their number."""
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


def costs(view: View) -> Section | None:
    """What each stage took, and the comparison where it can be made."""
    ledgers = view.ledgers
    if ledgers is None or ledgers.empty:
        return None
    table = by_stage(ledgers)
    rows = "".join(_row(entry) for _, entry in table.iterrows())
    names = ["stage", "jobs", "wall time", "device time", "passes", "MACs", "found in cache, MACs", "peak GiB", "Wh"]
    heads = head(names[0]) + "".join(head(name) for name in names[1:])
    body = f"""<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>
<p class="caption">{_caption(view, ledgers)}</p>{_comparison(view)}"""
    return Section("costs", "Costs", "What it cost", body)


def _row(entry: pd.Series) -> str:
    """One stage."""
    known = {name: entry[name] for name in entry.index if not pd.isna(entry[name])}

    def shown(name: str, words: str) -> str:
        return cell(words.format(known[name]) if name in known else "–", "nowrap")

    def sum_of(name: str) -> str:
        return cell(amount(known[name]) if known.get(name) else "–", "nowrap")

    def time(name: str) -> str:
        return cell(duration(known[name]) if name in known else "–", "nowrap")

    cells = [cell(f"<code>{escape(entry['stage'])}</code>", "nowrap"), cell(str(entry["jobs"]))]
    cells += [time("seconds"), time("device_seconds"), sum_of("forward_equivalents"), sum_of("work_macs")]
    peaks = [f"{known['peak_rss_bytes'] / 2**30:.1f}" if "peak_rss_bytes" in known else "–"]
    peaks += [f"GPU {known['peak_cuda_bytes'] / 2**30:.1f}"] if known.get("peak_cuda_bytes") else []
    peak = cell(", ".join(peaks), "nowrap")
    return f"<tr>{''.join([*cells, sum_of('cached_macs'), peak, shown('energy_wh', '{:.3g}')])}</tr>"


def _caption(view: View, ledgers: pd.DataFrame) -> str:
    """How the table was counted."""
    words = (
        "Passes are image forward-equivalents, counted: forward 1, gradient of the image 1 more, backward pass of "
        "training 2 more. MACs: each pass times the multiply-accumulates of its network. Wall time: each job from the "
        "reading of its command line on, all starts of an interrupted training; the section on time has Snakemake's, "
        "with the start of Python, but of the last start only. Device time: wall time times the threads or GPUs held. "
        "Measurements found in the cache were paid before and stand apart."
    )
    energy = ledgers.get("energy_wh", pd.Series(dtype=float)).dropna()
    if len(energy):
        grams, total = emissions(float(energy.sum()), view.country), float(energy.sum())
        methods = "; ".join(sorted(set(ledgers["energy_method"].dropna())))
        words += f" Energy {total:.3g} Wh, {grams:.3g} g CO₂ equivalents in {escape(view.country)}: {escape(methods)}."
    others = sorted(set(ledgers["counted"]) - {"ledger"})
    if others:
        words += f" Jobs without a ledger were read from their {' and '.join(others)} and lack what those do not say."
    return words


def _comparison(view: View) -> str:
    """The ratio over the number of students."""
    found = view.cost_comparison
    if not isinstance(found, Comparison):
        return f'<p class="caption">{escape(found)}.</p>' if found else ""
    rows = ""
    for name, macs in found.sizes.items():
        for budget in found.images:
            even = found.break_even(macs, budget)
            cells = [cell(escape(name)), cell(amount(macs), "nowrap"), cell(budget, "left")]
            cells += [cell(amount(found.alone(macs, budget)), "nowrap"), cell("never" if even is None else f"{even:,}")]
            cells += [cell(f"{found.ratio(number, macs, budget):.2f}") for number in NUMBERS]
            rows += f"<tr>{''.join(cells)}</tr>"
    heads = head("student") + head("MACs") + head("budget", "left") + head("alone, MACs") + head("break-even")
    heads += "".join(head(f"{number}") for number in NUMBERS)
    budgets = "; ".join(f"<em>{budget}</em>: {BUDGET_WORDS[budget]}" for budget in found.images)
    figure = view.figure("costs", "Above 1 the supernet is the cheaper way.") if "costs" in view.figures else ""
    return f"""<h3>Students trained one by one</h3>
<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>
<p class="caption">Columns 1 to {NUMBERS[-1]}: cost of that many students trained one by one over that of the
supernet run, in MACs. Both sides pay for data and teacher ({amount(found.shared)} MACs). The supernet also pays for its
phases, the table, predictor, search and all their measurements ({amount(found.once)}), and for choosing and exporting
each student ({amount(found.each)}); a student alone only for its training steps, on the last phase's loss:
{found.own:g} passes of each image through itself, {found.others:g} through the teacher. Its number of gradient
evaluations: {budgets}.</p>{figure}"""
