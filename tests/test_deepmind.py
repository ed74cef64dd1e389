"""Teachers from checkpoints in the layout of DeepMind's code on adversarial robustness."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from export_runs import arguments
from helpers import save_stripes, tiny_config

from proard.artifacts import ArtifactError
from proard.config import ConfigError, DeepMindPreActResNet, DeepMindWideResNet, load
from proard.data import load_split, to_float
from proard.nets import fold, load_deepmind, load_static
from proard.nets.deepmind import build
from proard.space import FixedSpace
from proard.stages import train_teacher

SHAPE = {"image_channels": 3, "image_size": 8, "classes": 10}
WIDE = DeepMindWideResNet(depth=10, widen=1, **SHAPE)
DEEP = DeepMindWideResNet(depth=16, widen=2, activation="relu", **SHAPE)
PREACT = DeepMindPreActResNet(counts=(1, 2, 1, 1), widths=(4, 4, 6, 8), **SHAPE)
EACH = pytest.mark.parametrize("settings", [WIDE, DEEP, PREACT], ids=["wide", "deep", "preact"])


def published(path, settings, *, change=None, pixels=True):
    """A checkpoint of random weights and statistics, and its tensors."""
    torch.manual_seed(3)
    tensors = {name: value.clone() for name, value in build(settings).state_dict().items()}
    for name, value in tensors.items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif name.endswith("running_mean") or (value.ndim == 1 and value.is_floating_point()):
            value.normal_()
    if pixels:
        tensors |= {"mean": torch.rand(3, 1, 1), "std": torch.rand(3, 1, 1) + 0.5}
    if change:
        change(tensors)
    torch.save({f"module.{name}": value for name, value in tensors.items()}, path)
    return tensors


def plain_logits(tensors, settings, images):
    """The logits, written out layer by layer from the names of the tensors."""
    act = F.silu if settings.activation == "silu" else F.relu

    def norm(x, name):
        stats = (tensors[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *stats)

    def conv(x, name, stride):
        weight = tensors[f"{name}.weight"]
        if weight.shape[-1] == 3:
            x = F.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))
        return F.conv2d(x, weight, stride=stride)

    x = (images - tensors["mean"]) / tensors["std"]
    wide = "init_conv.weight" in tensors
    x = conv(x, "init_conv" if wide else "conv_2d", 1)
    first, second = ("conv_0", "conv_1") if wide else ("conv_2d_1", "conv_2d_2")
    found = [re.match(r"(layer[._](\d)\.(?:block\.)?(\d+))\.", name) for name in tensors]
    blocks = sorted({(int(each[2]), int(each[3]), each[1]) for each in found if each})
    for group, block, name in blocks:
        stride = 2 if group and not block else 1
        active = act(norm(x, f"{name}.batchnorm_0"))
        out = act(norm(conv(active, f"{name}.{first}", stride), f"{name}.batchnorm_1"))
        out = conv(out, f"{name}.{second}", 1)
        side = conv(active if wide else x, f"{name}.shortcut", stride) if f"{name}.shortcut.weight" in tensors else x
        x = out + side
    return F.linear(act(norm(x, "batchnorm")).mean((2, 3)), tensors["logits.weight"], tensors["logits.bias"])


@EACH
def test_a_checkpoint_gives_the_logits_of_its_layers(tmp_path, settings):
    tensors, images = published(tmp_path / "model.pt", settings), torch.rand(4, 3, 8, 8)
    net, space, _ = load_deepmind(tmp_path / "model.pt", image_size=8, activation=settings.activation)
    with torch.no_grad():
        torch.testing.assert_close(net(images), plain_logits(tensors, settings, images), rtol=1e-4, atol=1e-4)
    known = space.settings.model_dump() | {"name": settings.name}
    assert known == settings.model_dump()


@EACH
def test_macs_and_parameters_are_counted(settings):
    net = build(settings).eval()
    macs = []

    def count(module, inputs, output):
        macs.append(module.weight.numel() * (output[0, 0].numel() if output.ndim == 4 else 1))

    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        net(torch.rand(1, 3, 8, 8))
    spec = FixedSpace(settings).spec(FixedSpace(settings).largest)
    assert spec.macs == sum(macs)
    assert spec.params == sum(parameter.numel() for parameter in net.parameters())


def test_the_published_sizes():
    wide, preact = (FixedSpace(each) for each in (DeepMindWideResNet(depth=28), DeepMindPreActResNet()))
    assert round(wide.spec(wide.largest).params / 1e6, 1) == 36.5
    assert round(preact.spec(preact.largest).params / 1e6, 1) == 12.5  # 3x3 shortcuts: more than 11.2


def test_pixel_statistics_that_are_missing_are_those_of_the_data_set(tmp_path):
    published(tmp_path / "model.pt", WIDE, pixels=False)
    net, *_ = load_deepmind(tmp_path / "model.pt", image_size=8, activation="silu")
    assert net.mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    published(tmp_path / "model.pt", WIDE.model_copy(update={"classes": 7}), pixels=False)
    with pytest.raises(ArtifactError, match="lacks mean and std, which are known only for CIFAR-10 and CIFAR-100"):
        load_deepmind(tmp_path / "model.pt", image_size=8, activation="silu")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("layer.1.block.0.conv_1.weight"), "lacks layer.1.block.0.conv_1.weight"),
        (lambda t: t.update({"layer.3.x": torch.zeros(1)}), "holds layer.3.x"),
        (lambda t: t.update({"logits.weight": torch.zeros(3, 4)}), "logits.weight has shape (3, 4), expected (10, 64)"),
        (lambda t: t.pop("init_conv.weight"), "is no ResNet as DeepMind's code saves it"),
        (lambda t: t.pop("logits.bias"), "is no ResNet as DeepMind's code saves it"),
    ],
    ids=["missing", "strange", "shape", "other", "no head"],
)
def test_a_checkpoint_that_is_not_what_it_should_be_is_refused(tmp_path, change, words):
    published(tmp_path / "model.pt", WIDE, change=change)
    with pytest.raises(ArtifactError) as caught:
        load_deepmind(tmp_path / "model.pt", image_size=8, activation="silu")
    assert words in str(caught.value)
    assert "model.pt" in str(caught.value)


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_the_stage_finds_the_activation_that_a_teacher_was_trained_with(tmp_path, capsys, activation):
    shape = {"image_channels": 1, "image_size": 8, "classes": 3}
    settings = DeepMindWideResNet(depth=10, widen=1, activation=activation, **shape)
    files = save_stripes(tmp_path)
    train, val = (load_split(files[split]) for split in ("train", "val"))
    pixels = {"mean": torch.full((1, 1, 1), 0.3), "std": torch.full((1, 1, 1), 0.4)}
    torch.manual_seed(0)
    net = build(settings)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(12):
        logits = net((to_float(train.images) - pixels["mean"]) / pixels["std"])
        optimizer.zero_grad()
        F.cross_entropy(logits, train.labels).backward()
        optimizer.step()
    torch.save({"model_state_dict": {**net.state_dict(), **pixels}}, tmp_path / "model.pt")
    teacher = {"source": "deepmind", "file": str(tmp_path / "model.pt")}
    written = {"teacher": tmp_path / "teacher.safetensors", "history": tmp_path / "history.parquet"}
    flags = {"train": files["train"], "val": files["val"], **written}
    train_teacher.main(arguments("train_teacher", tiny_config(train_teacher=teacher), **flags))
    loaded, space, *_ = load_static(written["teacher"], kind="teacher")
    assert space.settings.activation == activation
    images = to_float(val.images)
    with torch.no_grad():
        expected = net.eval()((images - pixels["mean"]) / pixels["std"])
        torch.testing.assert_close(fold(loaded)(images), expected, rtol=1e-4, atol=1e-4)
    right = float((expected.argmax(1) == val.labels).float().mean())
    loss = float(F.cross_entropy(expected, val.labels))
    said = capsys.readouterr().out
    assert f"{right:.1%} and {loss:.2g} nats with {activation}" in said
    assert said.splitlines()[0].endswith(f"on 30 clean images of val; taken: {activation}")


def test_a_teacher_for_other_images_is_refused(tmp_path):
    published(tmp_path / "model.pt", WIDE)
    files, teacher = save_stripes(tmp_path), {"source": "deepmind", "file": str(tmp_path / "model.pt")}
    flags = {"train": files["train"], "val": files["val"], "teacher": tmp_path / "t", "history": tmp_path / "h"}
    with pytest.raises(ConfigError, match=r"is for 3x8x8 images of 10 classes; this run has 1x8x8 of 3"):
        train_teacher.main(arguments("train_teacher", tiny_config(train_teacher=teacher), **flags))
    with pytest.raises(ConfigError, match=r"source deepmind needs `file`: the path of a checkpoint in DeepMind's"):
        load({"run": "r", "train_teacher": {"source": "deepmind"}})
