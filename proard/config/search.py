"""Settings of the search: what it minimises beside the accuracies, and how far it goes."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator

from proard.config.budgets import Costs
from proard.config.fields import NUMBER_SCHEMA, Count, Int, Natural, Positive, Settings, as_tuple, without_list

LIMITS_SCHEMA = {"type": "array", "items": {"anyOf": [*NUMBER_SCHEMA["anyOf"], {"type": "null"}]}}
Limits = Annotated[
    tuple[Positive | None, ...],
    BeforeValidator(as_tuple),
    PlainSerializer(without_list),
    WithJsonSchema({"anyOf": [*NUMBER_SCHEMA["anyOf"], LIMITS_SCHEMA]}),
]


class SearchFront(Settings):
    """NSGA-II and random search with equal numbers of evaluations; `max_cost` limits `cost` (a table column).

    Beside them stands uniform scaling: the archs whose choices all have the same relative position, which need no
    search.

    `cost` is one column or a list of two: `[macs, sram]` minimises both beside the accuracies, and `max_cost` then has
    a limit for each, null for none. `cost: latency` is that of the run's `device`. `max_cost` limits macs, params or
    flash, which never fall as a subnet grows.

    If at most `enumerate_up_to` archs are within the limits, all of them are predicted (a million takes seconds, or
    half a minute with the slowest model). Their exact front is then added to the archive, and the hypervolume of both
    searches is reported relative to it.
    """

    cost: Costs = ("macs",)
    population: Annotated[Int, Field(ge=4)] = 100
    generations: Count = 50
    max_cost: Limits | None = None
    enumerate_up_to: Natural = 1_000_000

    @property
    def limits(self) -> tuple[float, ...] | None:
        """The limit of each cost, infinity for none; None if no cost is limited."""
        if self.max_cost is None or set(self.max_cost) == {None}:
            return None
        return tuple(math.inf if limit is None else limit for limit in self.max_cost)

    @model_validator(mode="after")
    def limited_cost_rises(self) -> SearchFront:
        """Refuse a limit on a cost that may fall where a choice rises: the search would leave out archs within it."""
        if self.max_cost is not None and len(self.max_cost) != len(self.cost):
            raise ValueError(
                f"max_cost has {len(self.max_cost)} of {len(self.cost)} limits: write one for each cost "
                f"({', '.join(self.cost)}), null for none, as in [3e6, null]"
            )
        for cost, limit in zip(self.cost, self.max_cost or (), strict=False):
            if limit is not None and cost in ("latency", "sram"):
                raise ValueError(
                    f"max_cost limits macs, params or flash; cost is {cost}: leave max_cost out and give "
                    f"a budget, such as {'latency=5ms' if cost == 'latency' else 'sram=256K'}"
                )
        return self
