"""Numbers by counter: equal bits in both forms, on every device and in every part of a batch."""

from __future__ import annotations

import math

import pytest
import torch

from proard.attacks import start_point
from proard.kernels import KeyedNoise, dispatch
from proard.kernels.cudnn import NoEpilogues
from proard.kernels.noise import philox, plain_uniform
from proard.kernels.switch import fused_on_cpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(1, 1, 1, 1), (3, 3, 7, 5), (2, 1, 3, 3), (5, 3, 8, 8)]


@pytest.mark.parametrize(  # the vectors that the authors publish with their code
    ("counter", "key", "words"),
    [
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 0xFFFFFFFFFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_words_are_those_that_the_authors_publish(counter, key, words):
    found = philox(*(torch.tensor([word]) for word in counter), key=key)
    assert [int(word) for word in found] == words


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("key", [0, 5, 2**62 + 12345])
def test_both_forms_draw_the_same_bits(shape, key):
    pytest.importorskip("triton")
    fused = dispatch.all_fused(NoEpilogues()).steps
    for first, stream in ((0, 0), (7, 3)):
        own = fused.philox_uniform(shape, key, first, stream, DEVICE)
        assert torch.equal(own, plain_uniform(shape, key, first, stream, DEVICE))


def test_numbers_are_uniform_and_normal_and_every_draw_is_another():
    source, shape = KeyedNoise(3), (64, 3, 32, 32)
    first, second = (source.uniform(shape, DEVICE) for _ in range(2))
    assert 0 <= float(first.min()) < 1e-4
    assert 1 - 1e-4 < float(first.max()) < 1
    assert abs(float(first.mean()) - 0.5) < 0.002
    assert abs(float(first.var()) - 1 / 12) < 0.001
    both = torch.stack([first.flatten(), second.flatten()])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([first[1:].flatten(), first[:-1].flatten()]))[0, 1])) < 0.01
    normal = source.normal(shape, DEVICE)
    assert abs(float(normal.mean())) < 0.01
    assert abs(float(normal.std()) - 1) < 0.01
    assert float((normal.abs() < 1).float().mean()) == pytest.approx(math.erf(0.5**0.5), abs=0.005)


@pytest.mark.parametrize("start", ["uniform", "gaussian"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_part_of_a_batch_starts_where_it_does_in_the_whole(start, norm):
    images = torch.full((7, 3, 4, 4), 0.5).contiguous(memory_format=torch.channels_last)
    how = {"eps": 0.1, "start": start, "norm": norm}
    whole = start_point(images, generator=KeyedNoise(9), **how)
    parts = [slice(0, 3), slice(3, 7)]
    found = [start_point(images[part], generator=KeyedNoise(9), among=(7, part), **how) for part in parts]
    assert torch.equal(torch.cat(found), whole)
    assert not torch.equal(start_point(images, generator=KeyedNoise(10), **how), whole)
    distance = (whole - 0.5).abs().amax() if norm == "linf" else (whole - 0.5).flatten(1).norm(dim=1).max()
    assert 0 < float(distance) <= 0.1 + 1e-6


def test_a_start_drawn_by_the_kernel_is_the_plain_ones():
    pytest.importorskip("triton")
    images = torch.rand(4, 3, 5, 5)
    plain = start_point(images, eps=0.1, start="uniform", generator=KeyedNoise(2))
    with fused_on_cpu(dispatch.all_fused(NoEpilogues())):
        assert torch.equal(start_point(images, eps=0.1, start="uniform", generator=KeyedNoise(2)), plain)
