"""The report as one HTML page that needs no other file."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from proard import __version__
from proard.config import searched_costs
from proard.report import sections, text
from proard.report.context import Context, fill
from proard.report.cost_page import cost_figure
from proard.report.costs import CostComparison, compare
from proard.report.device import device_figure, device_files
from proard.report.diagnosis import bound_figure, radius_figure
from proard.report.facts import durations, exported_students
from proard.report.figures import front_figure, predictor_figure, search_figure, training_figure
from proard.report.fronts import SearchComparison, compare_searches
from proard.report.inputs import Results
from proard.report.students import accuracy_figure, nearest, networks_of, summary_of
from proard.report.svg import to_svg

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
        Number of bootstrap samples for the interval of the hypervolume difference.
    country : str
        Country of the energy's use, ISO 3166 alpha-3.
    """
    students = exported_students(results.students)
    verified = results.get("verified")
    comparisons: list[SearchComparison] = []
    if verified is not None:
        comparisons = compare_searches(
            verified, costs=searched_costs(results.settings), bootstraps=bootstraps, seed=results.seed
        )
    figures = _figures(results, students, eps)
    costs = "" if results.ledgers is None or results.folder is None else compare(results.folder, results.ledgers)
    if isinstance(costs, CostComparison):
        figures["costs"] = to_svg(cost_figure(costs), "Cost of students one by one divided by that of the supernet")
    context = Context(
        results=results,
        students=students,
        comparisons=comparisons,
        durations=durations(results.benchmarks) if results.benchmarks else [],
        figures=figures,
        folder=Path(html).parent,
        norm=norm,
        eps=eps,
        ledgers=results.ledgers,
        cost_comparison=costs,
        country=country,
    )
    found = [section for build in sections.ORDER if (section := build(context)) is not None]
    page = fill(
        "page", context=context, title=title, sections=found, version=__version__, threat_words=text.threat_words
    )
    return Report(page, figures)


def _figures(results: Results, students: list[Any], eps: float) -> dict[str, str]:
    """The standalone SVG of every figure that has data."""
    found: dict[str, str] = {}
    front = front_figure(results, students)
    if front is not None:
        figure, tooltips = front
        found["front"] = to_svg(
            figure, "Clean and robust accuracy of every measured subnet over MACs", tooltips=tooltips
        )
    on_device = device_figure(device_files(results, students))
    if on_device is not None:
        figure, tooltips = on_device
        found["device"] = to_svg(figure, "Robust accuracy of every file over its measured time", tooltips=tooltips)
    trained = results.get("trained_students")
    if trained is not None and not networks_of(trained).empty:
        rows = summary_of(networks_of(trained))
        figure = accuracy_figure(rows[rows["eps"] == nearest(rows, eps)])
        found["trained"] = to_svg(figure, "Clean and robust accuracy of students trained one by one")
    summary, radii = results.get("diagnosis_summary"), results.get("diagnosis_radii")
    drawn: tuple[tuple[str, Figure | None, str], ...] = (
        ("training", training_figure(results), "Accuracy on val and loss over the epochs of every training"),
        ("predictor", predictor_figure(results), "Predicted and measured accuracy of held-out archs"),
        ("search", search_figure(results), "Hypervolume over evaluations of NSGA-II and of random search"),
        ("bound", bound_figure(summary), "Terms of the bound on how far student and teacher differ"),
        ("radius", radius_figure(radii), "Share of images classified correctly within a radius"),
    )
    return found | {name: to_svg(figure, title) for name, figure, title in drawn if figure is not None}


def placeholder(name: str) -> str:
    """A small SVG for a figure whose tables were not given."""
    words = f"{escape(name)}: the tables of this figure were not given"
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 60" role="img"><title>{words}</title>'
        f'<text x="16" y="36" font-family="sans-serif" font-size="14">{words}</text></svg>\n'
    )
