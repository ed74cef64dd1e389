"""The report as one HTML page that needs nothing beside itself."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from proard import __version__
from proard.progress import duration
from proard.report import sections
from proard.report.cost_page import cost_figure
from proard.report.costs import Comparison, compare
from proard.report.diagnosis import bound_figure, radius_figure
from proard.report.facts import compare_searches, durations, exported_students
from proard.report.figures import front_figure, predictor_figure, search_figure, training_figure
from proard.report.inputs import Results
from proard.report.sections import Section, View
from proard.report.students import accuracy_figure, nearest, networks_of, summary_of
from proard.report.style import STYLE_SHEET
from proard.report.svg import to_svg
from proard.report.text import count, decimal, percent, plural, threat_words

FIGURES = ("front", "training", "predictor", "search", "costs")


@dataclass(frozen=True)
class Report:
    """The page, and its figures as standalone SVG by name; a figure without data is missing."""

    html: str
    figures: dict[str, str]


def render(
    results: Results,
    *,
    html: str | Path,
    title: str,
    norm: str,
    eps: float,
    bootstraps: int = 1000,
    country: str = "USA",
) -> Report:
    """Make the page and its figures.

    Parameters
    ----------
    html : path
        Where the page will lie; links to the students' files are relative to its folder.
    norm, eps
        Threat model of the run; `eps` in pixel units of [0, 1].
    bootstraps : int
        Redraws behind the interval of the hypervolume difference.
    country : str
        Where the energy was used, ISO 3166 alpha-3.
    """
    students = exported_students(results.students)
    verified = results.get("verified")
    cost = results.settings.get("search_front", {}).get("cost", "macs")
    comparison = None
    if verified is not None:
        comparison = compare_searches(verified, cost=cost, bootstraps=bootstraps, seed=results.seed)
    figures = _figures(results, students, eps)
    costs = "" if results.ledgers is None else compare(results.folder, results.ledgers)
    if isinstance(costs, Comparison):
        figures["costs"] = to_svg(cost_figure(costs), "Cost of students one by one over that of the supernet")
    view = View(
        results=results,
        students=students,
        comparison=comparison,
        durations=durations(results.benchmarks) if results.benchmarks else [],
        figures=figures,
        folder=Path(html).parent,
        norm=norm,
        eps=eps,
        ledgers=results.ledgers,
        cost_comparison=costs,
        country=country,
    )
    found = [section for build in sections.ORDER if (section := build(view)) is not None]
    return Report(_document(view, title, found), figures)


def _figures(results: Results, students: list[Any], eps: float) -> dict[str, str]:
    """The standalone SVG of every figure that has data."""
    found: dict[str, str] = {}
    front = front_figure(results, students)
    if front is not None:
        figure, tooltips = front
        found["front"] = to_svg(
            figure, "Clean and robust accuracy of every measured subnet over MACs", tooltips=tooltips
        )
    trained = results.get("trained_students")
    if trained is not None and not networks_of(trained).empty:
        rows = summary_of(networks_of(trained))
        figure = accuracy_figure(rows[rows["eps"] == nearest(rows, eps)])
        found["trained"] = to_svg(figure, "Clean and robust accuracy of students trained one by one")
    summary, radii = results.get("diagnosis_summary"), results.get("diagnosis_radii")
    for name, figure, title in (
        ("training", training_figure(results), "Accuracy on val and loss over the epochs of every training"),
        ("predictor", predictor_figure(results), "Predicted and measured accuracy of held-out archs"),
        ("search", search_figure(results), "Hypervolume over evaluations of NSGA-II and of random search"),
        ("bound", bound_figure(summary), "Terms of the bound on how far student and teacher differ"),
        ("radius", radius_figure(radii), "Share of images right within a radius"),
    ):
        if figure is not None:
            found[name] = to_svg(figure, title)
    return found


def _document(view: View, title: str, found: list[Section]) -> str:
    """The whole document."""
    links = "".join(f'<a href="#{section.id}">{escape(section.short)}</a>' for section in found)
    body = "\n".join(
        f'<section id="{section.id}">\n<h2>{escape(section.title)}</h2>\n{section.body}\n</section>'
        for section in found
    )
    results = view.results
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} · {escape(results.run)}</title>
<style>{STYLE_SHEET}</style>
</head>
<body>
<header>
<p class="overline">run {escape(results.run)} · seed {results.seed} · proard {escape(__version__)}</p>
<h1>{escape(title)}</h1>
{_lede(view)}
{_cards(view)}
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{body}
</main>
<footer>Every accuracy on this page was measured unless it is called predicted. Choices were made on val; test was only
read for this report. MACs are multiply-accumulates of one image.</footer>
</body>
</html>
"""


def _lede(view: View) -> str:
    """The result in two sentences."""
    if not view.students:
        return ""
    costs = [student.macs for student in view.students]
    best, control = view.best, view.control_on_test
    span = (
        f"between {count(min(costs))} and {count(max(costs))} MACs"
        if len(set(costs)) > 1
        else f"of {count(costs[0])} MACs"
    )
    text = (
        f"{plural(len(view.students), 'student')} {span}, cut from one supernet that was trained once. "
        f"The best keeps <strong>{percent(best.final['robust_acc'])} %</strong> of "
        f"{int(best.final['num_images']):,} test images right under attack within {threat_words(view.norm, view.eps)}"
    )
    if control is not None:
        text += f"; a plainly trained network keeps {percent(control['robust_acc'])} %"
    return f'<p class="lede">{text}.</p>'


def _cards(view: View) -> str:
    """Headline figures in a row."""
    cards = []
    if view.students:
        best = view.best.final
        how = f"{percent(best['clean_acc'])} % clean, {count(view.best.macs)} MACs, asked for with {view.best.budget}"
        cards.append(_card(percent(best["robust_acc"]), "%", "best student, robust", how, first=True))
    control = view.control_on_test
    if control is not None:
        how = f"{percent(control['clean_acc'])} % clean, plainly trained, {count(control['macs'])} MACs, same attack"
        cards.append(_card(percent(control["robust_acc"]), "%", "control, robust", how))
    if view.students:
        number, smallest = len(view.students), min(student.macs for student in view.students)
        what = "students exported" if number > 1 else "student exported"
        how = f"one per budget, from {count(smallest)} MACs, as ONNX, pt2 and safetensors"
        cards.append(_card(str(number), "", what, how))
    quality = view.quality("robust_acc")
    if quality is not None:
        how = f"Kendall τ of robust accuracy on {int(quality['num_held_out'])} held-out archs"
        if not pd.isna(quality["noise_ceiling"]):
            how += f"; two halves of the labels agree at {decimal(quality['noise_ceiling'])}"
        cards.append(_card(decimal(quality["kendall_tau"]), "", "predictor", how))
    if view.durations:
        jobs = plural(sum(entry.jobs for entry in view.durations), "job")
        value, unit = duration(sum(entry.seconds for entry in view.durations)).split(" ", 1)
        cards.append(_card(value, unit, "computed", f"wall time summed over {jobs}"))
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _card(value: str, unit: str, what: str, how: str, *, first: bool = False) -> str:
    """One headline figure."""
    small = f"<small>{escape(unit)}</small>" if unit else ""
    return (
        f'<div class="card{" first" if first else ""}"><b>{escape(value)}{small}</b>'
        f'<span class="what">{escape(what)}</span><span class="how">{escape(how)}</span></div>'
    )


def placeholder(name: str) -> str:
    """A small SVG for a figure whose tables were not given."""
    words = f"{escape(name)}: the tables of this figure were not given"
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 60" role="img"><title>{words}</title>'
        f'<text x="16" y="36" font-family="sans-serif" font-size="14">{words}</text></svg>\n'
    )
