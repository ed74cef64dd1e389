"""Sorting channels by importance: the subnets it does not change, the order it makes, its phases."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import SMALL_SPACES, TINY_MOBILE, random_images, random_supernet, save_stripes, tiny_config, tiny_space
from stage_runs import Stage

from proard.artifacts import Provenance, read_header
from proard.config import Phase
from proard.nets import extract, load_supernet, save_static, save_supernet, sort_channels
from proard.nets.sorting import links
from proard.space import key_of
from proard.stages.train_phase import trained_widths

closely = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
spaces = pytest.mark.parametrize("settings", SMALL_SPACES, ids=lambda entry: entry["name"])
OPENED = {  # choices that earlier phases opened, and one that they did not
    "largest": ([], None),
    "expand": ([{"expand": [3, 1]}], {"expand": [2, 0.5]}),
    "width": ([{"width": [1], "expand": [3, 1]}, {"depth": [1]}], None),
    "narrow": ([{"width": [0.5]}], None),
    "everything": ([{}], None),
}


def drawn(space, dims, count=6):
    """Archs of the choices that a phase opens; those that the space does not have are left out."""
    dims = {dim: [value for value in values if value in getattr(space.settings, dim)] for dim, values in dims.items()}
    among = space.open_choices(**dims)
    ends = [[kept[0] for kept in among], [kept[-1] for kept in among]]
    return dims, [space.arch(row) for row in (*ends, *space.sample(count, np.random.default_rng(0), among=among))]


@spaces
@pytest.mark.parametrize("case", OPENED)
def test_trained_subnets_stay_the_same_functions(settings, case):
    space, images = tiny_space(settings), random_images(tiny_space(settings), 5)
    phases = [drawn(space, dims) for dims in OPENED[case][0]]
    archs = [space.largest, *(arch for _, found in phases for arch in found)]
    net = random_supernet(space)
    before = {mode: [extract(net.train(mode), arch)(images) for arch in archs] for mode in (True, False)}
    sort_channels(net, trained_widths(space, [dims for dims, _ in phases]))
    for mode in (True, False):
        for arch, logits in zip(archs, before[mode], strict=True):
            closely(extract(net.train(mode), arch)(images), logits)
            if not mode:  # in training mode it would move the running statistics
                closely(net(images, arch), logits)


@spaces
def test_a_narrower_subnet_that_nobody_trained_changes(settings):
    space, images = tiny_space(settings), random_images(tiny_space(settings), 5)
    net = random_supernet(space).eval()
    before = net(images, space.smallest)
    sort_channels(net, {})
    assert (net(images, space.smallest) - before).abs().max() > 1e-3


@spaces
def test_importance_falls_between_the_trained_widths_and_no_weight_is_lost(settings):
    space, net = tiny_space(settings), random_supernet(tiny_space(settings))
    dims, _ = drawn(space, {"expand": [3, 1]})
    trained = trained_widths(space, [dims])
    before = {name: value.flatten().sort().values for name, value in net.state_dict().items()}
    moved = {name: value.clone() for name, value in net.state_dict().items()}
    sort_channels(net, trained)
    after = net.state_dict()
    assert all(torch.equal(after[name].flatten().sort().values, value) for name, value in before.items())
    assert any(not torch.equal(after[name], value) for name, value in moved.items())
    several = 0
    for link in links(space.spec(space.largest)):
        weights = [net.layers[key_of(conv)].weight.detach() for conv in link.readers]
        weights += [net.head.weight.detach()] if link.head else []
        sums = torch.stack([sum(w[:, channel].abs().sum() for w in weights) for channel in range(weights[0].shape[1])])
        edges = sorted({0, len(sums)}.union(*(trained.get(conv.name, set()) for conv in link.carriers)))
        several += len(edges) > 2
        for start, end in pairwise(edges):
            falling = sorted(sums[start:end].tolist(), reverse=True)
            assert sums[start:end].tolist() == pytest.approx(falling, rel=1e-12)
    assert several


def named(link):
    """Names of a link's carriers, readers and gates."""
    layers = [" ".join(conv.name for conv in convs) for convs in (link.carriers, link.readers, link.gates)]
    return (*layers, "head") if link.head else tuple(layers)


def test_links_of_a_resnet_are_its_blocks_insides_and_its_residual_paths():
    space = tiny_space()
    first, second = "unit1.block1", "unit1.block2"
    found = [named(link) for link in links(space.spec(space.largest))]
    assert (f"{first}.conv1", f"{first}.conv2", "") in found
    assert ("stem.out", f"{first}.conv1 {first}.shortcut", "") in found
    reads = f"{second}.conv1 unit2.block1.conv1 unit2.block1.shortcut"
    assert (f"{first}.shortcut {first}.conv2 {second}.conv2", reads, "") in found
    last = "unit2.block1.shortcut unit2.block1.conv2 unit2.block2.conv2"
    assert (last, "unit2.block2.conv1", "", "head") in found
    assert len(found) == 4 + 3, "four blocks, the stem and two units"


def test_links_of_a_mobilenet_hold_depthwise_and_gate():
    space = tiny_space(TINY_MOBILE)
    found = [named(link) for link in links(space.spec(space.largest))]
    block = "unit2.block1"
    inner = f"{block}.expand {block}.depthwise {block}.excite"
    assert (inner, f"{block}.project", f"{block}.squeeze") in found
    assert (f"{block}.squeeze", f"{block}.excite", "") in found
    # unit1.block1 has no expansion and an identity beside it: one path from the stem to the second unit
    path = "stem.out unit1.block1.depthwise unit1.block1.project"
    assert (path, "unit1.block1.project unit2.block1.expand", "") in found
    assert ("final.mix", "", "", "head") in found
    carried = [conv.name for link in links(space.spec(space.largest)) for conv in link.carriers]
    assert len(set(carried)) == len(carried) == len(space.spec(space.largest).convs)


def test_layer_widths_are_those_of_the_archs():
    for settings in SMALL_SPACES:
        space, found = tiny_space(settings), {}
        among = space.open_choices(depth=[0, 1])
        for row in space.sample(400, np.random.default_rng(0), among=among):
            for conv in space.spec(space.arch(row)).convs:
                if conv.name.startswith(("unit", "stem")):
                    found.setdefault(conv.name, set()).add(conv.out_channels)
        assert space.layer_widths(among) == found


def test_a_phase_sorts_what_the_previous_one_left_free(tmp_path, capsys):
    paths, space = save_stripes(tmp_path), tiny_space()
    trained = random_supernet(space, dtype=torch.float32).eval()
    given = {"phase": "width", "opened": [{"expand": [1.0]}]}
    save_supernet(tmp_path / "previous.safetensors", trained, Provenance("tiny", "train_phase"), **given)
    teacher = extract(trained, space.largest)
    options = {"space": space, "arch": space.largest, "kind": "teacher"}
    save_static(tmp_path / "t.safetensors", teacher, provenance=Provenance("tiny", "train_teacher"), **options)
    files = {**paths, "teacher": tmp_path / "t.safetensors"}
    still = {"epochs": 1 / 6, "lr": 1e-12, "weight_decay": 0, "expand": [0.5]}
    still["previous"] = tmp_path / "previous.safetensors"
    nets = {}
    for rule in ("none", "l1"):
        stage = Stage("train_phase", files, tmp_path / rule, sort_channels=rule, **still)
        stage.run()
        nets[rule] = load_supernet(stage.outputs[0], space)[0].layers["unit2_block1_conv2"].weight
        assert read_header(stage.outputs[0])["opened"] == [{"expand": [1.0]}, {"expand": [0.5]}]
    before = trained.layers["unit2_block1_conv2"].weight
    torch.testing.assert_close(nets["none"], before)
    sort_channels(trained, trained_widths(space, given["opened"]))
    assert not torch.allclose(nets["l1"], nets["none"])
    torch.testing.assert_close(nets["l1"], before)
    (phase,) = tiny_config().train_phase.phases
    assert phase.sort_channels == Phase().sort_channels == "none"
