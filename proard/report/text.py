"""Numbers and names as people read them. Percent appears here and nowhere else in the package."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pandas as pd

from proard.space.cost import human

SEARCH_NAMES = {"nsga2": "NSGA-II", "random": "random search", "exhaustive": "exhaustive"}
OBJECTIVES = {"ce": "cross-entropy", "margin": "logit margin (CW)"}
NORMS = {"linf": "ℓ∞"}  # noqa: RUF001 - the norm's usual sign


def percent(share: Any, digits: int = 1) -> str:
    """A fraction in percent, without the sign; a dash where there is none."""
    return "–" if share is None or pd.isna(share) else f"{100 * float(share):.{digits}f}"  # noqa: RUF001


def interval(row: Mapping[str, Any], column: str) -> str:
    """A column's 95 % interval in percent, as a range; empty where the table has none."""
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    return "" if low is None or high is None or pd.isna(low) or pd.isna(high) else f"{percent(low)}–{percent(high)}"  # noqa: RUF001


def pixels(length: float) -> str:
    """A length in pixel units of [0, 1] as n/255 where it is one, else as a number."""
    steps = Fraction(length * 255).limit_denominator(8)
    if length and abs(float(steps) / 255 - length) < 1e-9:
        return f"{steps}/255" if steps.denominator == 1 else f"{float(steps):g}/255"
    return f"{length:.4g}"


def count(number: float) -> str:
    """A cost as people write it, with a thin space before its suffix."""
    text = human(number)
    return f"{text[:-1]}\u202f{text[-1]}" if text[-1].isalpha() else text


def plural(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def attack_words(row: Mapping[str, Any], objective: str | None = None) -> str:
    """What an attack does: objective, steps, restarts."""
    if row["attack"] == "worst":
        return "worst case per image over all attacks"
    parts = [f"PGD on {OBJECTIVES.get(objective or '', objective)}" if objective else "PGD"]
    if not pd.isna(row.get("num_steps")):
        step = row.get("step_size")
        length = "" if step is None or pd.isna(step) else f" of {pixels(step)}"
        parts.append(f"{int(row['num_steps'])} steps{length}")
    if not pd.isna(row.get("restarts")):
        parts.append(plural(int(row["restarts"]), "restart"))
    return ", ".join(parts)


def threat_words(norm: str, eps: float) -> str:
    """The threat model in a few signs."""
    return f"{NORMS.get(norm, norm)} ≤ {pixels(eps)}"
