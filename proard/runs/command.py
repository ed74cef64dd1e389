"""`proard init` and `proard export`: a run's folder, and a student of a run, on the command line."""

from __future__ import annotations

import argparse
from shlex import quote

from rich.console import Console
from rich.markup import escape

from proard.runs import CONFIGS
from proard.runs.create import create
from proard.runs.export import order, plan, start


def add_runs(commands: argparse._SubParsersAction) -> None:
    """The flags of both."""
    new = commands.add_parser("init", help="make a new or an empty folder the folder of a run")
    new.add_argument("folder", metavar="NAME", help="the folder; its name is the run's")
    new.add_argument(
        "--config",
        choices=CONFIGS,
        default="quickstart",
        metavar="CONFIG",
        help=f"the settings to start from: {', '.join(CONFIGS)} (default quickstart: digits)",
    )
    new.set_defaults(call=init)
    student = commands.add_parser("export", help="the student of a run at a budget; runs what is missing for it")
    student.add_argument("run", metavar="RUN", help="a config file, or a folder results/RUN")
    student.add_argument("budget", metavar="BUDGET", help="a limit on a cost, such as macs=300K")
    student.add_argument("--dry-run", action="store_true", help="only say what would run")
    student.add_argument(
        "--profile", metavar="NAME", help="Snakemake's profile, such as slurm (default: all cores here)"
    )
    student.set_defaults(call=export)


def init(arguments: argparse.Namespace, console: Console) -> None:
    """Make the folder of a run, and say how to start it."""
    create(arguments.folder, config=arguments.config)
    console.print(f"{escape(arguments.folder)} has config.yaml, Snakefile and README.md; run it:", soft_wrap=True)
    console.print(f"cd {escape(quote(arguments.folder))} && snakemake --cores all", soft_wrap=True)


def export(arguments: argparse.Namespace, console: Console) -> None:
    """Say what is left to run for a student, then run it."""
    made = order(arguments.run, arguments.budget)
    jobs = plan(made)
    console.print(f"{escape(made.student)}: {sum(jobs.values())} jobs to run", soft_wrap=True)
    for name, number in jobs.items():
        console.print(f"{number:>5} {escape(name)}")
    if jobs and not arguments.dry_run:
        start(made, profile=arguments.profile)
