"""`proard doctor`: the checks on the command line."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.markup import escape

from proard.doctor.checkup import checkup
from proard.doctor.finding import Finding

WORDS = {True: "[bold red]fails[/]", False: "[green]ok[/]   "}


def add_doctor(commands: argparse._SubParsersAction) -> None:
    """Add the command and its flags; flags that Snakemake has too have the same names."""
    parser = commands.add_parser("doctor", help="check machine, cluster and profile before a run, and print fixes")
    parser.add_argument("--profile", default="slurm", metavar="NAME", help="Snakemake's profile (default slurm)")
    parser.add_argument("--here", action="store_true", help="check this machine only, no cluster")
    parser.add_argument(
        "--configfile", nargs="+", default=[], metavar="FILE", help="config of a run, to check its needs"
    )
    parser.add_argument("--directory", default=".", metavar="FOLDER", help="where results/ will lie (default here)")
    parser.add_argument("--no-jobs", action="store_true", help="submit no test jobs")
    parser.add_argument("--patience", type=float, default=180, metavar="SECONDS", help="for each job (default 180)")
    parser.set_defaults(call=doctor)


def doctor(arguments: argparse.Namespace, console: Console) -> None:
    """Print each finding as it comes.

    Raises
    ------
    SystemExit
        With status 1, if a run would fail.
    """
    failed = 0
    findings = checkup(
        profile=None if arguments.here else arguments.profile,
        configs=arguments.configfile,
        directory=arguments.directory,
        jobs=not arguments.no_jobs,
        patience=arguments.patience,
    )
    for finding in findings:
        show_finding(finding, console)
        failed += finding.fails
    if failed:
        console.print(f"{failed} of the checks failed")
        raise SystemExit(1)
    console.print("all checks passed: a run can start")


def show_finding(finding: Finding, console: Console) -> None:
    """Print a finding in one line, and its fix in another."""
    console.print(f"{WORDS[finding.fails]} [bold]{escape(finding.name)}[/]: {escape(finding.result)}", soft_wrap=True)
    if finding.fix:
        console.print(f"      -> {escape(finding.fix)}", soft_wrap=True)
