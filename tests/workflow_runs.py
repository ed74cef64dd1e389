"""Dry runs of Snakemake, and a run that is faked by writing its files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
CONFIG = {
    "run": "fake",
    "train_phase": {"phases": [{"name": "wide"}, {"name": "all"}]},
    "sample_archs": {"num_archs": 12},
    "fit_predictor": {"held_out": 2, "folds": 2},
    "evaluate_archs": {"archs_per_shard": 4},
    "select_student": {"budgets": ["macs=100K", "macs=1M", "params=20K"]},
}


def snakemake(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "snakemake", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)


def planned(done: subprocess.CompletedProcess) -> dict[str, int]:
    """Number of jobs per rule in a dry run."""
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    if "Nothing to be done" in output:
        return {}
    rows = output.split("Job stats:")[-1].split("total")[0].splitlines()
    return {name: int(count) for name, count in (row.split() for row in rows[3:] if row.strip())}


class FakeRun:
    """A finished run in a folder of its own."""

    def __init__(self, folder: Path, config: Mapping = CONFIG) -> None:
        self.folder = folder
        self.config = self.write("config.yaml", config)
        summary = self("--summary").stdout.splitlines()[1:]
        for name in (line.split("\t")[0] for line in summary):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        touched = self("--touch", "--forceall", "--cores", "1")
        assert touched.returncode == 0, touched.stderr

    def write(self, name: str, values: Mapping) -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump(values))
        return path

    def __call__(self, *arguments: str, more: Path | None = None, snakefile: Path | None = None):
        where = ["--directory", self.folder, "--snakefile", snakefile or ROOT / "workflow" / "Snakefile"]
        configs = ["--configfile", self.config, *([more] if more else [])]
        return snakemake(*arguments, *where, *configs)

    def plan(self, *arguments: str, **options) -> dict[str, int]:
        return planned(self("--dry-run", *arguments, **options))

    def plan_after(self, **sections) -> dict[str, int]:
        return self.plan(more=self.write("edit.yaml", sections))


def write_file(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([value]))
    os.utime(path, (value, value))
    return path


def assert_one_line(done: subprocess.CompletedProcess, words: list[str]) -> None:
    """A failed call whose output has `words` in one line beginning with `error:`, and no traceback."""
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert [word for word in words if word not in errors[0]] == []
    assert "Traceback" not in done.stdout + done.stderr
    assert ".smk" not in done.stderr
