"""Choose a budget's student: the best few by prediction are measured on val, the choice is then measured on test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from proard.artifacts import STUDENT, read_table, write_table
from proard.config import UserError
from proard.progress import Progress
from proard.space import Arch, Budget, SearchSpace, parse_budget
from proard.space.cost import check_budget, human
from proard.stages.common import parse_arguments, run
from proard.stages.measuring import load_images, outcomes_of, subnet_meter


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="select_student",
        reads=["archive", "supernet", "train", "val", "test", "budget"],
        writes=["student"],
        optional=["cache"],
    )
    files, settings = job.files, job.config.select_student
    budget = parse_budget(files.budget)
    archive = read_table(files.archive, columns=["arch", "macs", "params", "predicted_robust_acc"])
    candidates = under_budget(archive, budget, settings.candidates)
    note = check_budget(files.budget, SearchSpace(job.config.space))
    if note:
        print(f"note: {note}")
    meter = subnet_meter(job, cache=files.cache)
    val = load_images(job, "val", settings.num_images)

    rows: list[dict[str, Any]] = []
    progress = Progress(f"select {budget.text}", len(candidates), "candidates")
    for _, candidate in candidates.iterrows():
        (row,) = meter.rows(Arch.from_json(candidate["arch"]), val, [settings.attack])
        rows.append({**row, **_facts(candidate, budget), "role": "candidate", "chosen": False})
        progress.advance(note=f"{human(row['macs'])} MACs clean {row['clean_acc']:.1%} robust {row['robust_acc']:.1%}")
    progress.close()

    best = max(range(len(rows)), key=lambda i: (rows[i]["robust_acc"], rows[i]["clean_acc"], -rows[i]["macs"]))
    rows[best]["chosen"] = True
    choice = candidates.iloc[best]
    for images in (val, load_images(job, "test")):
        arch, attacks = Arch.from_json(choice["arch"]), job.config.verify_front.attacks
        entries = meter.measure(arch, images, attacks)
        measured = meter.rows(arch, images, attacks, worst=True, measured=entries)
        chosen = {**_facts(choice, budget), "role": "choice", "chosen": True}
        rows += [{**row, **chosen, **outcomes_of(entries, row["attack"])} for row in measured]
    inputs = [files.archive, files.supernet, files.train, files.val, files.test]
    write_table(files.student, rows, STUDENT, job.provenance(*inputs))
    worst = rows[-1]
    print(
        f"{budget.text}: {human(worst['macs'])} MACs, {human(worst['params'])} parameters; on test clean "
        f"{worst['clean_acc']:.1%}, robust {worst['robust_acc']:.1%} (worst case of all attacks)"
    )
    job.record_costs()


def under_budget(archive: pd.DataFrame, budget: Budget, number: int) -> pd.DataFrame:
    """The `number` archs with the best predicted robust accuracy among those that the budget allows.

    Raises
    ------
    UserError
        No arch is that small; the smallest feasible cost is named.
    """
    distinct = archive.drop_duplicates("arch")
    feasible = distinct[distinct[budget.column] <= budget.limit]
    if feasible.empty:
        smallest = int(distinct[budget.column].min())
        raise UserError(
            f"budget {budget.text} is below the smallest subnet: the smallest feasible cost is "
            f"{budget.column}={smallest}"
        )
    return feasible.sort_values(["predicted_robust_acc", "predicted_clean_acc"], ascending=False).head(number)


def _facts(candidate: pd.Series, budget: Budget) -> dict[str, object]:
    """Columns of a row beside its measurement."""
    names = ("predicted_clean_acc", "predicted_robust_acc", "found_by")
    return {**{name: candidate[name] for name in names}, "budget": budget.text}


if __name__ == "__main__":
    run(main)
