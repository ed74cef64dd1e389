"""Budgets compared with the costs of a space's subnets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proard.config import ConfigError
from proard.config.budgets import SUFFIXES, parse_budget

if TYPE_CHECKING:
    from proard.space.search_space import SearchSpace


def check_budget(text: str, space: SearchSpace) -> str:
    """Check a budget; return a note if it is above the largest subnet of the space, else an empty text.

    Raises
    ------
    ConfigError
        The budget is not valid, or below the smallest subnet; the message names the smallest feasible cost.
    """
    budget = parse_budget(text)
    smallest, largest = (getattr(space.spec(arch), budget.column) for arch in (space.smallest, space.largest))
    if smallest > budget.limit:
        raise ConfigError(
            f"budget {budget.text} is below the smallest subnet of space {space.settings.name}: "
            f"the smallest feasible cost is {budget.column}={smallest} ({human(smallest)})"
        )
    if largest < budget.limit:
        cost = f"{budget.column}={largest} ({human(largest)})"
        return f"budget {budget.text} is above the largest subnet, {cost}: every subnet is within it"
    return ""


def human(count: float) -> str:
    """A cost in its usual notation: 150M, 2.36G."""
    for suffix in ("G", "M", "K"):
        if count >= SUFFIXES[suffix]:
            return f"{count / SUFFIXES[suffix]:.4g}{suffix}"
    return f"{count:.4g}"
