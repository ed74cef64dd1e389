"""Clean and robust accuracy on a fixed image set, as table rows; subnets after recalibration, with a cache.

Names are imported when they are used: the statistics of tables need no torch, whose import takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proard.evaluation.adversary import Outcome, attack_images, clean_correct, stands_training_attack
    from proard.evaluation.meter import Conditions, SubnetMeter, measure, rows_of, work_of

HOMES = {
    "adversary": ("Outcome", "attack_images", "clean_correct", "stands_training_attack"),
    "meter": ("Conditions", "SubnetMeter", "measure", "rows_of", "work_of"),
}

__all__ = [
    "Conditions",
    "Outcome",
    "SubnetMeter",
    "attack_images",
    "clean_correct",
    "measure",
    "rows_of",
    "stands_training_attack",
    "work_of",
]


def __getattr__(name: str) -> Any:
    home = next((home for home, names in HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
