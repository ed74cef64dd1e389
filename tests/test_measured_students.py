"""Students trained one by one, measured alike, compared in one table and exported."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from student_runs import config_of, evaluated, student_files
from synthetic_run import SyntheticRun

from proard.artifacts import STUDENT, Provenance, read_table, write_table
from proard.config import job_settings, load
from proard.data import load_split, to_float
from proard.export import load_student
from proard.nets import load_static
from proard.report.students import FIGURES, nearest
from proard.report.text import percent
from proard.stages import compare_experiment, export_student
from proard.stages import report as report_stage


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return student_files(tmp_path_factory.mktemp("students"))


def test_every_student_stands_the_same_attacks_and_its_own(files, tmp_path):
    rows, written = evaluated(files, tmp_path, {"name": "s_seed=3", "loss": "ard", "lr": 0.03, "seed": 3})
    assert list(rows["attack"]) == ["fgsm", "pgd4", "worst"] * 2 + ["own"]
    assert list(rows["eps"]) == [0.05] * 3 + [0.1] * 4
    assert list(rows["step_size"].dropna()) == pytest.approx([0.05, 0.02, 0.1, 0.04, 0.05])
    by = rows.set_index(["attack", "eps"])["robust_acc"]
    for eps in (0.05, 0.1):
        assert by["worst", eps] <= min(by["fgsm", eps], by["pgd4", eps])
    assert rows["clean_acc"].nunique() == 1
    assert set(rows["split"]) == {"test"}
    own = rows.iloc[-1]
    assert (own["num_steps"], own["accounting"]) == (2, "last_iterate")
    assert by["worst", 0.1] <= own["robust_acc"]
    first = rows.iloc[0]
    assert (first["training"], first["group"], first["loss"], first["net"]) == ("s_seed=3", "s", "ard", "tiny")
    assert (first["train_steps"], first["lr"], first["epochs"]) == (2, 0.03, 2)
    history = read_table(written["history"])
    assert first["train_gradients"] == history["gradients"].iloc[-1] == 3 * history["images"].iloc[-1]
    assert first["peak_memory"] > 2**25
    assert first["val_robust_acc"] == history.loc[history["best"], "val_robust_acc"].iloc[-1]


def test_fgsm_measures_one_step_of_eps_from_the_image(files, tmp_path):
    rows, written = evaluated(files, tmp_path, {"name": "s", "loss": "plain"})
    assert "own" not in set(rows["attack"])
    net, *_ = load_static(written["weights"], kind="trained_student")
    test = load_split(files["test"])
    images = to_float(test.images)
    inputs = images.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(net(inputs), test.labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, inputs)
    with torch.no_grad():
        clean = net(images).argmax(1) == test.labels
        right = clean & (net((images + 0.1 * gradient.sign()).clamp(0, 1)).argmax(1) == test.labels)
    row = rows[(rows["attack"] == "fgsm") & (rows["eps"] == 0.1)].iloc[0]
    assert row["robust_acc"] == pytest.approx(float(right.double().mean()))


def test_students_are_compared_in_one_table_with_figures(files, tmp_path):
    students = [{"name": f"ard_seed={seed}", "loss": "ard", "seed": seed} for seed in (0, 1)]
    students.append({"name": "plain", "loss": "plain", "epochs": 1})
    tables = {each["name"]: evaluated(files, tmp_path / each["name"], each) for each in students}
    config = config_of(*students)
    figures = {name: tmp_path / f"{name}.svg" for name in FIGURES}
    flags = {"table": tmp_path / "all.parquet", "summary": tmp_path / "summary.parquet", **figures}
    config = load({**config.model_dump(mode="json"), "experiment": {"title": "Some networks"}})
    argv = ["--settings", job_settings(config, "compare_experiment"), "--threads", "1", "--device", "cpu"]
    argv += ["--bounds", "--all-radii", "--diagnoses"]
    argv += ["--outcomes", *(str(written["outcomes"]) for _, written in tables.values())]
    rows = tables["plain"][0].assign(budget="macs=1M", role="choice", chosen=True, found_by="nsga2")
    chosen = rows.reindex(columns=list(STUDENT))
    write_table(tmp_path / "chosen.parquet", chosen, STUDENT, Provenance("tiny", "select_student"))
    argv += ["--budgets", str(tmp_path / "chosen.parquet")]
    compare_experiment.main(
        [*argv, *(w for name, path in flags.items() for w in (f"--{name.replace('_', '-')}", str(path)))]
    )
    table, summary = read_table(flags["table"]), read_table(flags["summary"])
    assert len(table) == sum(len(rows) for rows, _ in tables.values()) + len(tables["plain"][0])
    same_rows = [table[table["group"] == group]["robust_acc"].tolist() for group in ("plain", "macs=1M")]
    assert same_rows[0] == same_rows[1]
    pair = table[(table["group"] == "ard") & (table["attack"] == "worst") & (table["eps"] == 0.1)]["robust_acc"]
    row = summary[(summary["group"] == "ard") & (summary["attack"] == "worst") & (summary["eps"] == 0.1)].iloc[0]
    assert row["robust_acc"] == pytest.approx(pair.mean())
    assert row["robust_acc_sd"] == pytest.approx(pair.std(), abs=1e-12)
    assert row["seeds"] == 2
    assert math.isnan(summary[summary["group"] == "plain"]["robust_acc_sd"].astype(float).iloc[0])
    for path in figures.values():
        text = path.read_text("utf-8")
        assert "</svg>" in text
        assert "Some networks" in text
    assert ">ard</text>" in figures["accuracy_figure"].read_text("utf-8")

    run = SyntheticRun(tmp_path / "run")
    page = run.path("report", "report.html")
    report_stage.main(run.flags())
    assert 'id="trained"' not in page.read_text()
    report_stage.main([*run.flags(), "--trained-students", str(flags["table"])])
    section = re.search(r'<section id="trained">.*?</section>', page.read_text(), re.DOTALL).group()
    assert section.count("<svg") == 1
    assert section.count("<tr>") == 1 + 3
    at = nearest(summary, 8 / 255)  # the synthetic run's threat
    worst = summary[(summary["group"] == "plain") & (summary["attack"] == "worst") & (summary["eps"] == at)].iloc[0]
    assert f">{percent(worst['robust_acc'])}<" in section


@pytest.mark.parametrize("net", ["vit", "wide_resnet", "resnet20_micro"])
def test_the_exported_student_is_the_measured_one(files, tmp_path, net):
    chosen = {"vit": {"family": "vit", "patch": 4, "layers": 1, "heads": 2, "hidden": 8, "mlp": 8}}
    chosen |= {"wide_resnet": {"family": "wide_resnet", "depth": 10, "widen": 1}}
    student = {"name": "s", "net": chosen.get(net, net), "loss": "pgd_at", "epochs": 1}
    rows, written = evaluated(files, tmp_path, student)
    splits = {split: load_split(files[split]) for split in ("train", "val", "test")}
    counts = {split: {"count": len(images), "checksum": images.checksum} for split, images in splits.items()}
    manifest = {"source": "digits", "classes": ["left", "right", "low"], "splits": counts}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    names = {"weights": "out.safetensors", "onnx": "a.onnx", "pt2": "a.pt2", "card": "card.md", "parity": "p.json"}
    names |= {"hub": "config.json", "labels": "labels.txt"}
    flags = {name: tmp_path / path for name, path in {**names, "checksums": "SHA256SUMS"}.items()}
    flags |= {"trained": written["weights"], "student": written["outcomes"], "test": files["test"]}
    argv = ["--settings", job_settings(config_of(student), "export_student"), "--threads", "1", "--device", "cpu"]
    argv += ["--manifest", str(tmp_path / "manifest.json"), "--budget", "s"]
    export_student.main([*argv, *(word for name, path in flags.items() for word in (f"--{name}", str(path)))])
    parity = json.loads(flags["parity"].read_text())
    assert parity["passed"]
    assert parity["onnx_test_accuracy"] == rows["clean_acc"].iloc[0]
    assert "trained by itself" in flags["card"].read_text()
    assert "Supernet" not in flags["card"].read_text()
    images = to_float(splits["test"].images)
    trained, *_ = load_static(written["weights"], kind="trained_student")
    with torch.no_grad():
        torch.testing.assert_close(load_student(flags["weights"])(images), trained(images), atol=1e-4, rtol=1e-4)
