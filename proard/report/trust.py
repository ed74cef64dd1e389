"""The page's sections on what examined the exported students: AutoAttack, and checks for masked gradients."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from proard.artifacts import AUTOATTACK_UNION
from proard.report.context import Context, Section, section

NOTABLE = 0.005  # difference of two robust accuracies that is said in words


def autoattack(context: Context) -> Section | None:
    """A row per student: robust accuracy after each attack of AutoAttack, beside the own attacks' worst case."""
    tables = sorted(context.results.autoattacked, key=lambda table: int(table["macs"].iloc[0]))
    if not tables:
        return None
    students = [{str(row["attack"]): row for _, row in table.iterrows()} for table in tables]
    whole = [rows[AUTOATTACK_UNION] for rows in students]
    gaps = [_gap(row) for row in whole]
    notable = [
        (str(row["budget"]), 100 * gap)
        for row, gap in zip(whole, gaps, strict=True)
        if gap is not None and abs(gap) > NOTABLE
    ]
    values: dict[str, Any] = {
        "students": list(zip(students, gaps, strict=True)),
        "attacks": [name for name in students[0] if name != AUTOATTACK_UNION],
        "last": whole[0],
        "left_out": sum(int(row["left_out"]) for row in whole),
        "warnings": sorted({str(row["warnings"]) for row in whole if row["warnings"]}),
        "notable": notable,
        "whole": AUTOATTACK_UNION,
    }
    return section("autoattack", "AutoAttack", "AutoAttack on the exported students", **values)


def _gap(row: pd.Series) -> float | None:
    """Robust accuracy under own attacks minus that under AutoAttack, on the same images."""
    return None if pd.isna(row["own_robust_acc"]) else float(row["own_robust_acc"] - row["robust_acc"])


def checks(context: Context) -> Section | None:
    """A row per check, a column per student."""
    tables = {str(table["budget"].iloc[0]): table.set_index("number") for table in context.results.checked}
    if not tables:
        return None
    order = {student.budget: student.macs for student in context.students}
    tables = dict(sorted(tables.items(), key=lambda entry: order.get(entry[0], 0)))
    first = next(iter(tables.values()))
    failed = [
        (budget, row, json.loads(row["details"]))
        for budget, table in tables.items()
        for _, row in table.iterrows()
        if row["passed"] is not None and not pd.isna(row["passed"]) and not row["passed"]
    ]
    values = {"tables": tables, "first": first.reset_index().to_dict("records"), "failed": failed}
    return section("checks", "Checks", "Checks for masked gradients", **values)
