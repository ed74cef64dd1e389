"""The command line shows tables with their units and provenance, and errors in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_run import BUDGETS, SyntheticRun

from proard import __version__
from proard.artifacts import AUTOATTACK, MEASURED, Provenance, read_table, write_table
from proard.artifacts.tables import FLOAT, INT, TEXT
from proard.cli import main
from proard.report.text import percent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SyntheticRun:
    """A run without a report."""
    return SyntheticRun(tmp_path_factory.mktemp("cli"))


def output(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command prints."""
    main([str(word) for word in words])
    return capsys.readouterr().out


def error(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a command that fails."""
    with pytest.raises(SystemExit) as failure:
        main([str(word) for word in words])
    assert failure.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_show_prints_units_and_provenance(run: SyntheticRun, capsys: pytest.CaptureFixture[str]):
    text = output(capsys, "show", run.path("merge_table", "table.parquet"), "--rows", "3")
    assert f"run demo · stage merge_table · seed 3 · proard {__version__}" in text
    assert "input input.parquet sha256 000000000000" in text
    assert "fraction, 95 % Wilson" in text
    assert "multiply-accumulates of one image" in text
    assert "8/255" in text
    assert f"{run.num_archs - 3} more rows" in text
    assert "clean_acc_half_a" not in text  # empty here


def test_a_table_of_many_shards_names_a_few_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    inputs = {f"shard{number}": f"{number:064d}" for number in range(1000)}
    write_table(
        tmp_path / "t.parquet", [{"macs": 1}], {"macs": (INT, "")}, Provenance("demo", "merge_table", inputs=inputs)
    )
    text = output(capsys, "show", tmp_path / "t.parquet")
    assert text.count("input shard") == 8
    assert "and 992 more inputs" in text


def test_show_prints_every_row_and_only_the_asked_columns(run: SyntheticRun, capsys: pytest.CaptureFixture[str]):
    path = run.path("merge_table", "table.parquet")
    lines = output(capsys, "show", path, "--rows", "0", "--columns", "arch_id,robust_acc").splitlines()
    frame = read_table(path)
    for arch_id, robust in zip(frame["arch_id"], frame["robust_acc"], strict=True):
        assert f"{arch_id}      {robust:.4f}" in [line.rstrip() for line in lines]
    assert not [line for line in lines if "macs" in line]


def test_show_reads_every_table_of_a_run(run: SyntheticRun, capsys: pytest.CaptureFixture[str]):
    paths = sorted(run.folder.rglob("*.parquet"))
    assert len(paths) > 10
    for path in paths:
        assert "sha256" in output(capsys, "show", path)


def test_show_of_odd_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    columns = {"name": (TEXT, "[red]markup[/red]"), "value": (FLOAT, "seconds"), "number": (INT, "things")}
    provenance = Provenance("r", "s")
    write_table(tmp_path / "empty.parquet", [], columns, provenance)
    assert "no rows" in output(capsys, "show", tmp_path / "empty.parquet")
    write_table(tmp_path / "one.parquet", [{"name": "[bold]x", "value": 1.25, "number": None}], columns, provenance)
    text = output(capsys, "show", tmp_path / "one.parquet")
    assert "[bold]x" in text
    assert "[red]markup[/red]" in text
    assert "1.25" in text


def test_show_refuses_what_is_no_table(run: SyntheticRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "page.html"
    path.write_text("<html>")
    assert "no readable Parquet table" in error(capsys, "show", path)
    assert "does not exist" in error(capsys, "show", tmp_path / "absent.parquet")
    assert "is a folder" in error(capsys, "show", tmp_path)
    table = run.path("merge_table", "table.parquet")
    assert "has no column nonsense" in error(capsys, "show", table, "--columns", "macs,nonsense")


def test_students_lists_each_budget_with_its_measured_accuracy(run: SyntheticRun, capsys: pytest.CaptureFixture[str]):
    lines = output(capsys, "students", run.folder).splitlines()
    for budget in BUDGETS:
        (line,) = [line for line in lines if line.startswith(f"{budget} ")]
        assert f" {percent(run.students[budget]['robust_acc'])} " in line
        assert "parity checked" in line
    assert any(line.startswith("control") for line in lines)
    assert "no report yet" in lines[-1]
    run.path("report").mkdir()
    run.path("report", "report.html").write_text("<html>")
    assert str(run.path("report", "report.html")) in output(capsys, "students", run.folder)


def test_students_shows_autoattack_where_it_was_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = SyntheticRun(tmp_path)
    assert "AutoAttack" not in output(capsys, "students", run.folder)
    budget, other = BUDGETS[:2]
    row = {name: value for name, value in run.students[budget].items() if name in MEASURED} | {"num_images": 400}
    rows = [{**row, "attack": name, "robust_acc": acc} for name, acc in (("apgd-ce", 0.3), ("autoattack", 0.2675))]
    run.write("autoattack_student", "table.parquet", rows, AUTOATTACK, budget)
    lines = output(capsys, "students", run.folder).splitlines()
    (found,) = [line for line in lines if line.startswith(f"{budget} ")]
    (without,) = [line for line in lines if line.startswith(f"{other} ")]
    assert lines[0].split()[-4:] == ["95", "%", "AutoAttack", "exported"]
    assert max(len(line.rstrip()) for line in lines[:-1]) <= 80  # the last line is a path
    assert found.split()[-3:] == ["26.8", "parity", "checked"]
    assert "–" in without.split()[-3]  # the interval of the column before
    assert "AutoAttack: standard, percent of the first 400 test images" in lines


def test_students_of_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "expected a run's folder" in error(capsys, "students", tmp_path)


def test_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as leave:
        main(["--version"])
    assert leave.value.code == 0
    assert capsys.readouterr().out == f"proard {__version__}\n"
