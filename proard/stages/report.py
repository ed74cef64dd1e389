"""Render the report: all tables of a run -> report.html and its figures as SVG."""

from __future__ import annotations

from collections.abc import Sequence

from proard import artifacts
from proard.report import load_results, render
from proard.report.page import placeholder
from proard.stages.common import parse_arguments, run

TABLES = (
    "teacher_history",
    "control_table",
    "control_history",
    "quality",
    "held_out",
    "archive",
    "front",
    "search_history",
    "verified",
    "trained_students",
    "diagnosis_summary",
    "diagnosis_radii",
    "diagnosis_pairs",
)
FIGURES = {
    "front": "front_figure",
    "training": "training_figure",
    "predictor": "predictor_figure",
    "search": "search_figure",
    "costs": "costs_figure",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Read what there is, write the page and its figures."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="report",
        reads=["manifest", "table"],
        optional=[*TABLES, "benchmarks", "ledgers"],
        lists=["phase_histories", "students", "cards", "quantised"],
        optional_lists=["autoattacked", "checked", "deployed"],
        writes=["html", *FIGURES.values()],
        runs_networks=False,
    )
    folders = {"benchmarks": job.files.benchmarks, "ledgers": job.files.ledgers}
    results = load_results(vars(job.files), run=job.config.run, seed=job.seed, **folders)
    threat, settings = job.config.threat, job.config.report
    report = render(
        results,
        html=job.files.html,
        title=settings.title,
        norm=threat.norm,
        eps=threat.eps,
        country=settings.country,
    )
    for name, flag in FIGURES.items():
        artifacts.write_text(getattr(job.files, flag), report.figures.get(name, placeholder(name)))
    artifacts.write_text(job.files.html, report.html)
    print(f"report: {job.files.html} ({len(results.students)} students)", flush=True)
    job.record_costs()


if __name__ == "__main__":
    run(main)
