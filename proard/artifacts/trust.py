"""Columns of the tables that examine an exported student: AutoAttack, and checks for masked gradients."""

from __future__ import annotations

import pyarrow as pa

from proard.artifacts.tables import FLAG, FLOAT, INT, MEASURED, TEXT

AUTOATTACK_UNION = "autoattack"  # in column `attack` of AUTOATTACK: the row of all attacks together
AUTOATTACK: dict[str, tuple[pa.DataType, str]] = {
    **MEASURED,
    "budget": (TEXT, "the requested limit, or the training's name"),
    "attacked": (INT, "images that this attack was run on"),
    "left_out": (INT, "images not attacked, as they are misclassified under the attacks of own_robust_acc"),
    "own_robust_acc": (FLOAT, "fraction of the same images, worst case of the attacks of selection or measurement"),
    "version": (TEXT, "version of AutoAttack, and of the package that runs it"),
    "warnings": (TEXT, "messages of AutoAttack's own checks; empty if there was none"),
}
CHECKS: dict[str, tuple[pa.DataType, str]] = {
    "budget": (TEXT, "the requested limit, or the training's name"),
    "arch_id": (TEXT, "stable hash of the canonical arch"),
    "number": (INT, "place in the list of checks"),
    "check": (TEXT, "name of the check"),
    "expected": (TEXT, "what holds if gradients are not masked"),
    "value": (FLOAT, "measured value; empty if the check does not apply"),
    "relation": (TEXT, "relation of value and threshold for a pass"),
    "threshold": (FLOAT, "in the unit of the value"),
    "unit": (TEXT, "unit of value and threshold"),
    "passed": (FLAG, "whether the relation holds; empty if the check does not apply"),
    "details": (TEXT, "further figures, as JSON"),
    "norm": (TEXT, "norm of the perturbation"),
    "eps": (FLOAT, "pixel units of [0, 1]"),
    "num_images": (INT, "images, the first ones of test"),
    "seconds": (FLOAT, "wall seconds"),
    "seed": (INT, "seed of the noise"),
}
