"""The whole DAG on the digits, smaller than the quick start: killed in between, then with one more student."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
from pipeline_runs import Run

from proard import cli
from proard.artifacts import read_header, read_table
from proard.config import ConfigError
from proard.report import costs
from proard.report.costs import CostComparison, compare, read_ledgers

TRAININGS = ("train_teacher", "train_phase/depth", "train_phase/all")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose Snakemake was killed with the teacher half trained, and finished with the README's commands."""
    run = Run(tmp_path_factory.mktemp("killed"))
    state = run.results / "train_teacher" / "teacher.state"
    process = run.start()
    deadline = time.monotonic() + 240
    while not state.exists():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, "the teacher saved no state"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run.results / "train_teacher" / "teacher.safetensors").exists()
    run("--unlock")
    run("--rerun-incomplete")
    return run


def test_the_whole_dag_ends_in_checked_students(finished: Run):
    student = finished.results / "export_student" / "macs=200K"
    parity = json.loads((student / "parity.json").read_text())
    assert parity["passed"]
    table = read_table(finished.results / "select_student" / "macs=200K" / "student.parquet")
    chosen = table[(table["role"] == "choice") & (table["split"] == "test") & (table["attack"] == "worst")].iloc[0]
    assert chosen["macs"] <= 200e3
    assert parity["onnx_test_accuracy"] == chosen["clean_acc"]
    onnx.checker.check_model(onnx.load(student / "student.onnx"))
    page = (finished.results / "report" / "report.html").read_text()
    assert "macs=200K" in page
    verified = read_table(finished.results / "verify_front" / "front.parquet")
    per_search = verified[["found_by", "arch_id"]].drop_duplicates()["found_by"].value_counts()
    assert per_search["nsga2"] == per_search["random"]
    assert not list(finished.results.rglob("*.state"))
    assert not list(finished.results.rglob("*.part"))


def test_a_run_of_another_version_has_its_costs_without_the_comparison(finished: Run, monkeypatch):
    def parse(*_):
        raise ConfigError("train_phase.all.gone is no setting")

    monkeypatch.setattr(costs, "parse", parse)
    found = compare(finished.results, read_ledgers(finished.results))
    assert found == (
        "no comparison: the phases were trained by another version of the package (train_phase.all.gone is no setting)"
    )


def test_the_ledger_compares_the_run_with_students_trained_one_by_one(finished: Run, capsys: pytest.CaptureFixture):
    """The teacher was killed once and resumed: repeated overhead is counted twice, training steps only once."""
    folder, ledgers = finished.results, read_ledgers(finished.results)
    found = compare(folder, ledgers)
    assert isinstance(found, CostComparison), found
    images = {name: read_table(folder / name / "history.parquet")["images"].iloc[-1] for name in TRAININGS}
    steps = images["train_phase/depth"] + images["train_phase/all"]
    assert found.images == {"steps": steps, "path": steps + images["train_teacher"]}
    assert (found.own, found.others) == (3 + 2 * 3 + 3, 1)  # rslad: clean and adversarial pass, three attack steps
    assert found.teacher_macs == read_table(folder / "train_teacher" / "history.parquet")["macs"].iloc[-1]
    tables = {path.parent: read_table(path) for path in folder.rglob("costs.parquet")}
    paid = {parent: float(table[["work_macs", "cached_macs"]].sum().sum()) for parent, table in tables.items()}
    stages = [path.relative_to(folder).parts[0] for path in paid]
    of = lambda *names: sum(cost for cost, stage in zip(paid.values(), stages, strict=True) if stage in names)  # noqa: E731
    assert found.shared == pytest.approx(of("prepare_data", "train_teacher"))
    search = ("sample_archs", "evaluate_archs", "merge_table", "fit_predictor", "search_front", "verify_front")
    assert found.once == pytest.approx(of("train_phase", *search))
    assert 0 < found.training < found.once
    students = stages.count("select_student")
    assert found.each == pytest.approx(of("select_student", "export_student") / students)
    assert len(found.students) == students
    cli.main(["cost", str(folder)])
    printed = capsys.readouterr().out
    assert "break-even" in printed
    assert "K=100" in printed
    assert "each image passes 12 times through the student and 1 times through the teacher" in " ".join(printed.split())


def test_the_report_is_made_without_torch(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "torch.py").write_text("raise ImportError('the report needs no torch')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    finished("results/small/report/report.html", "--forcerun", "report")
    assert "Cost of students one by one" in (finished.results / "report" / "report.html").read_text()


def test_a_second_run_does_nothing(finished: Run):
    assert "Nothing to be done" in finished()


def test_a_new_budget_selects_and_exports_and_nothing_else(finished: Run):
    before = {path: path.stat().st_mtime_ns for path in finished.results.rglob("*.safetensors")}
    output = finished("results/small/export_student/params=20K/student.onnx")
    assert (finished.results / "export_student" / "params=20K" / "student.onnx").exists()
    ran = {line.split()[1].rstrip(":") for line in output.splitlines() if line.startswith(("rule ", "localrule "))}
    assert ran == {"select_student", "export_student"}
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in before.items())


def test_export_makes_one_student_of_all_spellings_of_a_budget(finished: Run):
    export = [sys.executable, "-m", "proard.cli", "export", "results/small", "macs=0.1M"]
    done = subprocess.run(export, cwd=finished.folder, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == "results/small/export_student/macs=100K: 2 jobs to run"
    assert json.loads((finished.results / "export_student" / "macs=100K" / "parity.json").read_text())["passed"]
    export[-1] = "macs=100k"
    done = subprocess.run(export, cwd=finished.folder, capture_output=True, text=True, check=False, timeout=600)
    assert done.stdout == "results/small/export_student/macs=100K: 0 jobs to run\n"


def test_a_killed_run_ends_in_the_weights_of_an_undisturbed_one(finished: Run, tmp_path: Path):
    undisturbed = Run(tmp_path)
    undisturbed("train_phases")
    for name in ("train_teacher/teacher", "train_phase/all/supernet"):
        path = f"{name}.safetensors"
        assert read_header(finished.results / path)["checksum"] == read_header(undisturbed.results / path)["checksum"]


def test_measurements_are_not_repeated(finished: Run):
    cached = {path: path.stat().st_mtime_ns for path in (finished.results / "cache").rglob("*.json")}
    (finished.results / "evaluate_archs" / "0000-0015" / "table.parquet").unlink()
    finished("evaluate")
    assert {path: path.stat().st_mtime_ns for path in (finished.results / "cache").rglob("*.json")} == cached
