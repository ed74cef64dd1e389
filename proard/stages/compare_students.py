"""One table of all trained students, means over seeds, and figures: evaluate_student's tables -> summary.parquet."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from proard import artifacts
from proard.artifacts import STUDENT, TRAINED, read_table, write_table
from proard.config import UserError
from proard.report.students import FIGURES, SUMMARY, figures_of, summary_lines, summary_of
from proard.stages.common import parse_arguments, run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="compare_students",
        lists=["tables", "supernet"],
        writes=["table", "summary", *FIGURES],
    )
    files = job.files
    if not files.tables + files.supernet:
        raise UserError("train_student.students names no student: there is nothing to compare")
    parts = [read_table(path, columns=TRAINED) for path in files.tables]
    parts += [of_supernet(read_table(path, columns=STUDENT)) for path in files.supernet]
    table = pd.concat([part.astype(object) for part in parts], ignore_index=True).infer_objects()
    summary = summary_of(table)
    provenance = job.provenance(*files.tables, *files.supernet)
    write_table(files.table, table, TRAINED, provenance)
    write_table(files.summary, summary, SUMMARY, provenance)
    figures = figures_of(table, summary, eps=job.config.threat.eps, title=job.config.compare_students.title)
    for name, svg in figures.items():
        artifacts.write_text(getattr(files, name), svg)
    print("\n".join(summary_lines(summary, eps=job.config.threat.eps)))
    job.record_costs()


def of_supernet(selection: pd.DataFrame) -> pd.DataFrame:
    """The chosen student of a budget on test, in the columns of students that were trained by themselves."""
    rows = selection[(selection["role"] == "choice") & (selection["split"] == "test")]
    names = {"student": rows["budget"], "group": rows["budget"], "net": "supernet", "loss": "supernet"}
    return rows.assign(**names).reindex(columns=list(TRAINED))


if __name__ == "__main__":
    run(main)
