"""MobileNets through the stages: trained, measured, searched, selected and exported."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from export_runs import arguments, facts_of, onnx_logits
from helpers import TINY_MOBILE, random_images, save_stripes, tiny_config

from proard.artifacts import read_header, read_table, write_json
from proard.config import PRESETS, job_settings
from proard.data import load_split
from proard.export import export_program, save_onnx
from proard.nets import StaticNet, fold, load_static, load_supernet
from proard.space import Arch, SearchSpace
from proard.stages import (
    evaluate_archs,
    export_student,
    fit_predictor,
    merge_table,
    sample_archs,
    search_front,
    select_student,
    train_phase,
    train_teacher,
)
from proard.stages.export_student import EXPORTED

ATTACK = {"num_steps": 2, "step_size": 0.05}
SPACE = {**TINY_MOBILE, "width": [0.5, 0.75, 1]}
CONFIG = tiny_config(
    space=SPACE,
    phase__name="kernel",
    phase__kernel=[5, 7],
    phase__epochs=1,
    train_teacher__epochs=1,
    sample_archs={"num_archs": 16, "strata": 4},
    evaluate_archs={"archs_per_shard": 16, "num_images": 20, "attack": ATTACK},
    fit_predictor={"models": ["ridge"], "held_out": 4, "folds": 2, "bootstraps": 10},
    search_front={"population": 8, "generations": 2},
    verify_front={"attacks": [{"name": "pgd2", **ATTACK}]},
    select_student={"candidates": 2, "attack": ATTACK},
)
BUDGET = "macs=90K"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All files of a run on the stripes."""
    folder = tmp_path_factory.mktemp("run")
    images = save_stripes(folder)
    file = {name: folder / f"{name}.parquet" for name in ("archs", "shard", "table", "quality", "archive", "front")}
    file |= {name: folder / f"{name}.safetensors" for name in ("teacher", "supernet", "predictor")}
    headers = {name: read_header(path) for name, path in images.items()}
    splits = {
        name: {"count": len(load_split(path)), "checksum": headers[name]["checksum"]} for name, path in images.items()
    }
    manifest = {"source": "digits", "classes": ["left", "right", "low"], "splits": splits}
    write_json(folder / "manifest.json", manifest)
    seen = {name: images[name] for name in ("train", "val")}
    net = {"supernet": file["supernet"]}

    def run(stage, name, **flags):
        stage.main(arguments(name, CONFIG, **flags))

    run(train_teacher, "train_teacher", **seen, teacher=file["teacher"], history=folder / "teacher.parquet")
    phase = arguments("train_phase", CONFIG, **seen, **net, teacher=file["teacher"], history=folder / "phase.parquet")
    phase[1] = job_settings(CONFIG, "train_phase", phase="kernel")
    train_phase.main(phase)
    run(sample_archs, "sample_archs", archs=file["archs"])
    run(evaluate_archs, "evaluate_archs", **net, archs=file["archs"], **seen, shard="0000-0015", table=file["shard"])
    run(merge_table, "merge_table", archs=file["archs"], shards=file["shard"], table=file["table"])
    quality = {"quality": file["quality"], "held-out": folder / "held_out.parquet"}
    run(fit_predictor, "fit_predictor", table=file["table"], predictor=file["predictor"], **quality)
    search = {name: file[name] for name in ("predictor", "table", "archive", "front")}
    run(search_front, "search_front", **search, history=folder / "search.parquet")
    chosen = {"budget": BUDGET, "student": folder / "student.parquet", **net}
    run(select_student, "select_student", archive=file["archive"], **images, **chosen)
    outputs = {name: folder / path for name, path in EXPORTED.items()}
    splits = {name: images[name] for name in ("train", "test")}
    run(export_student, "export_student", **chosen, **splits, manifest=folder / "manifest.json", **outputs)
    return folder


def test_a_phase_leaves_the_transforms_alone_that_it_does_not_open(folder):
    space = SearchSpace(CONFIG.space)
    net, _ = load_supernet(folder / "supernet.safetensors", space)
    transforms = net.layers["unit2_block1_depthwise"].transforms
    moved = {name: float((value.detach() - torch.eye(len(value))).abs().max()) for name, value in transforms.items()}
    assert moved["to5"] > 1e-4
    assert moved["to3"] == 0
    assert read_header(folder / "supernet.safetensors")["opened"] == [{"kernel": [5, 7]}]
    teacher, _, arch, _ = load_static(folder / "teacher.safetensors", kind="teacher")
    assert arch == space.largest
    assert not any("transforms" in name for name in teacher.state_dict())


def test_tables_hold_mobilenets_with_their_kernels_and_costs(folder):
    space, table = SearchSpace(CONFIG.space), read_table(folder / "table.parquet")
    assert len(table) == 16
    for _, row in table.iterrows():
        arch = Arch.from_json(row["arch"])
        assert (row["macs"], row["params"]) == (space.spec(arch).macs, space.spec(arch).params)
        assert tuple(row["genotype"]) == space.genotype(arch)
        assert len(arch.kernel) == 3
    assert {side for text in table["arch"] for side in Arch.from_json(text).kernel} == {0, 3, 5, 7}


def test_the_exported_student_is_the_measured_one(folder):
    parity = json.loads((folder / "parity.json").read_text())
    assert parity["passed"]
    table = read_table(folder / "student.parquet")
    (row,) = table[(table["role"] == "choice") & (table["split"] == "test") & (table["attack"] == "pgd2")].iloc
    assert row["macs"] <= 90e3
    assert parity["onnx_test_accuracy"] == row["clean_acc"]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_space_exports_its_smallest_student(name, tmp_path):
    side = min(PRESETS[name].image_size, 64)
    space = SearchSpace(PRESETS[name].model_copy(update={"image_size": side, "classes": 10}))
    net = fold(StaticNet(space.spec(space.smallest)).eval())  # fresh weights: a supernet is not needed for them
    save_onnx(tmp_path / "a.onnx", export_program(net), facts_of(space, space.smallest), opset=20)
    images = random_images(space, 3, dtype=torch.float32).contiguous()
    with torch.no_grad():
        expected = torch.softmax(net(images), 1)
    found = torch.softmax(torch.from_numpy(onnx_logits(tmp_path / "a.onnx", images.numpy())), 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
