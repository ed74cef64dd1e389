"""Teachers from files of other people: wrapped and renamed weights, other entries, invalid weights."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
import pytest
import torch

from proard.artifacts import ArtifactError, Provenance
from proard.config import ConfigError, WideResNet, job_settings, load
from proard.nets import FixedNet, load_static, load_trades, save_static
from proard.nets.wide import WideNet
from proard.space import FixedSpace
from proard.stages import train_teacher

WIDE = WideResNet(depth=10, widen=1, image_channels=1, image_size=8, classes=10)


def weights(*, prefixes=("",)):
    """A network, and its state dict under prefixes that the names take in turn."""
    torch.manual_seed(3)
    net = WideNet(WIDE).eval()
    return net, {f"{prefixes[i % len(prefixes)]}{name}": v for i, (name, v) in enumerate(net.state_dict().items())}


def refusal(path, saved) -> str:
    """The one-line error for a checkpoint."""
    torch.save(saved, path)
    with pytest.raises(ArtifactError) as caught:
        load_trades(path, image_size=8)
    line = str(caught.value)
    assert (str(path) in line, "\n" in line, "\x1b" in line) == (True, False, False)
    return line


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "net": state},
        lambda state: {"model": state, "optimizer": {"state": {}}},
        lambda state: {"model_state_dict": state},
        lambda state: {"model": {"state_dict": state}, "acc": 0.5},
    ],
    ids=["bare", "net", "model", "model_state_dict", "nested"],
)
@pytest.mark.parametrize(
    "prefixes",
    [("",), ("model.",), ("_orig_mod.",), ("module.module.",), ("module._orig_mod.", "model.module.", "")],
    ids=str,
)
def test_weights_are_found_under_usual_keys_and_prefixes(tmp_path, wrap, prefixes):
    net, state = weights(prefixes=prefixes)
    torch.save(wrap(state), tmp_path / "model.pt")
    found, *_ = load_trades(tmp_path / "model.pt", image_size=8)
    images = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(found(images), net(images))


def test_keys_are_listed_where_there_are_no_weights(tmp_path):
    line = refusal(tmp_path / "model.pt", {"student": weights()[1], "epoch": 3})
    assert "its keys are student, epoch; save only tensors" in line
    assert "no keys" in refusal(tmp_path / "model.pt", [torch.zeros(1)])
    _, state = weights()
    twice = {**state, "module.conv1.weight": state["conv1.weight"]}
    assert "contains conv1.weight twice" in refusal(tmp_path / "model.pt", twice)


@pytest.mark.parametrize(
    ("beside", "name"),
    [
        (np.float64(0.5), "a numpy number or array (numpy."),
        (np.zeros(2), "a numpy number or array (numpy."),
        (Namespace(lr=0.1), "class argparse.Namespace"),
    ],
    ids=["scalar", "array", "namespace"],
)
def test_what_lies_beside_the_weights_is_named_with_the_way_out(tmp_path, beside, name):
    line = refusal(tmp_path / "model.pt", {"state_dict": weights()[1], "beside": beside})
    assert name in line
    assert line.endswith("torch.save({name: value for name, value in model.state_dict().items()}, path)")
    assert "weights_only" not in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    net, state = weights()
    state["fc.weight"][1, 2] = value
    assert "fc.weight has 1 of 640 values that are NaN or infinite" in refusal(tmp_path / "model.pt", state)
    space = FixedSpace(WIDE)
    own = FixedNet(space, mean=[0.0], std=[1.0])
    own.module.load_state_dict(net.state_dict())
    path = tmp_path / "teacher.safetensors"
    save_static(path, own, space=space, arch=space.largest, kind="teacher", provenance=Provenance("r", "s"))
    with pytest.raises(ArtifactError, match=r"teacher\.safetensors: .*fc.weight has 1 of 640 values"):
        load_static(path, kind="teacher")


def test_a_checkpoint_of_torch_is_not_read_as_a_file_of_this_package(tmp_path):
    torch.save(weights()[1], tmp_path / "model.pt")
    config = load({"run": "r", "train_teacher": {"source": "file", "file": str(tmp_path / "model.pt")}})
    flags = [f"--{name}={tmp_path / name}" for name in ("train", "val", "teacher", "history")]
    with pytest.raises(ConfigError, match=r"model\.pt is a file of torch\.save; .*write source: trades"):
        train_teacher.main(["--settings", job_settings(config, "train_teacher"), "--device", "cpu", *flags])
