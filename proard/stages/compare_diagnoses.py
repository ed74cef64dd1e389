"""Bring the diagnoses of a run together: their tables -> one summary, networks in pairs, figures as SVG."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from proard.artifacts import ArtifactError, read_metadata, read_table, write_table, write_text
from proard.config import TEACHER
from proard.evaluation.tables import BOUND, PAIRS, RADII, SUMMARY, pair_rows
from proard.report.diagnosis import bound_figure, radius_figure
from proard.report.page import placeholder
from proard.report.svg import to_svg
from proard.stages.common import parse_arguments, run

GAPS = {"linf": "gap_l1", "l2": "gap_l2"}  # dual to the perturbation's norm


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="compare_diagnoses",
        lists=["bounds", "radii", "summaries"],
        writes=["bound_table", "radii_table", "summary", "pairs", "bound_figure", "radius_figure"],
    )
    files = job.files
    same_images(files.bounds)
    provenance = job.provenance(*files.bounds, *files.radii, *files.summaries)
    bound = pd.concat([read_table(path, columns=BOUND) for path in files.bounds], ignore_index=True)
    radii = pd.concat([read_table(path, columns=RADII) for path in files.radii], ignore_index=True)
    summary = pd.concat([read_table(path, columns=SUMMARY) for path in files.summaries], ignore_index=True)
    students = {str(name): rows for name, rows in bound.groupby("network", sort=False) if name != TEACHER}
    pairs = list(pair_rows(students, gap=GAPS[job.config.threat.norm], seed=job.seed))
    write_table(files.bound_table, bound, BOUND, provenance)
    write_table(files.radii_table, radii, RADII, provenance)
    write_table(files.summary, summary, SUMMARY, provenance)
    write_table(files.pairs, pairs, PAIRS, provenance)
    for path, figure, title in (
        (files.bound_figure, bound_figure(summary), "Terms of the bound on how far student and teacher differ"),
        (files.radius_figure, radius_figure(radii), "Share of images right within a radius"),
    ):
        write_text(path, placeholder(title) if figure is None else to_svg(figure, title))
    print(f"diagnoses: {files.summary} ({bound['network'].nunique()} networks, {len(pairs)} pairs)")
    job.record_costs()


def same_images(paths: Sequence[str]) -> None:
    """Refuse diagnoses that read other images or another teacher: they cannot be paired."""
    first, *others = [read_metadata(path).get("inputs", {}) for path in paths]
    for path, inputs in zip(paths[1:], others, strict=True):
        for name in ("test.safetensors", "teacher.safetensors"):
            if name in first and name in inputs and inputs[name] != first[name]:
                raise ArtifactError(f"{path} read another {name} than {paths[0]}; rerun diagnose for both")


if __name__ == "__main__":
    run(main)
