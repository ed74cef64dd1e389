"""Budgets: a cost column and a limit, as in `macs=150M`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from proard.config import ConfigError

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Budget:
    """A limit on one cost column; `text` is how it was asked for."""

    column: str
    limit: float
    text: str


def parse_budget(text: str) -> Budget:
    """Read `macs=150M` or `params=2M`.

    Raises
    ------
    ConfigError
        Anything else; the message shows the form.
    """
    match = re.fullmatch(r"(macs|params)=(\d+(?:\.\d+)?)([KMG]?)", text)
    if match is None or float(match[2]) == 0:
        raise ConfigError(
            f"budget {text!r} is not understood: write a cost column, a number and K, M or G, "
            "as in macs=150M or params=2M"
        )
    return Budget(match[1], float(match[2]) * SUFFIXES[match[3]], text)


def human(count: float) -> str:
    """A cost as people write it: 150M, 2.36G."""
    for suffix in ("G", "M", "K"):
        if count >= SUFFIXES[suffix]:
            return f"{count / SUFFIXES[suffix]:.4g}{suffix}"
    return f"{count:.4g}"
