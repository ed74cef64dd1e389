"""Compare an experiment's trainings and a run's diagnoses: their outcomes -> table.parquet, statistics, figures."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import pandas as pd

from proard.artifacts import (
    FOOTPRINT,
    GAINS,
    GAPS,
    OUTCOME,
    STUDENT,
    TRAININGS,
    ArtifactError,
    Provenance,
    read_metadata,
    read_table,
    write_table,
    write_text,
)
from proard.config import COMPARED, TEACHER, UserError
from proard.evaluation.comparison import check_equal_effort, gains_of
from proard.evaluation.tables import BOUND, PAIRS, RADII, SUMMARY, pair_rows
from proard.report import gains, students, twins
from proard.report.diagnosis import bound_figure, radius_figure
from proard.report.page import placeholder
from proard.report.svg import to_svg
from proard.stages.common import Job, parse_arguments, run

DUAL_GAPS = {"linf": "gap_l1", "l2": "gap_l2"}  # dual to the perturbation's norm


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage: of what is given, all that was asked for."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="compare_experiment",
        lists=["outcomes", "budgets", "bounds", "all_radii", "diagnoses"],
        writes=["table"],
        optional=[name for files in COMPARED.values() for name in files],
        runs_networks=False,
    )
    files = job.files
    if not files.outcomes + files.budgets + files.diagnoses:
        raise UserError("experiment.trainings and diagnose.networks name nothing: there is nothing to compare")
    provenance = job.provenance(*files.outcomes, *files.budgets, *files.bounds, *files.all_radii, *files.diagnoses)
    parts = [read_table(path, columns=TRAININGS) for path in files.outcomes]
    outcomes = pd.concat([part.astype(object) for part in parts], ignore_index=True).infer_objects() if parts else None
    tables = [] if outcomes is None else [outcomes]
    later = {*OUTCOME, *FOOTPRINT, "arena", "latency_file", "image_set"}  # which older tables lack
    needed = [name for name in STUDENT if name not in later]
    tables += [of_budget(read_table(path, columns=needed)) for path in files.budgets]
    table = pd.concat(tables, ignore_index=True).infer_objects() if tables else pd.DataFrame(columns=list(TRAININGS))
    if outcomes is not None:
        check_equal_effort(outcomes)
    write_table(files.table, table, TRAININGS, provenance)
    if files.summary:
        compare_networks(job, students.networks_of(table), provenance)
    if files.gains and outcomes is not None:
        compare_supernets(job, outcomes[outcomes["trains"] == "supernet"], provenance)
    if files.gaps and outcomes is not None:
        compare_twins(job, outcomes[outcomes["trains"] == "twin"], provenance)
    if files.bound:
        compare_diagnoses(job, files, provenance)
    job.record_costs()


def of_budget(selection: pd.DataFrame) -> pd.DataFrame:
    """The chosen student of a budget on test, in the columns of trainings."""
    rows = selection[(selection["role"] == "choice") & (selection["split"] == "test")]
    names = {"training": rows["budget"], "group": rows["budget"], "trains": "budget", "role": "chosen"}
    return rows.assign(**names, net="supernet", loss="supernet").reindex(columns=list(TRAININGS)).astype(object)


def compare_networks(job: Job, table: pd.DataFrame, provenance: Provenance) -> None:
    """Means over the seeds of networks that were trained alone, and their figures."""
    eps = job.config.threat.eps
    summary = students.summary_of(table)
    write_table(job.files.summary, summary, students.SUMMARY, provenance)
    figures = students.figures_of(table, summary, eps=eps, title=job.config.experiment.title)
    for name, svg in figures.items():
        write_text(getattr(job.files, name), svg)
    print("\n".join(students.summary_lines(summary, eps=eps)))


def compare_supernets(job: Job, outcomes: pd.DataFrame, provenance: Provenance) -> None:
    """Accuracies of supernets and their gains over the baseline, over seeds and images."""
    settings = job.config.experiment
    rows = gains_of(outcomes, baseline=settings.baseline, bootstraps=settings.bootstraps, seed=job.seed)
    write_table(job.files.gains, rows, GAINS, provenance)
    table = read_table(job.files.gains)
    figure = gains.gains_figure(gains.headline(table, eps=job.config.threat.eps))
    write_text(job.files.gains_figure, to_svg(figure, f"{settings.title}: accuracies with 95 % intervals"))
    print("\n".join(gains.gain_lines(gains.headline(table, eps=job.config.threat.eps))))


def compare_twins(job: Job, outcomes: pd.DataFrame, provenance: Provenance) -> None:
    """The gap between subnets and their twins, image by image."""
    shared = outcomes[(outcomes["attack"] != "own") & (outcomes["eps"] == job.config.threat.eps)]
    gaps = twins.gaps_of(shared, bootstraps=job.config.experiment.bootstraps, seed=job.seed)
    write_table(job.files.gaps, gaps, GAPS, provenance)
    figure = twins.gap_figure(gaps)
    title = "Accuracy of subnets less that of twins trained alone, over MACs"
    write_text(job.files.gaps_figure, to_svg(figure, title))
    print("\n".join(twins.gap_lines(gaps)))


def compare_diagnoses(job: Job, files: Namespace, provenance: Provenance) -> None:
    """Diagnoses of networks as one summary, networks in pairs, and figures."""
    same_images(files.bounds)
    bound = pd.concat([read_table(path, columns=BOUND) for path in files.bounds], ignore_index=True)
    radii = pd.concat([read_table(path, columns=RADII) for path in files.all_radii], ignore_index=True)
    summary = pd.concat([read_table(path, columns=SUMMARY) for path in files.diagnoses], ignore_index=True)
    diagnosed = {str(name): rows for name, rows in bound.groupby("network", sort=False) if name != TEACHER}
    pairs = pair_rows(diagnosed, gap=DUAL_GAPS[job.config.threat.norm], seed=job.seed)
    write_table(files.bound, bound, BOUND, provenance)
    write_table(files.radii, radii, RADII, provenance)
    write_table(files.diagnosis, summary, SUMMARY, provenance)
    write_table(files.pairs, pairs, PAIRS, provenance)
    for path, figure, title in (
        (files.bound_figure, bound_figure(summary), "Terms of the bound on how far student and teacher differ"),
        (files.radius_figure, radius_figure(radii), "Share of images right within a radius"),
    ):
        write_text(path, placeholder(title) if figure is None else to_svg(figure, title))
    print(f"diagnoses: {files.diagnosis} ({bound['network'].nunique()} networks, {len(pairs)} pairs)")


def same_images(paths: Sequence[str]) -> None:
    """Refuse diagnoses that read other images or another teacher: they cannot be paired."""
    first, *others = [read_metadata(path).get("inputs", {}) for path in paths]
    for path, inputs in zip(paths[1:], others, strict=True):
        for name in ("test.safetensors", "teacher.safetensors"):
            if name in first and name in inputs and inputs[name] != first[name]:
                raise ArtifactError(f"{path} read another {name} than {paths[0]}; rerun diagnose for both")


if __name__ == "__main__":
    run(main)
