"""One table of all trained students, means over seeds, and figures: evaluate_student's tables -> summary.parquet."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from proard import artifacts
from proard.artifacts import TRAINED, read_table, write_table
from proard.config import UserError
from proard.report.students import FIGURES, SUMMARY, figures_of, summary_lines, summary_of
from proard.stages.common import parse_arguments, run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="compare_students",
        lists=["tables"],
        writes=["table", "summary", *FIGURES],
    )
    files = job.files
    if not files.tables:
        raise UserError("train_student.students names no student: there is nothing to compare")
    table = pd.concat([read_table(path, columns=TRAINED) for path in files.tables], ignore_index=True)
    summary = summary_of(table)
    provenance = job.provenance(*files.tables)
    write_table(files.table, table, TRAINED, provenance)
    write_table(files.summary, summary, SUMMARY, provenance)
    figures = figures_of(table, summary, eps=job.config.threat.eps, title=job.config.compare_students.title)
    for name, svg in figures.items():
        artifacts.write_text(getattr(files, name), svg)
    print("\n".join(summary_lines(summary, eps=job.config.threat.eps)))
    job.record_costs()


if __name__ == "__main__":
    run(main)
