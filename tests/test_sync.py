"""Data-parallel training: two gloo processes against one, weights, statistics, history, bytes and failures."""

from __future__ import annotations

import math

import pytest
import sync_workers
import torch
import torch.multiprocessing as mp
from helpers import random_supernet, tiny_space
from sync_workers import BATCH, TRAININGS, archs, normalised, planes, train, whole_training

from proard.config import UserError
from proard.space import key_of
from proard.training.ranks import Ranks
from proard.training.sync import active_gradients

ALONE = Ranks()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(sync_workers.work, args=(str(folder),), nprocs=sync_workers.WORLD)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(sync_workers.WORLD)]


def close(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-8, atol=1e-10, msg=lambda text, name=name: name + text)


def test_uneven_parts_of_a_batch_train_as_the_whole_batch_does(ranks):
    whole, measures = train(ALONE, steps=3, lr=0.05)
    start = dict(random_supernet(tiny_space()).named_parameters())
    assert not torch.equal(whole.update.parameters["head.weight"], start["head.weight"])
    for rank in ranks:
        close(rank["trained"], whole.net.state_dict())
        close(rank["average"], whole.update.average)
        torch.testing.assert_close(rank["measures"], torch.stack(measures).double(), rtol=1e-8, atol=0)
    assert all(torch.equal(value, ranks[1]["trained"][name]) for name, value in ranks[0]["trained"].items())


@pytest.mark.parametrize("name", TRAININGS)
def test_every_kind_of_training_is_that_of_one_process(ranks, tmp_path, name):
    whole = whole_training(name, str(tmp_path), ALONE)
    for rank in ranks:
        close(rank["trainings"][name]["net"], whole["net"])
        for row, wanted in zip(rank["trainings"][name]["rows"], whole["rows"], strict=True):
            words = {key for key, value in wanted.items() if isinstance(value, str)}
            assert {key: row[key] for key in words} == {key: wanted[key] for key in words}
            numbers = {key: value for key, value in wanted.items() if key not in words}
            assert {key: row[key] for key in numbers} == pytest.approx(numbers, rel=1e-8, nan_ok=True)
    if name == "timed":
        assert whole["rows"][-1]["step"] == 35 < whole["rows"][-1]["planned_steps"]


@pytest.mark.parametrize("twice", [False, True])
def test_batch_norm_of_parts_is_that_of_the_whole(ranks, twice):
    x = planes()
    wanted = normalised(x, lambda tensor: tensor.clone(), twice=twice)
    library = torch.nn.functional.batch_norm(x, None, None, training=True)
    out, mean, var, values = (t.clone() for t in wanted[:4])
    assert values == BATCH * 9
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(var, x.var((0, 2, 3)))
    generator = torch.Generator().manual_seed(5)
    scale, shift, _ = (torch.randn(4, generator=generator, dtype=x.dtype)[:, None, None] for _ in range(3))
    torch.testing.assert_close(out, library * scale + shift)
    found = [rank["norms"][int(twice)] for rank in ranks]
    for index, whole in enumerate(wanted):
        parts = [part[index] for part in found]
        if whole.ndim == 4:  # out, gradients of x: rows
            joined = torch.cat(parts)
        elif index in (1, 2, 3):  # statistics: the same everywhere
            assert torch.equal(*parts)
            joined = parts[0]
        else:  # gradients of scale and shift: this process's part
            joined = sum(parts)
        torch.testing.assert_close(joined, whole, rtol=1e-9, atol=1e-9)


def test_fused_and_differentiable_batch_norm_are_one():
    for fused, plain in zip(
        *(normalised(planes(), torch.clone, twice=twice)[:7] for twice in (False, True)), strict=True
    ):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9)


def test_only_active_slices_travel_in_one_buffer(ranks):
    space = tiny_space()
    narrow, wide = (space.spec(arch) for arch in archs())
    shapes = {}
    for conv in (*narrow.convs, *wide.convs):
        shapes.setdefault(key_of(conv), []).append((conv.out_channels, conv.in_channels, conv.kernel))
    numbers = sum(
        max(out) * max(into) * kernel[0] ** 2 + 2 * max(out)
        for out, into, kernel in (zip(*widths, strict=True) for widths in shapes.values())
    )
    numbers += 3 * max(narrow.features, wide.features) + 3  # three classes
    net = random_supernet(space)
    assert numbers < sum(parameter.numel() for parameter in net.parameters())
    steps = 3
    assert [rank["bytes"] for rank in ranks] == [steps * 8 * (numbers + 3)] * 2  # with loss and two counts, in float64


def test_every_gradient_of_a_step_lies_in_the_active_slices():
    trainer, _ = train(ALONE, steps=1, lr=0.0)
    assert any(bool((parameter.grad == 0).any()) for parameter in trainer.update.parameters.values())
    specs = [tiny_space().spec(arch) for arch in archs()]
    for view in active_gradients(trainer.net, specs):
        view.zero_()
    assert all(bool((parameter.grad == 0).all()) for parameter in trainer.update.parameters.values())


def test_loss_that_is_not_finite_on_one_process_stops_all_before_anything_moves(ranks):
    before = train(ALONE, steps=0, lr=0.05)[0].update.parameters
    for rank in ranks:
        step, loss = rank["failure"]
        assert step == 1
        assert math.isnan(loss)
        assert all(torch.isfinite(value).all() for value in rank["poisoned"].values())
        assert not torch.equal(rank["poisoned"]["head.weight"], before["head.weight"]), "step 0 was taken"
    assert all(torch.equal(value, ranks[1]["poisoned"][name]) for name, value in ranks[0]["poisoned"].items())


def test_one_process_alone_syncs_nothing():
    assert train(ALONE, steps=0, lr=0.05)[0].update.sync is None


def test_a_batch_smaller_than_the_number_of_processes_is_refused():
    with pytest.raises(UserError, match="4 processes cannot share a batch of 3 images; raise batch_size or ask for"):
        Ranks(0, 4).part(3)
    parts = [Ranks(rank, 3).part(16).rows for rank in range(3)]
    assert [(part.start, part.stop) for part in parts] == [(0, 5), (5, 10), (10, 16)]


def test_what_one_process_wishes_or_measures_reaches_all(ranks):
    for rank in ranks:
        assert rank["wishes"] == [1, 1, 0]
        assert rank["divided"] == [[1, 0], [2, 1], [3, 0]]
        assert rank["told"] == {"rank": 0}


def test_benchmarked_ways_of_averaging_agree_and_active_slices_are_fewest_bytes(ranks):
    for rank in ranks:
        largest, sizes = rank["bench"]
        assert largest <= 1e-12
        assert 0 == sizes["local"] < sizes["active"] < sizes["flat"] == sizes["ddp"]
