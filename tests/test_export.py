"""Export: the files are the measured network, need no other file, contain its facts; a difference is an error."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from export_runs import BUDGET, arguments, facts_of, onnx_logits, selected_student
from foreign import transparent, turned
from helpers import (
    TINY_DEEP,
    TINY_MOBILE,
    TINY_POOL,
    random_images,
    random_supernet,
    tiny_config,
    tiny_space,
)
from PIL import Image

import proard
from proard import cli
from proard.artifacts import ArtifactError, Provenance, read_header, read_table, sha256, write_table
from proard.artifacts.tables import STUDENT
from proard.config import UserError
from proard.data import ImageSet, load_split, preprocess, to_float
from proard.data.decode import decode_image
from proard.evaluation import Conditions, SubnetMeter
from proard.export import export_program, load_student, save_onnx
from proard.export.formats import OLDEST_RUNTIME
from proard.export.parity import check_parity, difference
from proard.nets import extract, fold, load_supernet, save_supernet
from proard.space import Arch
from proard.stages import export_student
from proard.stages.export_student import EXPORTED

SIDE = 16  # of the example's images in colour
ATTACKS = (
    {"name": "pgd3", "num_steps": 3, "step_size": 0.03},
    {"name": "cw3x2", "objective": "margin", "num_steps": 3, "step_size": 0.03, "restarts": 2},
)
CONFIG = tiny_config(
    verify_front={"attacks": ATTACKS},
    select_student={"candidates": 2, "attack": ATTACKS[0]},
    export_student={"license": "apache-2.0"},
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """A random supernet, images, and a student selected from all of its subnets."""
    return selected_student(tmp_path_factory.mktemp("inputs"), CONFIG, val=130, number=50)


@pytest.fixture(scope="module")
def exported(inputs, tmp_path_factory) -> Path:
    """The folder of an export of the whole stage."""
    folder = tmp_path_factory.mktemp("exported")
    export(inputs, folder)
    return folder


def export(inputs, folder, *, config=CONFIG, **changed):
    flags = {name: inputs[name] for name in ("student", "supernet", "train", "test", "manifest")}
    flags |= {"budget": BUDGET, **{name: folder / file for name, file in EXPORTED.items()}, **changed}
    export_student.main(arguments("export_student", config, **flags))


def chosen_arch(inputs) -> Arch:
    table = read_table(inputs["student"])
    return Arch.from_json(table.loc[table["chosen"].astype(bool), "arch"].iloc[0])


def measured_network(inputs):
    """The network as the measuring stages build it, written out."""
    supernet, checksum = load_supernet(inputs["supernet"], tiny_space())
    meter = SubnetMeter(
        supernet,
        checksum=checksum,
        train=load_split(inputs["train"]),
        conditions=Conditions(CONFIG.threat, CONFIG.measurement, 0),
    )
    return meter.student(chosen_arch(inputs))


def pixels_of(images: ImageSet) -> torch.Tensor:
    return to_float(images.images)


def test_the_folder_holds_its_files_and_no_external_weights(exported):
    assert sorted(path.name for path in exported.iterdir()) == sorted([*EXPORTED.values(), "costs.parquet"])


def test_the_weights_alone_give_exactly_the_measured_logits(inputs, exported):
    images = pixels_of(load_split(inputs["test"]))
    with torch.no_grad():
        expected = measured_network(inputs)(images)
        torch.testing.assert_close(load_student(exported / "student.safetensors")(images), expected, rtol=0, atol=0)
    header = read_header(exported / "student.safetensors")
    assert header["classes"] == ["left", "right", "low"]
    assert header["arch_id"] == chosen_arch(inputs).arch_id
    assert header["provenance"]["inputs"]["student.parquet"] == sha256(inputs["student"])


def test_one_line_loads_a_student_with_classes_card_and_preprocessing(inputs, exported, tmp_path):
    pixels = load_split(inputs["test"]).images[0, :, :, 0].numpy()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    for path in (exported, exported / "student.safetensors"):
        student = proard.load_student(path)
        assert student.classes == ("left", "right", "low")
        assert student.card == (exported / "card.md").read_text()
        with Image.open(tmp_path / "image.png") as image:
            found = student.preprocess(image)
        torch.testing.assert_close(found, pixels_of(load_split(inputs["test"]).first(1)), rtol=0, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(student(found), measured_network(inputs)(found), rtol=0, atol=0)
    with pytest.raises(ArtifactError, match=r"student\.safetensors does not exist"):
        proard.load_student(tmp_path)


def test_predict_names_the_class_of_every_image_file(inputs, exported, tmp_path, capsys):
    test = load_split(inputs["test"]).first(3)
    files = [str(tmp_path / f"{place}.png") for place in range(3)]
    for file, pixels in zip(files, test.images[..., 0].numpy(), strict=True):
        Image.fromarray(pixels).save(file)
    with torch.no_grad():
        shares = measured_network(inputs)(pixels_of(test)).softmax(1)
    expected = [
        f"{file}\t{['left', 'right', 'low'][int(row.argmax())]}\t{float(row.max()):.4f}"
        for file, row in zip(files, shares, strict=True)
    ]
    for path in (exported, exported / "student.onnx"):
        cli.main(["predict", str(path), *files])
        assert capsys.readouterr().out.splitlines() == expected
    (tmp_path / "no.png").write_text("no image")
    for arguments_of, words in (((exported, tmp_path / "no.png"), "no.png"), ((tmp_path, files[0]), "student.onnx")):
        with pytest.raises(SystemExit):
            cli.main(["predict", *map(str, arguments_of)])
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert words in message


def test_hubs_find_classes_and_input_beside_the_weights(exported):
    config = json.loads((exported / "config.json").read_text())
    assert (exported / "labels.txt").read_text().splitlines() == config["label_names"] == ["left", "right", "low"]
    assert (config["num_classes"], config["id2label"]["2"], config["label2id"]["low"]) == (3, "low", 2)
    expected = config["pretrained_cfg"]
    assert (expected["input_size"], expected["mean"], expected["std"]) == ([1, 8, 8], [0.0], [1.0])
    assert config["proard"]["arch_id"] == read_header(exported / "student.safetensors")["arch_id"]


@pytest.mark.parametrize("number", [1, 2, 13])
def test_every_batch_size_gives_the_measured_logits(inputs, exported, number):
    images = pixels_of(load_split(inputs["test"]).first(number)).contiguous()
    with torch.no_grad():
        expected = measured_network(inputs)(images)
        by_pt2 = torch.export.load(exported / "student.pt2").module()(images)
    torch.testing.assert_close(by_pt2, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(onnx_logits(exported / "student.onnx", images.numpy()), expected, rtol=0, atol=1e-5)


def test_onnx_describes_itself_and_names_no_source_file(inputs, exported):
    model = onnx.load(exported / "student.onnx")
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["classes"]) == ["left", "right", "low"]
    assert json.loads(facts["input_range"]) == [0, 1]
    assert json.loads(facts["threat"]) == {"norm": "linf", "eps": 0.1}
    assert Arch.from_json(facts["arch"]) == chosen_arch(inputs)
    assert int(facts["macs"]) == tiny_space().spec(chosen_arch(inputs)).macs
    assert facts["dataset"] == "digits"
    assert model.opset_import[0].version == CONFIG.export_student.opset
    (entry,) = model.graph.input
    assert [entry.name, model.graph.output[0].name] == ["images", "logits"]
    assert entry.type.tensor_type.shape.dim[0].dim_param
    with zipfile.ZipFile(exported / "student.pt2") as archive:
        inside = b"".join(archive.read(name) for name in archive.namelist())
    for content in ((exported / "student.onnx").read_bytes(), inside):
        assert b"subnet.py" not in content


def test_parity_record_says_what_was_compared(inputs, exported):
    parity = json.loads((exported / "parity.json").read_text())
    rows = read_table(inputs["student"])
    selected = rows[(rows["role"] == "choice") & (rows["split"] == "test")].iloc[0]
    assert parity["passed"] is True
    assert parity["num_images"] == 130
    assert parity["batch_sizes"] == [1, 40]
    assert parity["onnx_test_accuracy"] == parity["torch_test_accuracy"] == selected["clean_acc"]
    assert parity["selected_row_clean_acc"] == selected["clean_acc"]
    assert parity["onnx_top1_agreement"] == parity["adversarial"]["onnx_top1_agreement"] == 1
    assert 0 < parity["onnx_max_softmax_difference"] <= parity["tolerance"]
    assert parity["adversarial"]["num_images"] == 130
    assert (parity["budget"], parity["arch_id"], parity["macs"]) == (BUDGET, selected["arch_id"], selected["macs"])
    assert parity["bytes"] == {name: (exported / name).stat().st_size for name in list(EXPORTED.values())[:3]}
    assert 0 < parity["latency"]["median_ms"] <= parity["latency"]["p95_ms"]


def test_checksums_cover_every_other_file(exported):
    lines = [line.split("  ") for line in (exported / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in lines} == set(EXPORTED.values()) - {"SHA256SUMS"}
    for digest, name in lines:
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=exported, check=True, capture_output=True)


def test_the_card_quotes_the_rows_and_its_front_matter_is_yaml(inputs, exported):
    card = (exported / "card.md").read_text()
    _, front, body = card.split("---\n", 2)
    matter = yaml.safe_load(front)
    rows = read_table(inputs["student"])
    rows = rows[rows["chosen"].astype(bool)]
    worst = rows[(rows["split"] == "test") & (rows["attack"] == "worst")].iloc[0]
    assert matter["license"] == "apache-2.0"
    values = [entry["value"] for entry in matter["model-index"][0]["results"][0]["metrics"]]
    assert values == [round(worst["clean_acc"], 4), round(worst["robust_acc"], 4)]
    for _, row in rows.iterrows():
        (line,) = (line for line in body.splitlines() if line.startswith(_beginning(row)))
        low, high = row["robust_acc_low"], row["robust_acc_high"]
        assert line.endswith(f"{row['robust_acc']:.2%} [{low:.2%}, {high:.2%}] |")
    assert chosen_arch(inputs).arch_id in body
    assert "25.5/255" in body
    assert "logit margin (CW), 3 steps of 7.65/255, 2 restarts" in body


def _beginning(row):
    return f"| {row['split']} | {row['role']} | {row['attack']} |"


def test_the_example_of_the_card_sees_the_pixels_of_the_pipeline(exported, tmp_path):
    files = [turned(tmp_path / "turned.png"), transparent(tmp_path / "clear.png")]
    example = re.search(r"```python\n(.*?)```", (exported / "card.md").read_text(), re.DOTALL)[1]
    shutil.copy(exported / "student.onnx", tmp_path)
    guard = "import sys; sys.modules['torch'] = sys.modules['onnx'] = sys.modules['proard'] = None\n"
    save = f"\nfor path in sys.argv[1:]:\n    np.save(path, preprocess(Image.open(path), {SIDE}))\n"
    command = [sys.executable, "-c", guard + example + save, *(path.name for path in files)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    for path, line in zip(files, done.stdout.splitlines(), strict=True):
        np.testing.assert_array_equal(np.load(f"{path}.npy"), decode_image(path, "", size=SIDE))
        with Image.open(path) as image:
            pixels = torch.from_numpy(preprocess(image, 8, "L").copy())[None, ..., None]
        logits = onnx_logits(exported / "student.onnx", to_float(pixels))[0].astype(float)
        scores = np.exp(logits) / np.exp(logits).sum()
        name, score = line.removeprefix(f"{path.name} ").split()
        assert name == ["left", "right", "low"][scores.argmax()]
        assert float(score) == pytest.approx(scores.max(), abs=1e-4)


@pytest.fixture(scope="module")
def oldest_runtime(tmp_path_factory) -> Path:
    """A folder with the oldest onnxruntime that the card names for the default opset, and a NumPy of its time."""
    folder = tmp_path_factory.mktemp("runtime")
    wanted = [f"onnxruntime=={OLDEST_RUNTIME[CONFIG.export_student.opset]}.*", "numpy<2"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *wanted]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install {wanted[0]} here: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    return folder


def test_the_oldest_runtime_that_the_card_names_runs_the_file(inputs, exported, oldest_runtime, tmp_path):
    oldest = OLDEST_RUNTIME[CONFIG.export_student.opset]
    assert f"onnxruntime {oldest} or newer" in (exported / "card.md").read_text()
    assert f"onnxruntime {oldest} or newer" in (Path(__file__).parents[1] / "README.md").read_text()
    images = pixels_of(load_split(inputs["test"])).numpy()
    np.save(tmp_path / "images.npy", np.ascontiguousarray(images))
    code = f"""
import numpy, onnxruntime
assert onnxruntime.__version__.startswith("{oldest}."), onnxruntime.__version__
session = onnxruntime.InferenceSession("{exported / "student.onnx"}", providers=["CPUExecutionProvider"])
numpy.save("logits.npy", session.run(["logits"], {{"images": numpy.load("images.npy")}})[0])
"""
    environment = {**os.environ, "PYTHONPATH": str(oldest_runtime)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = onnx_logits(exported / "student.onnx", images)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("opset", "ir"), [(18, 8), (20, 9), (21, 10)])
def test_the_ir_version_is_the_lowest_that_the_opset_allows(tmp_path, opset, ir):
    space = tiny_space()
    net = fold(extract(random_supernet(space, dtype=torch.float32).eval(), space.smallest))
    save_onnx(tmp_path / "a.onnx", export_program(net), facts_of(space, space.smallest), opset=opset)
    assert onnx.load(tmp_path / "a.onnx").ir_version == ir


@pytest.mark.parametrize("settings", [TINY_DEEP, TINY_POOL, TINY_MOBILE], ids=lambda entry: entry["name"])
def test_older_opset_and_other_spaces_export_alike(settings, tmp_path):
    space = tiny_space(settings)
    net = fold(extract(random_supernet(space, dtype=torch.float32).eval(), space.smallest))
    save_onnx(tmp_path / "a.onnx", export_program(net), facts_of(space, space.smallest), opset=18)
    model = onnx.load(tmp_path / "a.onnx")
    assert model.opset_import[0].version == 18
    images = random_images(space, 5, dtype=torch.float32).contiguous()
    with torch.no_grad():
        expected = net(images)
    np.testing.assert_allclose(onnx_logits(tmp_path / "a.onnx", images.numpy()), expected, rtol=0, atol=1e-5)


def test_difference_finds_the_image_and_counts_near_ties_as_they_are():
    reference = np.zeros((4, 3), np.float32)
    reference[:, 0] = 5
    reference[2] = [1, np.nextafter(np.float32(1), np.float32(0)), 0]
    other = reference.copy()
    other[2] = other[2][[1, 0, 2]]  # the smallest possible change, but another class
    other[3, 1] += 3
    found = difference(reference, other)
    assert found.image == 3
    assert found.flipped == (2,)
    assert found.top1_agreement == 0.75
    assert 0 < found.margins[0] < 1e-6
    assert np.isnan(difference(reference, np.full_like(other, np.nan)).max_softmax)


def test_export_beyond_the_tolerance_is_refused_and_leaves_nothing(inputs, tmp_path):
    config = CONFIG.model_copy(update={"export_student": CONFIG.export_student.model_copy(update={"tolerance": 1e-12})})
    with pytest.raises(UserError, match=r"student.onnx is not the measured network: on test image \d+ .* by \d.*e-\d+"):
        export(inputs, tmp_path, config=config)
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_file_of_other_weights_is_refused(inputs, exported, tmp_path):
    net, test = load_student(exported / "student.safetensors"), load_split(inputs["test"])
    with torch.no_grad():
        logits = net(to_float(test.images))
    accuracy = float((logits.argmax(1) == test.labels).double().mean())
    net.head_bias[1] += 1
    facts = facts_of(tiny_space(), tiny_space().largest)
    save_onnx(tmp_path / "student.onnx", export_program(net), facts, opset=CONFIG.export_student.opset)
    files = {"weights": exported / "student.safetensors", "pt2": exported / "student.pt2"}
    how = {"eps": 0.1, "step_size": 0.05, "num_steps": 1, "tolerance": CONFIG.export_student.tolerance}
    how |= {"row_clean_acc": accuracy, "batch_size": 40, "seed": 0, "threads": 1}
    with pytest.raises(UserError, match="a class probability differs by"):
        check_parity(logits.numpy(), test, onnx=tmp_path / "student.onnx", **files, **how)


def test_a_supernet_that_changed_since_the_selection_is_refused(inputs, tmp_path):
    other = tmp_path / "supernet.safetensors"
    save_supernet(other, random_supernet(tiny_space(), seed=5, dtype=torch.float32), Provenance("tiny", "train_phase"))
    with pytest.raises(UserError, match=r"classifies \d+ of 130 test images correctly, the selected row has \d+"):
        export(inputs, tmp_path / "out", supernet=other)
    assert not (tmp_path / "out").exists()


def test_damaged_inputs_are_named(inputs, tmp_path):
    content = bytearray(inputs["supernet"].read_bytes())
    content[-8] ^= 0xFF
    damaged = tmp_path / "supernet.safetensors"
    damaged.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"supernet.safetensors is damaged.*checksum"):
        export(inputs, tmp_path, supernet=damaged)
    manifest = tmp_path / "manifest.json"
    manifest.write_text("{}")
    with pytest.raises(ArtifactError, match=r"manifest.json is no manifest of prepare_data"):
        export(inputs, tmp_path, manifest=manifest)
    with pytest.raises(ArtifactError, match=r"train.safetensors has checksum .*manifest.json says"):
        export(inputs, tmp_path, test=inputs["train"])


def test_a_table_of_another_budget_or_without_a_choice_is_refused(inputs, tmp_path):
    with pytest.raises(ArtifactError, match=r"is of budget macs=60K, not macs=1M; rerun select_student"):
        export(inputs, tmp_path, budget="macs=1M")
    table = read_table(inputs["student"])
    path = tmp_path / "student.parquet"
    write_table(path, table[table["role"] == "candidate"], STUDENT, Provenance("tiny", "select_student"))
    with pytest.raises(ArtifactError, match="1 chosen archs and 0 measurements of the choice on test"):
        export(inputs, tmp_path, student=path)


def test_load_student_refuses_other_files(inputs, exported, tmp_path):
    with pytest.raises(ArtifactError, match="contains 'supernet', expected student"):
        load_student(inputs["supernet"])
    cut = tmp_path / "student.safetensors"
    cut.write_bytes((exported / "student.safetensors").read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="truncated"):
        load_student(cut)
