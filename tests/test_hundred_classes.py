"""CIFAR-100 from the data set to the exported student: class names, sizes, tables and files have a hundred classes."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from export_runs import arguments, onnx_logits

from proard.artifacts import Provenance, read_header, read_table, write_table
from proard.artifacts.tables import PREDICTED
from proard.config import UserError, job_settings, load
from proard.data import load_split, to_float
from proard.export import load_student
from proard.space import SearchSpace
from proard.space.sampling import identity_columns
from proard.stages import export_student, prepare_data, select_student, train_phase, train_teacher
from proard.stages.export_student import EXPORTED

NAMES = [f"thing {index}" for index in range(100)]
QUICK = {"epochs": 1, "batch_size": 64, "attack": {"num_steps": 1}}
ATTACK = {"num_steps": 1}
CONFIG = load(
    {
        "run": "hundred",
        "space": "mobilenet_micro",
        "prepare_data": {"source": "cifar100", "val_fraction": 0.2},
        "measurement": {"recalibration_images": 100, "batch_size": 100},
        "validation": {"num_images": 100, "num_steps": 1},
        "train_teacher": {"objective": "pgd_at", **QUICK},
        "train_phase": {
            "phases": [{"name": "all", "loss": "alpha", "teacher": "dynamic", "archs_per_step": 2, **QUICK}]
        },
        "verify_front": {"attacks": [{"name": "pgd1", **ATTACK}]},
        "select_student": {"candidates": 1, "num_images": 100, "attack": ATTACK},
    }
)


class Hundred:
    """A stand-in for torchvision's CIFAR-100: five training images and two test images of each class."""

    base_folder = "cifar-100-python"

    def __init__(self, folder: str, *, train: bool, download: bool) -> None:
        self.targets = [index % 100 for index in range(500 if train else 200)]
        rng = np.random.default_rng(int(train))
        self.data = rng.integers(0, 256, (len(self.targets), 32, 32, 3), dtype=np.uint8)
        self.classes = NAMES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every file from the images to the exported student."""
    from torchvision import datasets

    folder = tmp_path_factory.mktemp("hundred")
    images = {name: folder / f"{name}.safetensors" for name in ("train", "val", "test")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "CIFAR100", Hundred)
        prepare_data.main(arguments("prepare_data", CONFIG, **images, manifest=folder / "manifest.json"))
    seen = {name: images[name] for name in ("train", "val")}
    teacher, supernet = folder / "teacher.safetensors", folder / "supernet.safetensors"
    train_teacher.main(arguments("train_teacher", CONFIG, **seen, teacher=teacher, history=folder / "teacher.parquet"))
    phase = arguments("train_phase", CONFIG, **seen, teacher=teacher, supernet=supernet, history=folder / "h.parquet")
    phase[1] = job_settings(CONFIG, "train_phase", phase="all")
    train_phase.main(phase)
    space, archive = SearchSpace(CONFIG.space), folder / "archive.parquet"
    columns = identity_columns(space, np.asarray([space.genotype(space.smallest)]))
    row = {name: values[0] for name, values in columns.items()}
    scores = {"predicted_clean_acc": 0.5, "predicted_robust_acc": 0.5, "found_by": "anchor"}
    write_table(archive, [{**row, **scores}], PREDICTED, Provenance("hundred", "search_front"))
    chosen = {"budget": "macs=1M", "student": folder / "student.parquet", "supernet": supernet}
    select_student.main(arguments("select_student", CONFIG, archive=archive, **images, **chosen))
    outputs = {name: folder / path for name, path in EXPORTED.items()}
    images.pop("val")
    manifest = {"manifest": folder / "manifest.json"}
    export_student.main(arguments("export_student", CONFIG, **chosen, **images, **manifest, **outputs))
    return folder


def test_the_split_holds_every_class_under_its_name(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["classes"] == NAMES
    counts = {
        name: np.bincount(load_split(folder / f"{name}.safetensors").labels).tolist() for name in ("train", "val")
    }
    assert counts == {"train": [4] * 100, "val": [1] * 100}


def test_losses_are_those_of_a_hundred_classes(folder):
    teacher = read_table(folder / "teacher.parquet").iloc[-1]
    assert 4 < teacher["loss"] < 8  # log(100) = 4.6: nothing can be learnt from noise
    assert read_header(folder / "teacher.safetensors")["space"]["classes"] == 100
    assert SearchSpace(CONFIG.space).spec(SearchSpace(CONFIG.space).largest).params > 379_000  # at 10 classes


def test_the_student_carries_the_names_and_is_the_measured_one(folder):
    model = onnx.load(folder / "student.onnx")
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["classes"]) == NAMES
    parity = json.loads((folder / "parity.json").read_text())
    assert parity["passed"]
    table = read_table(folder / "student.parquet")
    (row,) = table[(table["role"] == "choice") & (table["split"] == "test") & (table["attack"] == "pgd1")].iloc
    assert parity["onnx_test_accuracy"] == row["clean_acc"]
    assert "(100 in all)" in (folder / "card.md").read_text()
    pixels = to_float(load_split(folder / "test.safetensors").first(5).images).contiguous()
    logits = torch.from_numpy(onnx_logits(folder / "student.onnx", pixels.numpy()))
    assert logits.shape == (5, 100)
    with torch.no_grad():
        torch.testing.assert_close(load_student(folder / "student.safetensors")(pixels), logits, rtol=0, atol=1e-4)


def test_a_teacher_of_ten_classes_is_refused(folder, tmp_path):
    ten = load({"run": "ten", "space": "mobilenet_micro", "train_teacher": {"source": "file", "file": "T"}})
    settings = job_settings(ten, "train_teacher").replace('"T"', json.dumps(str(folder / "teacher.safetensors")))
    files = {name: folder / f"{name}.safetensors" for name in ("train", "val")}
    flags = arguments("train_teacher", CONFIG, **files, teacher=tmp_path / "t", history=tmp_path / "h")
    flags[1] = settings
    with pytest.raises(UserError, match="100 classes; this run has 3x32x32 of 10"):
        train_teacher.main(flags)
