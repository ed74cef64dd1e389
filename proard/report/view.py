"""What the page's sections share: the facts they read and the few shapes of HTML they are made of."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from proard.report.costs import Comparison as CostComparison
from proard.report.facts import Comparison, Duration, Student, chosen_quality, headline_row, rows_by_attack
from proard.report.inputs import Card, Results
from proard.report.svg import inline
from proard.report.text import interval, percent


@dataclass(frozen=True)
class Section:
    """One part of the page; `short` is its name in the navigation."""

    id: str
    short: str
    title: str
    body: str


@dataclass(frozen=True)
class View:
    """Everything a section may need. `folder` is where the page lies; `figures` are standalone SVG by name.

    `cost_comparison` says what is missing where there is none; `country` converts energy to emissions.
    """

    results: Results
    students: list[Student]
    comparison: Comparison | None
    durations: list[Duration]
    figures: dict[str, str]
    folder: Path
    norm: str
    eps: float
    ledgers: pd.DataFrame | None = None
    cost_comparison: CostComparison | str = ""
    country: str = "USA"

    @property
    def best(self) -> Student:
        """The student that keeps most images right; the cheapest of several."""
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
        """The export's record of a budget."""
        return next((card for card in self.results.cards if card.parity["budget"] == budget), None)

    def objective(self, attack: str) -> str | None:
        """What an attack maximises, from the settings of the stages that ran it."""
        settings = self.results.settings
        known = list(settings.get("verify_front", {}).get("attacks", ()))
        known += [settings[stage]["attack"] for stage in ("evaluate_archs", "select_student") if stage in settings]
        return next((entry["objective"] for entry in known if entry["name"] == attack), None)

    def link(self, path: Path, text: str) -> str:
        """A link relative to the page's folder."""
        target = Path(os.path.relpath(path, self.folder)).as_posix()
        return f'<a href="{escape(target)}">{escape(text)}</a>'

    def figure(self, name: str, caption: str) -> str:
        """A figure with its caption."""
        svg = inline(self.figures[name], name)
        return f'<div class="scroll figure">{svg}</div>\n<p class="caption">{caption}</p>'


def cell(content: str, *classes: str, span: int = 1) -> str:
    """A table cell; `content` is HTML."""
    kind = f' class="{" ".join(classes)}"' if classes else ""
    width = f' colspan="{span}"' if span > 1 else ""
    return f"<td{kind}{width}>{content}</td>"


def head(content: str, *classes: str, span: int = 1) -> str:
    """A heading cell."""
    return cell(content, *classes, span=span).replace("<td", "<th").replace("</td>", "</th>")


def accuracy(row: Mapping[str, Any] | None, column: str, *classes: str) -> str:
    """A cell with an accuracy in percent and its interval below."""
    if row is None or pd.isna(row[column]):
        return cell("–", *classes)
    span = interval(row, column)
    below = f'<span class="rangy">{span}</span>' if span else ""
    return cell(f"{percent(row[column])}{below}", *classes)


def definitions(entries: Iterable[tuple[str, str]]) -> str:
    """A list of terms; the texts are HTML, empty ones are left out."""
    return "<dl>" + "".join(f"<dt>{escape(term)}</dt><dd>{text}</dd>" for term, text in entries if text) + "</dl>"
