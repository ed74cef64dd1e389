"""The page's sections on what examined the exported students: AutoAttack, and checks for masked gradients."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from proard.report.context import Context, Section, section

ALL = "autoattack"  # the row of all attacks together
NOTABLE = 0.005  # difference of two robust accuracies that is said in words


def autoattack(context: Context) -> Section | None:
    """A row per student: robust accuracy after each attack of AutoAttack, beside the own attacks' worst case."""
    tables = sorted(context.results.autoattacked, key=lambda table: int(table["macs"].iloc[0]))
    if not tables:
        return None
    students = [{str(row["attack"]): row for _, row in table.iterrows()} for table in tables]
    gaps = [_gap(rows[ALL]) for rows in students]
    notable = [
        (str(rows[ALL]["budget"]), 100 * gap)
        for rows, gap in zip(students, gaps, strict=True)
        if gap is not None and abs(gap) > NOTABLE
    ]
    values: dict[str, Any] = {
        "students": list(zip(students, gaps, strict=True)),
        "attacks": [name for name in students[0] if name != ALL],
        "last": students[0][ALL],
        "left_out": sum(int(rows[ALL]["left_out"]) for rows in students),
        "warnings": sorted({str(rows[ALL]["warnings"]) for rows in students if rows[ALL]["warnings"]}),
        "notable": notable,
        "whole": ALL,
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
