"""The gap between subnets and their twins, image by image: measure_twin's outcomes -> table.parquet, gap.svg."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from proard import artifacts
from proard.artifacts import GAPS, OUTCOMES, read_table, write_table
from proard.config import UserError
from proard.report.svg import to_svg
from proard.report.twins import gap_figure, gap_lines, gaps_of
from proard.stages.common import parse_arguments, run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(__doc__, argv, stage="compare_twins", lists=["outcomes"], writes=["table", "figure"])
    files, settings = job.files, job.config.compare_twins
    if settings is None or not files.outcomes:
        raise UserError("the config has no section compare_twins: there are no twins to compare")
    outcomes = pd.concat([read_table(path, columns=OUTCOMES) for path in files.outcomes], ignore_index=True)
    gaps = gaps_of(outcomes, bootstraps=settings.bootstraps, seed=job.seed)
    write_table(files.table, gaps, GAPS, job.provenance(*files.outcomes))
    figure = gap_figure(gaps)
    artifacts.write_text(
        files.figure, to_svg(figure, "Accuracy of subnets less that of twins trained alone, over MACs")
    )
    print("\n".join(gap_lines(gaps)))
    job.record_costs()


if __name__ == "__main__":
    run(main)
