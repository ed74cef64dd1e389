"""A new folder of a run: its config, and a Snakefile that uses the package's workflow as a module."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from proard.config import UserError, load, read_file
from proard.runs import CONFIGS, HERE

README = """\
# {name}

A run of proard. `config.yaml` has its settings (all keys and defaults: `python -m proard.config.schema`).
Run it: `cd {name} && snakemake --cores all`; with `--dry-run` it lists the jobs.
Results: `results/{name}/report/report.html`, and a folder for each student in `results/{name}/export_student`.
A student for another budget: `proard export results/{name} macs=300K`.
"""


def create(folder: str | Path, *, config: str = "quickstart") -> None:
    """Write config, Snakefile and README of a run into a new or an empty folder, whose name becomes the run's.

    Parameters
    ----------
    folder : str or Path
        The run's folder; its parents are made too.
    config : str
        Which of `CONFIGS` to start from.

    Raises
    ------
    UserError
        The folder is not empty or cannot be written, or its name is not a valid name of a run. Nothing is written then.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; name a new or an empty one")
    name, source = folder.resolve().name, CONFIGS[config]
    load({**read_file(source), "run": name})
    shown = yaml.safe_dump(name).splitlines()[0]  # quoted where YAML would read a number or a truth value
    run = f"run: {shown} # results lie in results/{name}, logs in logs/{name}"
    texts = {
        "config.yaml": re.sub(r"^run:.*$", run, source.read_text(encoding="utf-8"), flags=re.MULTILINE),
        "Snakefile": (HERE / "Snakefile").read_text(encoding="utf-8"),
        "README.md": README.format(name=name),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in texts.items():
            (folder / file).write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror})") from None
