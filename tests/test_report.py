"""The report has the tables' values, needs no other file, and omits sections without data."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pandas as pd
import pyarrow.parquet as pq
import pytest
from synthetic_run import BUDGETS, SyntheticRun

from proard import artifacts
from proard.artifacts import ArtifactError
from proard.artifacts.tables import FLOAT, INT, TEXT
from proard.config import load
from proard.report import durations, exported_students, setup
from proard.report.figures import search_figure, training_figure
from proard.report.svg import COLOURS
from proard.report.text import count, percent, pixels
from proard.stages.report import main

SECTIONS = ["students", "device", "tradeoff", "search", "predictor", "training", "setup", "time", "provenance"]
ACCURACIES = ("clean_acc", "robust_acc")
FIGURES = ["front", "training", "predictor", "hypervolume"]
VOID = {"meta", "br", "link", "img", "path", "use"}


class Page(HTMLParser):
    """Ids, links, and the cells of every row of students; raises on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.in_student = False
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Store what the tests need."""
        values = dict(attrs)
        if tag not in VOID or tag in ("path", "use"):
            self.open.append(tag)
        self.ids += [values["id"]] if values.get("id") else []
        self.links += [values[name] for name in ("href", "src", "xlink:href") if values.get(name)]
        if tag == "tr":
            self.in_student = "student" in (values.get("class") or "").split()
            self.rows += [[]] if self.in_student else []
        if tag == "td" and self.in_student:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A tag that closes itself."""
        self.handle_starttag(tag, attrs)
        if tag not in VOID or tag in ("path", "use"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        """Tags close in order."""
        assert self.open.pop() == tag
        self.in_student = self.in_student and tag != "tr"

    def handle_data(self, data: str) -> None:
        """Words of a student's cell."""
        if self.in_student and self.rows[-1]:
            self.rows[-1][-1] += data.strip("\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SyntheticRun:
    """A run with its report rendered."""
    made = SyntheticRun(tmp_path_factory.mktemp("report"))
    main(made.flags())
    return made


@pytest.fixture(scope="module")
def page(run: SyntheticRun) -> str:
    """The page's text."""
    return run.path("report", "report.html").read_text()


def test_page_is_whole_and_fetches_nothing(page: str):
    parsed = Page(page)
    assert [name for name in parsed.ids if name in SECTIONS] == SECTIONS
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert not [link for link in parsed.links if "//" in link]
    assert not re.search(r"<script|<link|@import|url\((?!#)", page)


def test_every_link_within_the_page_has_a_target(page: str):
    parsed = Page(page)
    inner = {link[1:] for link in parsed.links if link.startswith("#")}
    assert inner <= set(parsed.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(parsed.ids)


def test_links_to_files_are_relative_to_the_page(run: SyntheticRun, page: str):
    links = Page(page).links
    for budget in BUDGETS:
        assert {f"../export_student/{budget}/{name}" for name in ("student.onnx", "card.md")} <= set(links)
    parquet = [link for link in links if link.endswith(".parquet")]
    assert parquet
    assert all((run.path("report") / link).exists() for link in parquet)


def test_students_table_holds_the_numbers_of_the_tables(run: SyntheticRun, page: str):
    rows = {cells[0]: cells for cells in Page(page).rows}
    assert sorted(rows) == sorted(BUDGETS)
    for budget, row in run.students.items():
        cells = rows[budget]
        assert cells[1] == count(row["macs"])
        assert cells[3].startswith(percent(row["clean_acc"]))
        interval = f"{percent(row['robust_acc_low'])}–{percent(row['robust_acc_high'])}"
        assert cells[4] == f"{percent(row['robust_acc'])}{interval}"
        assert cells[8].startswith(f"{percent(row['predicted_clean_acc'])} → ")
    best = max(run.students.values(), key=lambda row: row["robust_acc"])
    assert f"<strong>{percent(best['robust_acc'])} %</strong>" in page
    assert f"<b>{percent(best['robust_acc'])}<small>%</small></b>" in page


def test_figures_are_valid_and_the_same_every_time(run: SyntheticRun, tmp_path: Path):
    for name in FIGURES:
        text = run.path("report", f"{name}.svg").read_text()
        root = ElementTree.fromstring(text)
        assert root.tag.endswith("svg")
        assert root[0].text
    again = [str(tmp_path / Path(word).name) if word.endswith((".svg", ".html")) else word for word in run.flags()]
    main(again)
    for name in FIGURES:
        assert (tmp_path / f"{name}.svg").read_bytes() == run.path("report", f"{name}.svg").read_bytes()


def test_every_sampled_subnet_has_its_tooltip(run: SyntheticRun):
    root = ElementTree.fromstring(run.path("report", "front.svg").read_text())
    titles = [entry.text for entry in root.iter("{http://www.w3.org/2000/svg}title")]
    assert sum(text.startswith("sampled subnet") for text in titles) == 2 * run.num_archs
    assert sum(text.startswith("student macs=2M") for text in titles) == 2


def test_colours_of_figures_follow_the_page(page: str):
    body = page[page.index("</style>") :]
    assert not [name for name, colour in COLOURS.items() if colour in body]
    assert set(re.findall(r"var\(--([a-z]+)\)", page)) <= set(re.findall(r"--([a-z]+):", page))


def test_what_was_not_given_is_left_out(tmp_path: Path):
    run = SyntheticRun(tmp_path)
    missing = (
        "quantised",
        "quality",
        "held-out",
        "front",
        "archive",
        "search-history",
        "verified",
        "control-table",
        "benchmarks",
    )
    main(run.flags(without=(*missing, "students", "cards")))
    page = run.path("report", "report.html").read_text()
    kept = [name for name in Page(page).ids if name in SECTIONS]
    assert kept == ["tradeoff", "training", "setup", "provenance"]
    for name in FIGURES:
        ElementTree.fromstring(run.path("report", f"{name}.svg").read_text())


def test_damaged_table_is_named(tmp_path: Path):
    run = SyntheticRun(tmp_path)
    path = run.path("merge_table", "table.parquet")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match=r"merge_table/table\.parquet"):
        main(run.flags())
    assert not run.path("report", "report.html").exists()


def test_damaged_records_are_named(tmp_path: Path):
    run = SyntheticRun(tmp_path)
    run.path("export_student", "macs=2M", "parity.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"macs=2M/parity\.json"):
        main(run.flags())
    record = tmp_path / "records" / "train.tsv"
    artifacts.write_text(record, "nothing\n")
    with pytest.raises(ArtifactError, match=r"train\.tsv"):
        durations(record.parent)


def test_names_from_outside_cannot_write_markup(tmp_path: Path):
    run = SyntheticRun(tmp_path)
    manifest = run.path("prepare_data", "manifest.json")
    manifest.write_text(manifest.read_text().replace("airplane", "<b>&plane"))
    main(run.flags())
    page = run.path("report", "report.html").read_text()
    assert "&lt;b&gt;&amp;plane" in page
    assert "<b>&plane" not in page


def test_durations_sum_the_jobs_of_a_stage(run: SyntheticRun):
    found = {entry.stage: entry for entry in durations(run.path("benchmarks"))}
    assert list(found)[:2] == ["prepare_data", "train_teacher"]
    assert (found["evaluate_archs"].jobs, found["evaluate_archs"].seconds) == (3, 3 * 310.125)
    assert found["train_phase"].memory_mb == 1620
    assert found["prepare_data"].memory_mb is None


def test_students_are_the_choices_measured_on_test(run: SyntheticRun):
    frames = [artifacts.read_table(run.path("select_student", budget, "student.parquet")) for budget in BUDGETS]
    found = exported_students(frames)
    assert [student.macs for student in found] == sorted(student.macs for student in found)
    for student in found:
        assert student.final["split"] == "test"
        assert student.final["robust_acc"] == min(row["robust_acc"] for row in student.test.values())
    without_test = frames[0][frames[0]["split"] == "val"]
    with pytest.raises(ArtifactError, match="no row of its choice on test"):
        exported_students([without_test])


def device_rows(text: str) -> list[list[str]]:
    """Cells of every file in the section on devices, without markup."""
    section = text.split('<section id="device">')[1].split("</section>")[0]
    rows = re.findall(r'<tr class="file">(.*?)</tr>', section, re.DOTALL)
    return [
        [re.sub(r"<[^>]*>", "|", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)] for row in rows
    ]


def test_int8_attacks_other_than_those_of_the_students_are_named(tmp_path: Path):
    attacks = [{"name": "pgd7", "num_steps": 7}]
    texts = []
    for name, sections in (("same", {}), ("other", {"quantize_student": {"attacks": attacks}})):
        made = SyntheticRun(tmp_path / name, **sections)
        main(made.flags())
        texts.append(" ".join(made.path("report", "report.html").read_text("utf-8").split()))
    assert "these accuracies are at most as high as there" in texts[0]
    assert "The white-box attacks are pgd7 (quantize_student.attacks), not those of the students' table" in texts[1]


def test_files_on_the_device_have_the_numbers_of_their_tables(run: SyntheticRun, page: str):
    rows = device_rows(page)
    assert len(rows) == 2 * len(BUDGETS)
    names = [name for name, *_ in rows[::2]]
    assert sorted(names) == sorted(BUDGETS)
    assert [run.students[name]["macs"] for name in names] == sorted(row["macs"] for row in run.students.values())
    for name, in_float, in_int8 in zip(names, rows[::2], rows[1::2], strict=True):
        row = run.students[name]
        accuracies = [f"{percent(row[k])}|{percent(row[f'{k}_low'])}–{percent(row[f'{k}_high'])}|" for k in ACCURACIES]
        assert in_float[1:6] == ["student.onnx|float32|", "400", "0.375", "0.400", "57.3"]
        assert in_float[6:] == [accuracies[0], f"{accuracies[1]}|union|", "–", "–", "–"]
        assert in_int8[:6] == ["", "student.int8.onnx|int8, reduced|", "110", "–", "0.250", "–"]
        assert in_int8[7].startswith(f"{percent(row['robust_acc'] - 0.008)}|")
        assert in_int8[8:] == ["−0.8|−2.0 to +0.1|", "50 / 10", "99.80"]
    assert "lower bound" in page
    figure = ElementTree.fromstring(
        "<svg" + page.split('<section id="device">')[1].split("<svg")[1].split("</svg>")[0] + "</svg>"
    )
    titles = [entry.text for entry in figure.iter("{http://www.w3.org/2000/svg}title")]
    robust = percent(run.students[names[0]]["robust_acc"] - 0.008)
    assert any(
        t.startswith(f"{names[0]}, int8 · 0.250 ms · clean") and t.endswith(f"robust {robust} %") for t in titles
    )
    assert len(titles) == 1 + 2 * len(BUDGETS)


def test_files_of_other_runtimes_join_those_of_their_student(tmp_path: Path):
    made = SyntheticRun(tmp_path)
    kinds = {"file": TEXT, "precision": TEXT, "budget": TEXT, "bytes": INT} | {
        name: FLOAT for name in ("latency_ms", "clean_acc", "robust_acc", "difference")
    }
    known = {"budget": BUDGETS[0], "bytes": 90_400, "clean_acc": 0.5, "robust_acc": 0.25}
    rows = [
        {**known, "file": "student.int8.pte", "precision": "int8", "latency_ms": 0.2, "difference": -0.0125},
        {**known, "file": "student.pte", "precision": "float32", "latency_ms": None, "difference": None},
    ]
    columns = {name: (kind, "") for name, kind in kinds.items()}
    artifacts.write_table(made.path("pte.parquet"), rows, columns, artifacts.Provenance("demo", "executorch_student"))
    main([*made.flags(), "--deployed", str(made.path("pte.parquet"))])
    text = made.path("report", "report.html").read_text()
    found = device_rows(text)
    assert len(found) == 2 * len(BUDGETS) + 2
    first = [cells[0] for cells in found].index(BUDGETS[0])
    assert found[first + 2][1:6] == ["student.int8.pte|int8, .pte|", "90", "–", "0.200", "–"]
    assert found[first + 2][6:] == ["50.0", "25.0", "−1.2", "–", "–"]
    assert found[first + 3][1:] == ["student.pte|float32, .pte|", "90", "–", "–", "–", "50.0", "25.0", "–", "–", "–"]
    assert f"{BUDGETS[0]}, int8, .pte · 0.200 ms" in text


def test_a_latency_that_is_predicted_for_another_file_is_shown_beside_it(tmp_path: Path):
    made = SyntheticRun(tmp_path)
    for budget in BUDGETS:
        path = made.path("select_student", budget, "student.parquet")
        table = artifacts.read_table(path).assign(latency_file="student.int8.onnx")
        artifacts.write_table(path, table, artifacts.STUDENT, made.provenance("select_student"))
    main(made.flags())
    text = made.path("report", "report.html").read_text()
    rows = device_rows(text)
    assert {cells[3] for cells in rows[::2]} == {"–"}
    assert {cells[3] for cells in rows[1::2]} == {"0.375"}


def test_without_a_table_of_int8_the_exported_file_is_shown(tmp_path: Path):
    made = SyntheticRun(tmp_path)
    for budget in BUDGETS:
        parity = made.path("export_student", budget, "parity.json")
        measured = {"latency": {"median_ms": 0.0625, "runtime": "onnxruntime 1.30, CPU"}, "bytes": {"student.onnx": 7}}
        artifacts.write_json(parity, json.loads(parity.read_text()) | (measured if budget != BUDGETS[1] else {}))
    older = made.path("select_student", BUDGETS[0], "student.parquet")
    table = pq.read_table(older).drop_columns(["sram", "arena", "latency", "flash", "clean", "robust", "image_set"])
    metadata = {name: value for name, value in table.schema.metadata.items() if name != b"checksum"}
    pq.write_table(table.replace_schema_metadata(metadata), older)
    main(made.flags(without=("quantised",)))
    rows = {cells[0]: cells for cells in device_rows(made.path("report", "report.html").read_text())}
    assert sorted(rows) == sorted(BUDGETS)
    assert rows[BUDGETS[0]][1:6] == ["student.onnx|float32|", "0", "–", "0.062", "–"]
    assert rows[BUDGETS[1]][1:6] == ["student.onnx|float32|", "–", "0.375", "–", "57.3"]
    assert rows[BUDGETS[2]][7].endswith("|worst|")


@pytest.mark.parametrize(
    ("length", "text"),
    [(8 / 255, "8/255"), (2 / 255, "2/255"), (0.5 / 255, "0.5/255"), (0.1, "0.1"), (0.2, "51/255")],
)
def test_lengths_are_written_in_pixel_steps(length: float, text: str):
    assert pixels(length) == text


def test_the_legend_of_the_searches_leaves_their_curves_free():
    rows = [{"search": name, "evaluations": n, "hypervolume": 1 / n} for name in ("nsga2", "random") for n in (1, 9)]
    figure = search_figure(SimpleNamespace(get=lambda _: pd.DataFrame(rows)))
    figure.canvas.draw()
    (legend,) = [found for found in (*figure.legends, figure.axes[0].get_legend()) if found]
    assert not legend.get_window_extent().overlaps(figure.axes[0].get_tightbbox())
    assert legend.get_window_extent().y0 >= 0


def test_on_a_phone_all_that_is_wide_scrolls_in_a_frame_that_shows(page: str):
    frames = re.findall(r"<(?:table|svg)\b", page)
    assert len(re.findall(r'<div class="scroll(?: figure)?">(?=<(?:table|svg)\b)', page)) == len(frames) > 5
    narrow = page.split("@media (max-width: 640px)")[1].split("@media")[0]
    assert re.search(r"\.scroll \{[^}]*border: 1px solid", narrow)
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto;[^}]*linear-gradient[^}]* scroll;", page)


def test_panels_that_share_an_axis_all_fit_on_it():
    def history(phase: str, clean: float) -> pd.DataFrame:
        row = {"phase": phase, "epoch": 1.0, "arch": "largest", "loss": 1.0, "val_robust_acc": 0.2, "best": True}
        return pd.DataFrame([row | {"val_clean_acc": clean}])

    results = SimpleNamespace(histories=[history("teacher", 0.5), history("control", 0.9)])
    low, high = training_figure(results).axes[0].get_ylim()
    assert low == 0
    assert high > 0.9


@pytest.mark.parametrize(("changes", "name"), [({}, "SGD"), ({"optimizer": "muon"}, "Muon")])
def test_trainings_are_told_with_their_optimizer_and_rate(changes, name):
    config = load(
        {"run": "demo", "train_teacher": {"lr": 0.3, **changes}, "train_phase": {"phases": [{"lr": 0.2, **changes}]}}
    )
    sections = config.model_dump(mode="json")
    assert f"{name} at learning rate 0.3" in setup._teacher_words(sections["train_teacher"])
    assert f"{name} at learning rate 0.2" in setup._phase_words(sections["train_phase"])


def test_autoattack_and_checks_have_a_section_each(tmp_path: Path):
    made = SyntheticRun(tmp_path)
    attacked, checked = [], []
    for place, budget in enumerate(BUDGETS):
        final = made.students[budget]
        rows = []
        for name, lost in (("apgd-ce", 0.0), ("apgd-t", 0.02), ("fab-t", 0.02), ("square", 0.02), ("autoattack", 0.02)):
            row = {key: value for key, value in final.items() if key in artifacts.MEASURED}
            robust = {"robust_acc": final["robust_acc"] - lost, "own_robust_acc": final["robust_acc"]}
            rows.append({**row, **robust, "attack": name, "budget": budget, "attacked": 10, "left_out": 3})
            rows[-1] |= {"version": "standard, pyautoattack 0.2.0", "warnings": ""}
        made.write("autoattack_student", "table.parquet", rows, artifacts.AUTOATTACK, budget)
        attacked.append(str(made.path("autoattack_student", budget, "table.parquet")))
        listed = [
            {"number": 1, "check": "one step", "value": 0.0, "passed": True},
            {"number": 2, "check": "radius", "value": 0.5 if place == 0 else 0.0, "passed": place > 0},
            {"number": 3, "check": "more effort", "value": None, "passed": None},
        ]
        shared = {"budget": budget, "relation": "<=", "threshold": 0.01, "details": '{"8 eps": 0.5}', "expected": "-"}
        shared["num_images"] = 100
        made.write("check_student", "checks.parquet", [{**shared, **row} for row in listed], artifacts.CHECKS, budget)
        checked.append(str(made.path("check_student", budget, "checks.parquet")))
    main([*made.flags(), "--autoattacked", *attacked, "--checked", *checked])
    text = made.path("report", "report.html").read_text("utf-8")
    assert {"autoattack", "checks"} < set(Page(text).ids)
    assert f"\n{rows[-1]['num_images']:,} under AutoAttack" in text.split('<div class="cards">')[0]
    section = text.split('<section id="autoattack">')[1].split("</section>")[0]
    final = made.students[BUDGETS[0]]
    (line,) = (row for row in section.split("<tr>") if f">{BUDGETS[0]}<" in row)
    assert f">{percent(final['robust_acc'])}<" in line
    assert f">{percent(final['robust_acc'] - 0.02)}<" in line
    assert ">2.0<" in line
    assert f"{BUDGETS[0]} has 2.0 points\nless" in section
    assert "15 times an image was already misclassified" in section
    found = text.split('<section id="checks">')[1].split("</section>")[0]
    assert found.count("✗") == 1
    assert found.count("✓") == 2 * len(BUDGETS) - 1
    assert f"{BUDGETS[0]}, radius (0.5; 8 eps: 0.5)." in found
