"""Data-parallel steps: two gloo processes against one process, weights, gradients, bytes and failures."""

from __future__ import annotations

import math

import pytest
import sync_workers
import torch
import torch.multiprocessing as mp
from helpers import random_supernet, tiny_space
from sync_workers import archs, share, train

from proard.nets.elastic import key_of
from proard.training.sync import active_gradients


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(sync_workers.work, args=(str(folder),), nprocs=sync_workers.WORLD)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(sync_workers.WORLD)]


def close(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-10, atol=1e-12, msg=lambda text, name=name: name + text)


def test_two_processes_train_as_one_does_on_the_whole_batch_where_images_do_not_meet(ranks):
    whole = train([slice(None)], steps=3, lr=0.05, norm=False)
    start = dict(random_supernet(tiny_space()).named_parameters())
    assert not torch.equal(whole.parameters["head.weight"], start["head.weight"])
    for rank in ranks:
        close({name: rank["trained"][name] for name in whole.parameters}, dict(whole.parameters))
        close(rank["average"], whole.average)
        loss, clean, robust = rank["measures"]
        torch.testing.assert_close(loss, whole.measures[0].double(), rtol=1e-10, atol=0)
        assert (2 * clean, 2 * robust) == tuple(whole.measures[1:])  # numbers of images of a part
    assert all(torch.equal(ranks[0]["trained"][name], ranks[1]["trained"][name]) for name in whole.parameters)


def test_with_batch_norm_they_equal_one_process_that_passes_the_batch_in_parts(ranks):
    parts = [train([share(rank)], steps=1, lr=0.0, norm=True) for rank in range(2)]
    mean = {name: sum(part.parameters[name].grad for part in parts) / 2 for name in parts[0].parameters}
    for rank in ranks:
        close(rank["gradients"], mean)
    whole = train([slice(None)], steps=1, lr=0.0, norm=True)
    assert not torch.allclose(whole.parameters["head.weight"].grad, mean["head.weight"], rtol=1e-4)


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
    assert [rank["bytes"] for rank in ranks] == [8 * (numbers + 3)] * 2  # with loss and two counts, in float64


def test_every_gradient_of_a_step_lies_in_the_active_slices():
    trainer = train([slice(None)], steps=1, lr=0.0, norm=True)
    assert any(bool((parameter.grad == 0).any()) for parameter in trainer.parameters.values())
    specs = [tiny_space().spec(arch) for arch in archs()]
    for view in active_gradients(trainer.net, specs):
        view.zero_()
    assert all(bool((parameter.grad == 0).all()) for parameter in trainer.parameters.values())


def test_loss_that_is_not_finite_on_one_process_stops_all_before_anything_moves(ranks):
    before = dict(train([slice(None)], steps=0, lr=0.05, norm=True).parameters)
    for rank in ranks:
        step, loss = rank["failure"]
        assert step == 1
        assert math.isnan(loss)
        assert all(torch.isfinite(value).all() for value in rank["poisoned"].values())
        assert not torch.equal(rank["poisoned"]["head.weight"], before["head.weight"]), "step 0 was taken"
    assert all(torch.equal(value, ranks[1]["poisoned"][name]) for name, value in ranks[0]["poisoned"].items())


def test_one_process_alone_syncs_nothing():
    assert train([slice(None)], steps=0, lr=0.05, norm=True).sync is None


def test_benchmarked_ways_of_averaging_agree_and_active_slices_are_fewest_bytes(ranks):
    for rank in ranks:
        largest, sizes = rank["bench"]
        assert largest <= 1e-12
        assert 0 == sizes["local"] < sizes["active"] < sizes["flat"] == sizes["ddp"]
