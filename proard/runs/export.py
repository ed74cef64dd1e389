"""The student at a budget: what is left to run for it, and Snakemake that runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from proard.config import NEEDS, UserError, read_file
from proard.config.budgets import parse_budget
from proard.runs import SNAKEFILE

KEPT = "config.yaml"  # in results/RUN: the settings of the run, written by the workflow when it starts
SEARCHED = ("Snakefile", "snakefile", "workflow/Snakefile", "workflow/snakefile")  # by Snakemake itself


@dataclass(frozen=True)
class Order:
    """A student to be made: where Snakemake runs, its command line without what it runs on, the student's folder."""

    directory: Path
    command: tuple[str, ...]
    student: str


def order(run: str | Path, budget: str) -> Order:
    """The Snakemake command for the student at a budget.

    Parameters
    ----------
    run : str or Path
        A config file, whose results lie in the current folder, or a folder `results/RUN`.
    budget : str
        In any spelling: `macs=300k` and `macs=0.3M` are the student `macs=300K`.

    Raises
    ------
    UserError
        The budget is not valid, there is no such run, or its settings are not known.
    """
    spelling = parse_budget(budget).text
    config, directory = Path(run), Path.cwd()
    if config.is_dir():
        folder = config.resolve()
        if folder.parent.name != "results":
            raise UserError(f"{run} is no folder of a run; expected results/RUN, or a config file")
        config, directory = folder / KEPT, folder.parents[1]
        if not config.exists():
            raise UserError(
                f"{run} has no {KEPT}, which a run writes when it starts; name the run's config file instead"
            )
    name = read_file(config).get("run")
    if not isinstance(name, str):
        raise UserError(f"{config} has no key run that names the run; expected a config file of a run")
    student = f"results/{name}/export_student/{spelling}"
    snakefile = () if any((directory / file).exists() for file in SEARCHED) else ("--snakefile", str(SNAKEFILE))
    target = (f"{student}/student.onnx", f"--configfile={config.resolve()}")
    return Order(directory, (sys.executable, "-m", "snakemake", *target, *snakefile), student)


def plan(made: Order) -> dict[str, int]:
    """Number of jobs of each stage that are left to run, in the order of the pipeline.

    Raises
    ------
    UserError
        Snakemake does not accept the run or the budget; its message.
    """
    command = [*made.command, "--dry-run"]
    done = subprocess.run(command, cwd=made.directory, capture_output=True, text=True, check=False)
    if done.returncode:
        said = re.findall(r"^error: (.*)$", done.stderr, re.MULTILINE)
        raise UserError(said[0] if said else f"Snakemake made no plan:\n{(done.stdout + done.stderr).strip()}")
    sys.stderr.write("".join(re.findall(r"^note: .*\n", done.stderr, re.MULTILINE)))
    stages = list(NEEDS)
    jobs = {name: int(number) for name, number in re.findall(r"^(\w+) +([0-9]+)$", done.stdout, re.MULTILINE)}
    jobs.pop("total", None)
    return dict(sorted(jobs.items(), key=lambda job: stages.index(job[0]) if job[0] in stages else len(stages)))


def start(made: Order, *, profile: str | None = None) -> None:
    """Become Snakemake, which then gets Ctrl-C itself and ends in order; it runs on all cores or by a profile."""
    where = ["--profile", profile] if profile else ["--cores", "all"]
    sys.stdout.flush()
    os.chdir(made.directory)
    os.execv(made.command[0], [*made.command, *where, "--quiet", "host", "rules", "reason"])
