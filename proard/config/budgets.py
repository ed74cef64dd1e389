"""Budgets: limits on cost columns, as in `macs=150M` or `latency=5ms,sram=256K`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema

from proard.config.fields import ConfigError, as_tuple, without_list

Cost = Literal["macs", "params", "latency", "sram", "flash"]

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
SECONDS = {"us": Decimal("0.001"), "ms": Decimal(1), "s": Decimal(1000)}  # in milliseconds, the unit of the column
COUNTED = ("macs", "params", "sram", "flash")
ORDER = ("latency", "sram", "flash", "macs", "params")  # of the limits in the name of a folder
NUMBER = r"[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?"
ONE = rf"(?:(?:{'|'.join(COUNTED)})={NUMBER}[KMGkmg]?|latency={NUMBER}(?:us|ms|s))"
FORM = f"{ONE}(?:,{ONE})*"
EXPECTED = (
    "write a cost column, a number and K, M or G, as in macs=150M or params=2M; latency in us, ms or s; "
    "several joined by commas: latency=5ms,sram=256K"
)


@dataclass(frozen=True)
class Budget:
    """Upper limits on cost columns, at least one.

    Attributes
    ----------
    limits : mapping of str to float
        By column; latency in milliseconds, `sram` and `flash` in bytes.
    text : str
        The canonical form, which names the student's folder.
    """

    limits: Mapping[str, float]
    text: str

    @property
    def parts(self) -> dict[str, str]:
        """By column, the canonical text of that limit alone."""
        return dict(zip(self.limits, self.text.split(","), strict=True))


def parse_budget(text: Any) -> Budget:
    """Read `macs=150M` or `latency=5ms,sram=256K`.

    Other spellings of a number become one: `macs=300k`, `macs=0.3M` and `macs=3e5` are `macs=300K`, `latency=5000us` is
    `latency=5ms`. Several limits are ordered as in `ORDER`. K, M and G are powers of 1,000 for bytes too.

    Raises
    ------
    ConfigError
        The text has another form, or limits a column twice; the message shows the expected form.
    """
    found: dict[str, tuple[float, str]] = {}
    for part in text.split(",") if isinstance(text, str) else [""]:
        column, _, value = part.partition("=")
        units = SECONDS if column == "latency" else SUFFIXES
        number = re.match(NUMBER, value) if re.fullmatch(ONE, part) else None
        limit = Decimal(number[0]) * units[_unit(value[number.end() :], units)] if number else Decimal(0)
        if not 0 < limit < 10**18:
            raise ConfigError(f"budget {text!r} is not valid: {EXPECTED}")
        if column in found:
            raise ConfigError(f"budget {text!r} limits {column} twice: {EXPECTED}")
        found[column] = (float(limit), f"{column}={_spelling(limit, units)}")
    ordered = [column for column in ORDER if column in found]
    return Budget({column: found[column][0] for column in ordered}, ",".join(found[column][1] for column in ordered))


def human_cost(column: str, value: float) -> str:
    """A cost in its usual notation: 150M, 2.36G, 4.2ms."""
    if column == "latency":
        unit, factor = next(((u, f) for u, f in reversed(SECONDS.items()) if value >= f), ("us", SECONDS["us"]))
        return f"{value / float(factor):.4g}{unit}"
    suffix = next((s for s in ("G", "M", "K") if value >= SUFFIXES[s]), "")
    return f"{value / SUFFIXES[suffix]:.4g}{suffix}"


def _unit(text: str, units: Mapping[str, Any]) -> str:
    """The unit as it is listed: `k` is `K`."""
    return text if text in units else text.upper()


def _spelling(limit: Decimal, units: Mapping[str, int | Decimal]) -> str:
    """The shortest exact text of a limit; of equally short ones, the one with the largest unit: 300K, 2.5M, 5ms."""
    smallest = min(units.values())
    factors = {unit: factor for unit, factor in units.items() if factor == smallest or limit >= factor}
    texts = [f"{(limit / factor).normalize():f}{unit}" for unit, factor in factors.items()]
    return min(reversed(texts), key=len)


def _one_or_more(value: Any) -> Any:
    """A list of budgets in canonical form, without repetitions; a single budget needs no list."""
    if not isinstance(value, (list, tuple)):
        value = [value]
    return tuple(dict.fromkeys(parse_budget(entry).text for entry in value))


def _one_or_two(costs: tuple[Cost, ...]) -> tuple[Cost, ...]:
    """Refuse costs that are none, more than two, or the same."""
    if not 1 <= len(costs) <= 2 or len(set(costs)) < len(costs):
        names = ", ".join(costs) or "none"
        raise ValueError(f"one cost or two different ones are minimised, as in [macs, sram]; given: {names}")
    return costs


def searched_costs(sections: Mapping[str, Any]) -> tuple[str, ...]:
    """Cost columns that a run's search minimised, from the sections in the provenance of its tables."""
    return as_tuple(sections.get("search_front", {}).get("cost", "macs"))


COST_SCHEMA: dict[str, Any] = {"enum": list(get_args(Cost))}
COSTS_SCHEMA = {"type": "array", "items": COST_SCHEMA, "minItems": 1, "maxItems": 2, "uniqueItems": True}
Costs = Annotated[
    tuple[Cost, ...],
    BeforeValidator(as_tuple),
    AfterValidator(_one_or_two),
    PlainSerializer(without_list),
    WithJsonSchema({"anyOf": [COST_SCHEMA, COSTS_SCHEMA]}),
]
BudgetText = Annotated[str, Field(pattern=f"^{FORM}$")]
OneBudget = Annotated[BudgetText, BeforeValidator(lambda value: parse_budget(value).text)]
Budgets = Annotated[tuple[BudgetText, ...], BeforeValidator(_one_or_more)]
