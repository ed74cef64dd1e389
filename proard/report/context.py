"""Shared by the page's sections: the values they read, and the templates that turn them into HTML."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from proard.artifacts import AUTOATTACK_UNION
from proard.progress import duration
from proard.report import text
from proard.report.costs import CostComparison
from proard.report.facts import Duration, Student, chosen_quality, headline_row, rows_by_attack
from proard.report.fronts import SearchComparison
from proard.report.inputs import Card, Results
from proard.report.svg import inline

WORDS = (text.amount, text.count, text.decimal, text.interval, text.percent, text.pixels, text.plural, text.signed)
TEMPLATES = Environment(
    loader=PackageLoader("proard.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"duration": duration, "whole": text.whole, **{shown.__name__: shown for shown in WORDS}}
TEMPLATES.tests["known"] = lambda value: not pd.isna(value)


@dataclass(frozen=True)
class Section:
    """One part of the page; `short` is its name in the navigation."""

    id: str
    short: str
    title: str
    body: Markup


def section(name: str, short: str, title: str, **values: Any) -> Section:
    """A section from its template and the template's values."""
    return Section(name, short, title, fill(name, **values))


def fill(name: str, **values: Any) -> Markup:
    """The HTML of a template; values are escaped."""
    return Markup(TEMPLATES.get_template(f"{name}.html.j2").render(values))


@dataclass(frozen=True)
class Context:
    """Inputs of the sections. `folder` is the page's folder; `figures` are standalone SVG by name.

    `cost_comparison` is text if there is none: what is missing. `country` converts energy to emissions.
    """

    results: Results
    students: list[Student]
    comparisons: list[SearchComparison]
    durations: list[Duration]
    figures: dict[str, str]
    folder: Path
    norm: str
    eps: float
    ledgers: pd.DataFrame | None = None
    cost_comparison: CostComparison | str = ""
    country: str = "USA"

    @property
    def best_autoattacked(self) -> pd.Series | None:
        """AutoAttack's row of all attacks for the best student, where there is one."""
        for table in self.results.autoattacked if self.students else ():
            if str(table["budget"].iloc[0]) == self.best.budget:
                return table[table["attack"] == AUTOATTACK_UNION].iloc[0]
        return None

    @property
    def best(self) -> Student:
        """The student with the highest robust accuracy; the cheapest of several."""
        return max(self.students, key=lambda student: (student.final["robust_acc"], -student.macs))

    @property
    def control_on_test(self) -> pd.Series | None:
        """The control's headline row on test."""
        control = self.results.get("control_table")
        rows = {} if control is None else rows_by_attack(control, "test")
        return headline_row(rows) if rows else None

    def quality(self, target: str) -> pd.Series | None:
        """Quality of the kept predictor for one target."""
        return chosen_quality(self.results, target)

    def card(self, budget: str) -> Card | None:
        """The export of a budget."""
        return next((card for card in self.results.cards if card.parity["budget"] == budget), None)

    def objective(self, attack: str) -> str | None:
        """Objective of an attack, from the settings of the stages that ran it."""
        settings = self.results.settings
        known = list(settings.get("verify_front", {}).get("attacks", ()))
        known += [settings[stage]["attack"] for stage in ("evaluate_archs", "select_student") if stage in settings]
        return next((entry["objective"] for entry in known if entry["name"] == attack), None)

    def words(self, row: pd.Series) -> str:
        """The attack of a row in words."""
        return text.attack_words(row, self.objective(str(row["attack"])))

    def path(self, path: Path, start: Path | None = None) -> str:
        """A path relative to the page's folder, or to another one."""
        return Path(os.path.relpath(path, start or self.folder)).as_posix()

    def inline(self, name: str) -> Markup:
        """A figure as a part of the page."""
        return Markup(inline(self.figures[name], name))
