"""Folders of runs: made by `proard init`, run from an installed wheel, asked for a student by `proard export`."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from workflow_runs import ROOT, FakeRun, assert_one_line, planned, snakemake

from proard.cli import main
from proard.config import load, read_file
from proard.runs import CONFIGS, SNAKEFILE

PACKAGED = ("proard", "workflow", "config", "environments")
BESIDE = ("pyproject.toml", "README.md", "LICENSE", "environment.yml")


def proard(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    """The command in this process, which is spared the seconds of its imports."""
    words, (out, err) = [str(word) for word in arguments], (io.StringIO(), io.StringIO())
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
            status = 0
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def proard_of_the_wheel(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "proard.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)


def said(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_below(folder: Path) -> set[str]:
    """Files of a folder, without what Python and Snakemake write; links to folders are not followed."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if not {"__pycache__", ".snakemake"} & set(path.parts)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, by way of the source distribution, as `python -m build` makes it."""
    folder = tmp_path_factory.mktemp("build")
    for name in PACKAGED:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BESIDE:
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "build", "--no-isolation"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture
def installed(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder outside the clone, with the unpacked wheel in place of the clone's package."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def test_the_wheel_holds_the_package_the_workflow_and_the_configs(wheel: Path):
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"proard/{name}" for name in files_below(ROOT / "proard")}
    for folder in ("workflow", "config", "environments"):
        wanted |= {f"proard/runs/repository/{folder}/{name}" for name in files_below(ROOT / folder)}
    assert {"proard/kernels/maps.c", "proard/kernels/winograd.c", "proard/runs/repository/environment.yml"} <= wanted
    assert wanted - held == set()


def test_a_new_run_starts_from_the_wheel_alone(installed: Path):
    assert (
        said(proard_of_the_wheel("init", "demo", cwd=installed)).splitlines()[-1] == "cd demo && snakemake --cores all"
    )
    run = installed / "demo"
    assert {path.name for path in run.iterdir()} == {"config.yaml", "Snakefile", "README.md"}
    assert "cd demo && snakemake --cores all" in (run / "README.md").read_text("utf-8")
    quickstart = planned(snakemake("--dry-run", "--forceall", "--configfile", "config/quickstart.yaml"))
    assert planned(snakemake("--dry-run", cwd=run)) == quickstart
    done = snakemake("--cores", "1", "sample_archs", cwd=run)
    assert done.returncode == 0, done.stderr
    assert (run / "results" / "demo" / "sample_archs" / "archs.parquet").exists()
    assert read_file(run / "results" / "demo" / "config.yaml") == read_file(run / "config.yaml")
    student = "results/demo/export_student/macs=300K: "
    assert student in said(proard_of_the_wheel("export", "results/demo", "macs=300k", "--dry-run", cwd=run))


def test_every_config_starts_a_run_of_the_folders_name(tmp_path: Path):
    for number, config in enumerate(CONFIGS):
        said(proard("init", f"{number}", "--config", config, cwd=tmp_path))  # YAML would read a number
        made, source = read_file(tmp_path / f"{number}" / "config.yaml"), read_file(ROOT / "config" / f"{config}.yaml")
        assert load(made).run == f"{number}"
        assert {**made, "run": source["run"]} == source
    assert {"quickstart", "cifar10_micro_better", "cifar10_resnet"} <= set(CONFIGS)


@pytest.mark.parametrize(
    ("name", "words"), [("full", ["full is not an empty folder"]), ("my run", ["run is 'my run'", "letters, digits"])]
)
def test_a_folder_that_cannot_become_a_run_is_left_alone(tmp_path: Path, name: str, words: list[str]):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert_one_line(proard("init", name, cwd=tmp_path), words)
    assert files_below(tmp_path) == {"full/notes.txt"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return FakeRun(tmp_path_factory.mktemp("runs"))


def test_the_module_repeats_nothing_of_the_workflow_that_it_uses(finished: FakeRun):
    module = ROOT / "proard" / "runs" / "Snakefile"
    assert finished.plan(snakefile=module) == {}
    assert finished.plan("-R", "select_student", snakefile=module) == finished.plan("-R", "select_student")


def test_rules_of_ones_own_are_targets_beside_those_of_the_workflow(finished: FakeRun):
    template = (ROOT / "proard" / "runs" / "Snakefile").read_text("utf-8")
    before, place, after = template.partition("# Rules of your own have their place here.\n")
    assert place
    own = finished.folder / "own.smk"
    own.write_text(f'{before}rule count:\n    input: rules.report.output.html\n    output: "count.txt"\n{after}')
    assert finished.plan("count", snakefile=own) == {"count": 1}
    assert_one_line(finished("--dry-run", "cuont", snakefile=own), ["cuont is no target; did you mean count?"])
    assert_one_line(finished("--dry-run", "export_student", snakefile=own), ["type export_students"])


@pytest.mark.parametrize(
    ("run", "budget"), [("config.yaml", "macs=300k"), ("results/fake", "macs=3e5"), ("results/fake/", "macs=0.3M")]
)
def test_export_says_what_is_left_to_run(finished: FakeRun, run: str, budget: str):
    lines = said(proard("export", run, budget, "--dry-run", cwd=finished.folder)).splitlines()
    assert lines[0] == "results/fake/export_student/macs=300K: 2 jobs to run"
    assert [line.split() for line in lines[1:]] == [["1", "select_student"], ["1", "export_student"]]


def test_export_works_from_elsewhere_and_makes_no_student_twice(finished: FakeRun, tmp_path: Path):
    done = proard("export", finished.folder / "results" / "fake", "macs=1000k", cwd=tmp_path)
    assert said(done).strip() == "results/fake/export_student/macs=1M: 0 jobs to run"


def test_export_uses_the_snakefile_of_the_runs_folder(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"run": "own"}))
    own = (ROOT / "proard" / "runs" / "Snakefile").read_text("utf-8") + '\nprint("note: own rules", file=sys.stderr)\n'
    (tmp_path / "Snakefile").write_text("import sys\n" + own)
    done = proard("export", "config.yaml", "macs=1M", "--dry-run", cwd=tmp_path)
    assert re.search(r"^ +1 train_teacher\n", said(done), re.MULTILINE)
    assert done.stderr == "note: own rules\n"


@pytest.mark.parametrize(
    ("run", "budget", "words"),
    [
        ("config.yaml", "watts=3", ["budget 'watts=3' is not valid"]),
        ("config.yaml", "macs=1K", ["macs=1K", "smallest feasible cost"]),
        ("results", "macs=1M", ["results is no folder of a run", "results/RUN"]),
        ("results/old", "macs=1M", ["results/old has no config.yaml", "name the run's config file"]),
        ("absent.yaml", "macs=1M", ["absent.yaml cannot be read"]),
    ],
)
def test_export_says_in_one_line_what_is_wrong(finished: FakeRun, run: str, budget: str, words: list[str]):
    (finished.folder / "results" / "old").mkdir(exist_ok=True)
    assert_one_line(proard("export", run, budget, cwd=finished.folder), words)


def test_the_workflow_of_a_clone_is_the_clones():
    assert SNAKEFILE == ROOT / "workflow" / "Snakefile"
    assert os.path.samefile(CONFIGS["quickstart"], ROOT / "config" / "quickstart.yaml")
