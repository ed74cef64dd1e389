"""Budgets: a cost column and a limit, as in `macs=150M`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from proard.config.fields import ConfigError

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
FORM = r"(macs|params)=([0-9]+(?:\.[0-9]+)?)([eE][+-]?[0-9]{1,2})?([KMGkmg]?)"


@dataclass(frozen=True)
class Budget:
    """A limit on one cost column; `text` is its canonical form, which names the student's folder."""

    column: str
    limit: float
    text: str


def parse_budget(text: Any) -> Budget:
    """Read `macs=150M` or `params=2M`; `macs=300k`, `macs=0.3M` and `macs=3e5` all become `macs=300K`.

    Raises
    ------
    ConfigError
        The text has another form; the message shows the expected one.
    """
    match = re.fullmatch(FORM, text) if isinstance(text, str) else None
    limit = Decimal(match[2] + (match[3] or "")) * SUFFIXES[match[4].upper()] if match else Decimal(0)
    if match is None or not 0 < limit < 10**18:
        raise ConfigError(
            f"budget {text!r} is not valid: write a cost column, a number and K, M or G, as in macs=150M or params=2M"
        )
    return Budget(match[1], float(limit), f"{match[1]}={_spelling(limit)}")


def _spelling(limit: Decimal) -> str:
    """The shortest exact text of a limit; of equally short ones, the one with the largest suffix: 300K, 2.5M."""
    factors = {suffix: factor for suffix, factor in SUFFIXES.items() if factor == 1 or limit >= factor}
    texts = [f"{(limit / factor).normalize():f}{suffix}" for suffix, factor in factors.items()]
    return min(reversed(texts), key=len)


def _one_or_more(value: Any) -> Any:
    """A list of budgets in canonical form, without repetitions; a single budget needs no list."""
    if not isinstance(value, (list, tuple)):
        value = [value]
    return tuple(dict.fromkeys(parse_budget(entry).text for entry in value))


BudgetText = Annotated[str, Field(pattern=f"^{FORM}$")]
OneBudget = Annotated[BudgetText, BeforeValidator(lambda value: parse_budget(value).text)]
Budgets = Annotated[tuple[BudgetText, ...], BeforeValidator(_one_or_more)]
