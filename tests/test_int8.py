"""int8 students: the folded normalisation, the file's range, its twin, and what the stage measures and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_runs import BUDGET, arguments, facts_of, onnx_logits
from helpers import SMALL_SPACES, TINY, random_images, random_supernet, save_stripes, tiny_config, tiny_space
from onnx import numpy_helper

from proard.artifacts import Provenance, read_metadata, read_table
from proard.config import Attack, Augmentation, Int8Training, Threat, UserError
from proard.data import ImageSet, load_split, to_float
from proard.evaluation import attack_images
from proard.evaluation.deployed import OnDevice, on_pixel_grid, paired
from proard.export import export_program, load_student, save_onnx, save_student
from proard.export.int8 import (
    OTHER_RANGES,
    PADDED,
    Recipe,
    check_range,
    fold_normalisation,
    quantise,
    ranges_of,
    with_weights,
)
from proard.export.int8_card import int8_block
from proard.export.int8_training import FakeQuantised, train_int8
from proard.export.twin import Scaled, Twin
from proard.nets import extract, fold, save_static
from proard.stages import quantize_student

ATTACKS = ({"name": "pgd3", "num_steps": 3, "step_size": 0.05}, {"name": "cw3", "objective": "margin", "num_steps": 3})
SETTINGS = {"verify_front": {"attacks": ATTACKS}, "quantize_student": {"queries": 20, "calibration_images": 64}}
CONFIG = tiny_config(**SETTINGS)
SHORT = {"steps": 6, "batch_size": 32, "lr": 1e-3, "num_steps": 2}
RECIPES = (Recipe("reduced"), *OTHER_RANGES, Recipe("reduced").with_float_ends())


def exported(folder: Path, settings: dict = TINY) -> tuple[Path, torch.nn.Module]:
    """A random student as ONNX and safetensors, and the network."""
    space = tiny_space(settings)
    net = fold(extract(random_supernet(space, dtype=torch.float32).eval(), space.largest)).eval()
    facts = facts_of(space, space.largest)
    save_student(folder / "student.safetensors", net, facts)
    save_onnx(folder / "student.onnx", export_program(net), facts, opset=20)
    return folder / "student.onnx", net


@pytest.fixture(scope="module", params=SMALL_SPACES, ids=lambda space: space["name"])
def student(request, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A student of every kind of space, with images that its border sees."""
    path, _ = exported(tmp_path_factory.mktemp("student"), request.param)
    images = random_images(tiny_space(request.param), 64, dtype=torch.float32)
    images[:2] = torch.tensor([0.0, 1.0])[:, None, None, None]
    return path, (255 * images).round() / 255


def test_folded_normalisation_is_exact_at_the_border_too(student, tmp_path):
    path, images = student
    folded = fold_normalisation(onnx.load(path))
    onnx.save(folded, tmp_path / "folded.onnx")
    expected, found = (onnx_logits(file, images.numpy()) for file in (path, tmp_path / "folded.onnx"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    kinds = [node.op_type for node in folded.graph.node]
    assert kinds[0] == "Pad"
    assert kinds.count("Conv") == [node.op_type for node in onnx.load(path).graph.node].count("Conv")
    first = next(node for node in folded.graph.node if PADDED in node.input)
    weights = next(entry for entry in folded.graph.initializer if entry.name == first.input[1])
    shifted = numpy_helper.to_array(weights).copy()
    shifted[:, -1] = 0  # the same sum in the bias alone is right only where no tap lies in the padding
    bias = next(entry for entry in folded.graph.initializer if entry.name == first.input[2])
    in_bias = numpy_helper.to_array(bias) + numpy_helper.to_array(weights)[:, -1].sum((1, 2))
    weights.CopyFrom(numpy_helper.from_array(shifted, weights.name))
    bias.CopyFrom(numpy_helper.from_array(in_bias, bias.name))
    onnx.save(folded, tmp_path / "bias.onnx")
    assert np.abs(onnx_logits(tmp_path / "bias.onnx", images.numpy()) - expected).max() > 1e-3


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_twin_gives_the_runtimes_logits(student, recipe, tmp_path):
    path, images = student
    quantise(fold_normalisation(onnx.load(path)), tmp_path / "int8.onnx", images.numpy(), recipe)
    twin = Twin(tmp_path / "int8.onnx")
    expected = torch.from_numpy(onnx_logits(tmp_path / "int8.onnx", images.numpy()))
    with torch.no_grad():
        found = twin(images)
    span = float(expected.max() - expected.min())
    assert float((found - expected).abs().max()) <= 0.03 * span
    assert float((found.argmax(1) == expected.argmax(1)).double().mean()) >= 0.98
    gradient = torch.autograd.grad(twin(images.requires_grad_()).logsumexp(1).sum(), images)[0]
    images.requires_grad_(False)
    assert float(gradient.flatten(1).abs().amax(1).min()) > 0


@pytest.mark.parametrize("count", [64, 70, 67])
def test_any_number_of_images_calibrates_by_percentile(count, tmp_path):
    path, _ = exported(tmp_path)
    images = random_images(tiny_space(TINY), count, dtype=torch.float32).contiguous().numpy()
    quantise(fold_normalisation(onnx.load(path)), tmp_path / "int8.onnx", images, OTHER_RANGES[0])
    assert (tmp_path / "int8.onnx").stat().st_size > 0


def test_the_twin_equals_integer_kernels_bit_for_bit(tmp_path):
    path, _ = exported(tmp_path)
    images = random_images(tiny_space(), 200, dtype=torch.float32)
    quantise(fold_normalisation(onnx.load(path)), tmp_path / "int8.onnx", images.numpy(), Recipe("reduced"))
    with torch.no_grad():
        found = Twin(tmp_path / "int8.onnx")(images).numpy()
    np.testing.assert_array_equal(found, onnx_logits(tmp_path / "int8.onnx", images.numpy()))


def test_pixels_of_8_bits_enter_without_loss_and_others_are_rounded_to_them(tmp_path):
    path, _ = exported(tmp_path)
    images = random_images(tiny_space(), 40, dtype=torch.float32)
    quantise(fold_normalisation(onnx.load(path)), tmp_path / "int8.onnx", images.numpy(), Recipe("reduced"))
    model = onnx.load(tmp_path / "int8.onnx")
    values = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    first = next(node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "images")
    assert values[first.input[1]] == np.float32(1 / 255)
    assert (values[first.input[2]], values[first.input[2]].dtype) == (0, np.uint8)
    grid = on_pixel_grid(images, images, eps=0.1)
    logits = [onnx_logits(tmp_path / "int8.onnx", batch.numpy()) for batch in (images, grid)]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_no_sum_saturates_without_vnni(recipe, tmp_path):
    path, _ = exported(tmp_path)
    images = random_images(tiny_space(), 40, dtype=torch.float32)
    quantise(fold_normalisation(onnx.load(path)), tmp_path / "int8.onnx", images.numpy(), recipe)
    model = onnx.load(tmp_path / "int8.onnx")
    check_range(model)
    weights = [
        entry
        for entry in model.graph.initializer
        if entry.data_type == onnx.TensorProto.INT8 and len(entry.dims) > 1 and entry.name.endswith("_quantized")
    ]
    largest = max(np.abs(numpy_helper.to_array(entry).astype(int)).max() for entry in weights)
    if recipe.signed:
        assert largest == 127
        return
    assert 2 * 255 * largest < 2**15
    full = numpy_helper.to_array(weights[0]).copy()
    full.flat[0] = 127
    weights[0].CopyFrom(numpy_helper.from_array(full, weights[0].name))
    with pytest.raises(UserError, match="saturate"):
        check_range(model)


def test_only_the_runtime_decides_which_images_are_lost():
    images, labels = torch.rand(6, 1, 4, 4), torch.zeros(6, dtype=torch.int64)
    right = lambda batch: torch.stack([batch.square().sum((1, 2, 3)), -batch.square().sum((1, 2, 3))], 1)  # noqa: E731
    wrong = lambda batch: -right(batch)  # noqa: E731
    how = {"attack": Attack(num_steps=2), "eps": 0.1, "accounting": "any_iterate", "seed": 0, "batch_size": 4}
    correct = torch.ones(6, dtype=torch.bool)
    assert attack_images(OnDevice(right, wrong), images, labels, correct, **how).robust.all()
    assert not attack_images(OnDevice(wrong, right), images, labels, correct, **how).robust.any()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """The files of an export, and a teacher."""
    folder = tmp_path_factory.mktemp("inputs")
    onnx_file, _ = exported(folder)
    space = tiny_space()
    teacher = extract(random_supernet(space, seed=1, dtype=torch.float32).eval(), space.largest)
    made_by = Provenance("tiny", "train_teacher")
    save_static(
        folder / "teacher.safetensors", teacher, space=space, arch=space.largest, kind="teacher", provenance=made_by
    )
    files = {"onnx": onnx_file, "weights": folder / "student.safetensors", "teacher": folder / "teacher.safetensors"}
    return files | save_stripes(folder)


def run_stage(inputs: dict[str, Path], folder: Path, config=CONFIG) -> dict[str, Path]:
    written = {"int8": folder / "student.int8.onnx", "table": folder / "table.parquet", "card": folder / "card.md"}
    quantize_student.main(arguments("quantize_student", config, budget=BUDGET, **inputs, **written))
    return written


@pytest.fixture(scope="module")
def done(inputs, tmp_path_factory) -> dict[str, Path]:
    return run_stage(inputs, tmp_path_factory.mktemp("done"))


def test_the_table_pairs_float_and_int8_on_every_image(done, inputs):
    table = read_table(done["table"])
    test = table[table["split"] == "test"].set_index(["precision", "attack"])
    names = ["pgd3", "cw3", "scaled", "transfer", "from_teacher", "rounded", "square", "worst", "union"]
    for precision in ("float32", "int8"):
        assert list(test.loc[precision].index) == names
        masks = {name: np.array(test.loc[(precision, name), "robust"]) for name in names}
        np.testing.assert_array_equal(masks["worst"], masks["pgd3"] & masks["cw3"])
        np.testing.assert_array_equal(masks["union"], np.logical_and.reduce([masks[name] for name in names[:-2]]))
    before, after = (np.array(test.loc[(precision, "union"), "robust"]) for precision in ("float32", "int8"))
    row = test.loc[("int8", "union")]
    assert (row["lost"], row["gained"]) == ((before & ~after).sum(), (after & ~before).sum())
    assert row["difference"] == pytest.approx(after.mean() - before.mean())
    assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    labels = load_split(inputs["test"]).labels.numpy()
    logits = onnx_logits(done["int8"], to_float(load_split(inputs["test"]).images).numpy())
    np.testing.assert_array_equal(np.array(row["clean"]), logits.argmax(1) == labels)
    assert row["bytes"] == done["int8"].stat().st_size
    assert min(row["agreement_clean"], row["agreement_adversarial"]) >= CONFIG.quantize_student.min_agreement
    assert row["calibration_images"] == 64
    machine = read_metadata(done["table"])["machine"]
    assert machine["runtime"].startswith("onnxruntime ")
    assert " ".join(machine["cpu_flags"]) == row["cpu_flags"]


def test_the_card_tells_the_tables_figures(done):
    table = read_table(done["table"])
    text = done["card"].read_text()
    assert text == int8_block(table)
    row = table[(table["split"] == "test") & (table["precision"] == "int8") & (table["attack"] == "union")].iloc[0]
    assert f"{row['robust_acc']:.2%}" in text
    assert row["cpu_flags"] in text


def test_the_int8_file_keeps_the_facts_of_the_student(done):
    facts = {entry.key: entry.value for entry in onnx.load(done["int8"]).metadata_props}
    assert json.loads(facts["classes"]) == ["left", "right", "low"]
    assert facts["budget"] == BUDGET


def test_the_file_depends_on_images_of_train_alone(done, inputs, tmp_path):
    others = save_stripes(tmp_path, train=192, val=45)
    changed = run_stage({**inputs, "val": others["val"], "test": others["test"]}, tmp_path / "a")
    assert changed["int8"].read_bytes() == done["int8"].read_bytes()
    changed = run_stage({**inputs, "train": others["test"]}, tmp_path / "b")
    assert changed["int8"].read_bytes() != done["int8"].read_bytes()


def test_the_first_images_of_test_are_measured_where_a_number_is_set(inputs, tmp_path):
    config = tiny_config(**{**SETTINGS, "quantize_student": {**SETTINGS["quantize_student"], "num_images": 10}})
    table = read_table(run_stage(inputs, tmp_path, config)["table"])
    assert set(table.loc[table["split"] == "test", "num_images"]) == {10}


def test_a_twin_that_is_not_the_file_stops_the_stage(inputs, tmp_path, monkeypatch):
    forward = Twin.forward
    monkeypatch.setattr(Twin, "forward", lambda self, images: -forward(self, images))
    with pytest.raises(
        UserError, match=r"student\.int8\.onnx: twin and runtime give the same class on .*min_agreement"
    ):
        run_stage(inputs, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name != "costs.parquet"]


TRIED = {
    ("range", "ends"): ["reduced", "percentile", "signed", "percentile_ends"],
    ("training", "ends", "range"): ["reduced", "reduced_trained", "reduced_trained_ends", "percentile", "signed"],
}


@pytest.mark.parametrize("repairs", TRIED, ids="-".join)
def test_repairs_are_tried_where_val_loses_too_much_and_the_best_is_kept(inputs, tmp_path, monkeypatch, repairs):
    worst_case = quantize_student.Quantisation.worst_case

    def pessimist(self, net, images):
        found = worst_case(self, net, images)
        if isinstance(net, OnDevice):  # int8 loses every image, but for the second way to quantise
            self.seen = getattr(self, "seen", 0) + 1
            found["worst"]["robust"] = found["worst"]["clean"] & (self.seen == 2)
        else:
            found["worst"]["robust"] = np.ones_like(found["worst"]["robust"])
        return found

    monkeypatch.setattr(quantize_student.Quantisation, "worst_case", pessimist)
    before = inputs["onnx"].read_bytes()
    config = tiny_config(**SETTINGS, quantize_student__repairs=repairs, quantize_student__training=SHORT)
    written = run_stage(inputs, tmp_path, config)
    table, expected = read_table(written["table"]), TRIED[repairs]
    tried = table[(table["split"] == "val") & (table["precision"] == "int8")]
    assert list(tried["variant"]) == expected
    assert list(tried["chosen"]) == [False, True] + [False] * (len(expected) - 2)
    assert set(table.loc[(table["split"] == "test") & (table["precision"] == "int8"), "variant"]) == {expected[1]}
    trains = "training" in repairs
    assert ("trained further" in written["card"].read_text()) == trains
    costs = read_table(tmp_path / "costs.parquet").iloc[0]
    images = SHORT["steps"] * SHORT["batch_size"] if trains else 0
    assert costs["weight_gradients"] == images
    assert costs["train_forward_equivalents"] == images * (2 * SHORT["num_steps"] + 7)
    assert inputs["onnx"].read_bytes() == before


def test_pairs_are_counted_and_tested():
    first, second = np.array([1, 1, 1, 0, 0], bool), np.array([0, 0, 1, 1, 0], bool)
    found = paired(first, second, seed=0)
    assert (found["lost"], found["gained"]) == (2, 1)
    assert found["difference"] == pytest.approx(-0.2)
    assert found["mcnemar_p"] == 1.0


@pytest.mark.parametrize("recipe", [RECIPES[0], RECIPES[2].with_float_ends()], ids=lambda recipe: recipe.name)
def test_the_trained_network_is_the_twin_of_the_file_that_its_weights_give(student, recipe, tmp_path):
    path, images = student
    model, first, second = fold_normalisation(onnx.load(path)), tmp_path / "first.onnx", tmp_path / "second.onnx"
    quantise(model, first, images.numpy(), recipe)
    net = FakeQuantised(first, model, recipe)
    with torch.no_grad():
        torch.testing.assert_close(net(images), Twin(first)(images), rtol=0, atol=1e-5)
        generator = torch.Generator().manual_seed(0)
        for weight in net.weights.values():
            weight += 0.05 * weight.abs().max() * torch.randn(weight.shape, generator=generator)
    quantise(with_weights(model, net.arrays()), second, images[:8].numpy(), recipe, ranges=ranges_of(first))
    assert [each.tolist() for pair in ranges_of(second).values() for each in pair] == [
        each.tolist() for pair in ranges_of(first).values() for each in pair
    ]
    with torch.no_grad():
        found, expected = net(images), Twin(second)(images)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert float((found - Twin(first)(images)).abs().max()) > 0.01


@pytest.fixture
def fake(inputs, tmp_path) -> tuple[FakeQuantised, torch.nn.Module]:
    """A random student as it is trained in int8, and its float network."""
    model, images = fold_normalisation(onnx.load(inputs["onnx"])), to_float(load_split(inputs["train"]).images)
    quantise(model, tmp_path / "int8.onnx", images.contiguous().numpy(), RECIPES[0])
    return FakeQuantised(tmp_path / "int8.onnx", model, RECIPES[0]), load_student(inputs["weights"])


def test_rounding_of_weights_passes_the_gradient_on(fake):
    net, _ = fake
    images = random_images(tiny_space(), 8, dtype=torch.float32)
    leaves = {
        name: Scaled(value.integers.detach().requires_grad_(), value.scale) for name, value in net.rounded().items()
    }
    net.twin(images, leaves).logsumexp(1).sum().backward()
    net(images).logsumexp(1).sum().backward()
    places = {layer.weight: layer.float_weight for layer in net.layers}
    places |= {layer.bias: layer.float_bias for layer in net.layers if layer.bias}
    assert len(places) == len(leaves) == len(net.weights)
    for place, name in places.items():
        integers, weight = leaves[place].integers, net.weights[name]
        scale = leaves[place].scale.view([-1] + [1] * (integers.dim() - 1))
        torch.testing.assert_close(weight.grad, integers.grad / scale, rtol=1e-4, atol=1e-6)
        assert weight.grad.abs().max() > 0


def train_briefly(net: FakeQuantised, teacher, train: ImageSet, seed: int = 0, **settings) -> list:
    return train_int8(
        net,
        teacher,
        train,
        settings=Int8Training(**{**SHORT, **settings}),
        threat=Threat(),
        augment=Augmentation(crop_padding=1, flip=False),
        macs=1.0,
        seed=seed,
    )[0]


def test_training_lowers_the_loss_and_depends_on_the_seed_alone(fake, inputs):
    net, teacher = fake
    train = load_split(inputs["train"])
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for weight in net.weights.values():
            weight += 0.1 * weight.abs().max() * torch.randn(weight.shape, generator=generator)
    start, ends = {name: weight.detach().clone() for name, weight in net.weights.items()}, []
    for seed in (0, 0, 1):
        with torch.no_grad():
            for name, weight in net.weights.items():
                weight.copy_(start[name])
        losses = train_briefly(net, teacher, train, seed, steps=12, lr=1e-2)
        assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
        ends.append(torch.cat([weight.detach().flatten() for weight in net.weights.values()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)
    assert (ends[0] != ends[2]).any()


def test_a_loss_that_is_not_finite_stops_the_training_before_a_weight_moves(fake, inputs):
    net, teacher = fake
    before = net.arrays()
    with pytest.raises(UserError, match=r"quantize_student\.training: the loss of step 0 is nan; lower lr"):
        train_briefly(net, lambda images: torch.nan * teacher(images), load_split(inputs["train"]))
    for name, weight in net.arrays().items():
        np.testing.assert_array_equal(weight, before[name])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"repairs": ["train"]}, r"quantize_student\.repairs"),
        ({"repairs": ["training", "training"]}, "different repairs"),
        ({"training": {"epochs": 3}}, r"quantize_student\.training\.epochs"),
        ({"training": {"num_steps": 0}}, r"quantize_student\.training\.num_steps is 0"),
    ],
)
def test_wrong_settings_of_repairs_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        tiny_config(quantize_student=changes)
