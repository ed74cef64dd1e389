"""Budgets compared with the costs of a space's subnets."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from proard.config import ConfigError
from proard.config.budgets import human_cost, parse_budget

if TYPE_CHECKING:
    from proard.space.search_space import SearchSpace

RISING = ("macs", "params")  # costs of which the largest subnet has the most


def check_budget(text: str, space: SearchSpace) -> str:
    """Check a budget; return a note if it is above the largest subnet of the space, else an empty text.

    Raises
    ------
    ConfigError
        The budget is not valid, names latency while the space has no device, or has a limit below the subnet that costs
        least; the message names the smallest feasible cost.
    """
    budget = parse_budget(text)
    if "latency" in budget.limits and space.device is None:
        raise ConfigError(
            f"budget {budget.text} needs a device: make its table with proard latency plan and proard latency fit, "
            "then write device: latency/DEVICE.json in the config"
        )
    for column, limit in budget.limits.items():
        smallest = space.costs(space.tables.cheapest(column)[None])[column][0]
        if smallest > limit:
            raise ConfigError(
                f"budget {budget.text} is below the smallest subnet of space {space.settings.name}: "
                f"the smallest feasible cost is {exactly(column, smallest)}"
            )
    largest = {column: getattr(space.spec(space.largest), column) for column in budget.limits if column in RISING}
    if all(largest.get(column, math.inf) < limit for column, limit in budget.limits.items()):
        costs = ", ".join(exactly(column, cost) for column, cost in largest.items())
        return f"budget {budget.text} is above the largest subnet, {costs}: every subnet is within it"
    return ""


def exactly(column: str, cost: float) -> str:
    """A cost as a budget that allows it, and in its usual notation if that differs."""
    if column == "latency":
        return f"latency={math.ceil(cost * 1e5) / 1e5:g}ms"
    return f"{column}={cost} ({human(cost)})"


def human(count: float) -> str:
    """A count in its usual notation: 150M, 2.36G."""
    return human_cost("macs", count)
