"""Numbers and names as text for people. Only this module converts fractions to percent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pandas as pd

from proard.config import OBJECTIVE_WORDS
from proard.space.cost import human

SEARCH_NAMES = {"nsga2": "NSGA-II", "random": "random search", "uniform": "uniform scaling"}
NORMS = {"linf": "ℓ∞", "l2": "ℓ₂"}


def percent(share: Any, digits: int = 1) -> str:
    """A fraction in percent, without the sign; a dash where there is none."""
    return "–" if share is None or pd.isna(share) else f"{100 * float(share):.{digits}f}"


def decimal(value: float) -> str:
    """A correlation in two decimals; a dash where it is not defined."""
    return "–" if pd.isna(value) else f"{value:.2f}"


def interval(row: Mapping[str, Any], column: str) -> str:
    """A column's 95 % interval in percent, as a range; empty where the table has none."""
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    return "" if low is None or high is None or pd.isna(low) or pd.isna(high) else f"{percent(low)}–{percent(high)}"


def pixels(length: float) -> str:
    """A length in pixel units of [0, 1] as n/255, if it is a whole or simple multiple of 1/255."""
    steps = Fraction(length * 255).limit_denominator(8)
    exact = length > 0 and abs(float(steps) / 255 - length) < 1e-9
    return f"{float(steps):g}/255" if exact and (steps.denominator == 1 or steps < 4) else f"{length:.4g}"


def count(number: float) -> str:
    """A cost in three digits, with a thin space before its suffix."""
    text = human(float(f"{number:.3g}"))
    return f"{text[:-1]}\u202f{text[-1]}" if text[-1].isalpha() else text


def amount(number: float) -> str:
    """A large sum in three digits with a thin space before its suffix, K to E."""
    exponent = 0 if number < 1000 else min(int(math.log10(float(f"{number:.3g}"))) // 3, 6)
    digits = f"{number / 1000**exponent:#.3g}".rstrip(".") if exponent else f"{number:.3g}"
    return f"{digits}\u202f{' KMGTPE'[exponent]}" if exponent else digits


def whole(number: float) -> str:
    """A whole number with commas between thousands."""
    return f"{int(number):,}"


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"{value:+.4f}".replace("-", "−")


def plural(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def attack_words(row: Mapping[str, Any], objective: str | None = None) -> str:
    """An attack in words: objective, steps, restarts."""
    if row["attack"] == "worst":
        return "worst case per image over all attacks"
    parts = [f"PGD on {OBJECTIVE_WORDS.get(objective or '', objective)}" if objective else "PGD"]
    if not pd.isna(row.get("num_steps")):
        step, last = row.get("step_size"), row.get("last_step_size")
        length = "" if step is None or pd.isna(step) else f" of {pixels(step)}"
        length += "" if last is None or pd.isna(last) or last == step else f" to {pixels(last)}"
        parts.append(f"{int(row['num_steps'])} steps{length}")
    if not pd.isna(row.get("targets")):
        parts.append(f"{plural(int(row['targets']), 'target')} in turn, on the images that earlier attacks left")
    if not pd.isna(row.get("restarts")):
        parts.append(plural(int(row["restarts"]), "restart"))
    return ", ".join(parts)


def threat_words(norm: str, eps: float) -> str:
    """The threat model as norm <= eps."""
    return f"{NORMS.get(norm, norm)}\u00a0≤\u00a0{pixels(eps)}"
