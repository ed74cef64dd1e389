"""Messages for a mistyped target, a missing package, and a folder that another run has locked."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from workflow_runs import ROOT, assert_one_line, planned, snakemake, write_file

SNAKEFILE = ROOT / "workflow" / "Snakefile"


def test_a_python_without_the_package_is_told_so(tmp_path):
    (tmp_path / "proard.py").write_text("raise ModuleNotFoundError(\"No module named 'proard'\")")
    (tmp_path / "a.yaml").write_text("run: a")
    done = snakemake("--dry-run", "--snakefile", SNAKEFILE, "--configfile", "a.yaml", cwd=tmp_path)
    assert_one_line(done, ["proard", sys.executable, "pip install -e ."])
    bare = [Path(sys.executable).with_name("snakemake"), "--lint"]  # as the workflow catalogue runs it, in the clone
    lint = subprocess.run(
        bare, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert (lint.returncode, lint.stderr.count("\n")) == (0, 1), lint.stderr
    assert "note: nothing linted: the rules need the package proard" in lint.stderr


def test_a_folder_with_the_name_of_the_package_is_named(tmp_path):
    (
        tmp_path / "proard"
    ).mkdir()  # the clone, seen from the folder above it; without PYTHONPATH, as after pip install -e
    (tmp_path / "a.yaml").write_text("run: a")
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--snakefile", SNAKEFILE, "--configfile", "a.yaml"]
    path = os.pathsep.join(part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part != str(ROOT))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert_one_line(done, [f"the folder {tmp_path / 'proard'} for the package proard", "start snakemake in another"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["select_student"], ["the rule select_student has a wildcard", "type select_students"]),
        (["diagnose"], ["type compare_experiment"]),
        (["serch_front"], ["serch_front is no target; did you mean search_front?"]),
        (["slect_student"], ["did you mean select_students?"]),
        (["-R", "slect_student"], ["slect_student is no rule; did you mean select_student?"]),
        (["results/fake/export_student/macs=1M/studnt.onnx"], ["did you mean results/fake/", "/student.onnx?"]),
        (["results/fack/report/report.html"], ["this config writes to results/fake"]),
    ],
    ids=lambda value: value[-1],
)  # fmt: skip
def test_a_target_that_is_none_is_one_line_that_says_what_to_type(tmp_path, arguments, words):
    (tmp_path / "a.yaml").write_text("run: fake")
    where = ["--snakefile", SNAKEFILE, "--directory", tmp_path, "--configfile", tmp_path / "a.yaml"]
    assert_one_line(snakemake("--dry-run", *arguments, *where), words)


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        (["--configfile", "config/quickstrat.yaml"], "No such file or directory: 'config/quickstrat.yaml'"),
        (["--configfile", "config/quickstart.yaml", "report"], "No such file or directory: 'report'"),
        (["--config", "run=mine", "report"], "Config entries have to be defined as name=value pairs"),
    ],
    ids=lambda value: value[-1],
)
def test_the_readme_explains_errors_that_come_before_any_file_of_the_workflow_is_read(arguments, last):
    done = snakemake("--dry-run", *arguments)
    assert done.returncode == 1
    assert last in (done.stdout + done.stderr).rstrip().splitlines()[-1]
    readme = (ROOT / "README.md").read_text("utf-8")
    assert last.split("'")[0].strip() in readme
    assert planned(snakemake("prepare_data", "--dry-run", "--forceall", "--configfile=config/quickstart.yaml"))


def test_a_locked_folder_names_the_run_that_works_in_it(tmp_path):
    (tmp_path / "a.yaml").write_text("run: a")
    where = ["--snakefile", SNAKEFILE, "--directory", tmp_path, "--cores", "1"]
    lock = write_file(tmp_path / ".snakemake" / "locks" / "0.output.lock", 1)
    lock.write_text("results/a/sample_archs/archs.parquet\n")
    call = partial(snakemake, "sample_archs", *where, "--configfile", tmp_path / "a.yaml")
    assert "note: this folder is locked, but no Snakemake on this machine works in it" in call().stderr
    program = tmp_path / "snakemake"
    program.write_text("import time; print(1, flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, program], cwd=tmp_path, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        try:
            stderr = call().stderr
        finally:
            other.kill()
    assert f"note: Snakemake works in this folder already, process {other.pid} since " in stderr
    assert "Directory cannot be locked" in stderr
