"""Parts of the model card on AutoAttack and on the checks for masked gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from proard.artifacts import AUTOATTACK_UNION

NOTABLE = 0.005  # difference of two robust accuracies that is said in words


def percent_interval(row: pd.Series, name: str) -> str:
    """An accuracy in percent with its 95 % interval."""
    return f"{row[name]:.2%} [{row[name + '_low']:.2%}, {row[name + '_high']:.2%}]"


@dataclass(frozen=True)
class Trust:
    """What examined the exported student: rows of AUTOATTACK and of CHECKS, each may be missing."""

    autoattack: pd.DataFrame | None = None
    checks: pd.DataFrame | None = None

    @property
    def final(self) -> pd.Series | None:
        """The row of AutoAttack that counts: after all four attacks."""
        if self.autoattack is None:
            return None
        return self.autoattack[self.autoattack["attack"] == AUTOATTACK_UNION].iloc[0]

    def headline(self, own: Sequence[str]) -> str:
        """Robust accuracies as rows of the card's first table: AutoAttack's, then the worst case of own attacks.

        `own` is (name, accuracy with interval) of the worst case.
        """
        name, accuracy = own
        row = self.final
        if row is None:
            return f"| Robust accuracy, test, {name} | {accuracy} |"
        lines = [
            f"| Robust accuracy, AutoAttack (standard), {row['num_images']:,} test images | "
            f"{percent_interval(row, 'robust_acc')} |",
            f"| Robust accuracy, the run's own attacks, test, {name} | {accuracy} |",
        ]
        return "\n".join(lines)

    def sections(self) -> str:
        """Sections of the card, each behind an empty line; without tables nothing."""
        parts = []
        if self.autoattack is not None:
            parts.append(_autoattack(self.autoattack, difference_words(self.final)))
        if self.checks is not None:
            parts.append(_checks(self.checks))
        return "".join(f"\n{part}" for part in parts)


def difference_words(row: pd.Series | None) -> str:
    """A sentence on how far AutoAttack and the own attacks differ on the same images; empty up to 0.5 points."""
    if row is None or pd.isna(row["own_robust_acc"]):
        return ""
    difference = float(row["own_robust_acc"] - row["robust_acc"])
    if abs(difference) <= NOTABLE:
        return ""
    more, points = "fewer" if difference > 0 else "more", f"{100 * abs(difference):.1f} points"
    return (
        f"AutoAttack leaves {points} {more} images correct than the run's own attacks do "
        f"({row['robust_acc']:.2%} against {row['own_robust_acc']:.2%} of the same images): compare this student with "
        "others by AutoAttack's accuracy."
    )


def _autoattack(table: pd.DataFrame, difference: str) -> str:
    """The section on AutoAttack."""
    last = table[table["attack"] == AUTOATTACK_UNION].iloc[0]
    lines = [
        "### AutoAttack",
        "",
        f"Version {last['version']}; seed {last['seed']}. An image counts as robust after an",
    ]
    lines.append("attack if it is classified correctly under this attack and all attacks before it.")
    if last["left_out"]:
        lines.append(
            f"{last['left_out']} images that are misclassified under the run's own attacks were not attacked again; "
            "they count as lost."
        )
    lines += [difference] if difference else []
    lines += ["", "| attack | images attacked | robust accuracy after it |", "|---|---|---|"]
    for _, row in table[table["attack"] != AUTOATTACK_UNION].iterrows():
        lines.append(f"| {row['attack']} | {row['attacked']:,} | {percent_interval(row, 'robust_acc')} |")
    if last["warnings"]:
        lines += ["", f"AutoAttack warns: {last['warnings']}"]
    return "\n".join([*lines, ""])


def _checks(table: pd.DataFrame) -> str:
    """The section on the checks."""
    applied = table[table["passed"].notna()]
    passed = int(applied["passed"].astype(bool).sum())
    lines = ["### Checks for masked gradients", ""]
    lines.append(f"{passed} of {len(applied)} checks passed, on the first {table['num_images'].iloc[0]:,} test images.")
    lines += ["", "| | check: what is expected | value | threshold | passed |", "|---|---|---|---|---|"]
    for _, row in table.iterrows():
        value = "–" if pd.isna(row["value"]) else f"{row['value']:.3g}"
        mark = "does not apply" if pd.isna(row["passed"]) else "yes" if row["passed"] else "**no**"
        limit = f"{row['relation']} {row['threshold']:.3g} ({row['unit']})"
        lines.append(f"| {row['number']} | {row['check']}: {row['expected']} | {value} | {limit} | {mark} |")
    return "\n".join([*lines, ""])
