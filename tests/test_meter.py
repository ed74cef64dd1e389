"""Rows of measurements and the meter: recalibrated subnets, their cache, on a random network and small image sets."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers import image_sets, random_archs, random_supernet, tiny_space
from torch import nn

from proard.artifacts import MEASURED
from proard.config import Attack, Measurement, Threat
from proard.data import ImageSet, to_float
from proard.evaluation import Conditions, SubnetMeter, measure, rows_of
from proard.evaluation.meter import batch_that_fits
from proard.nets import extract, fold, recalibrate

EPS = 0.1
CE = Attack(name="ce", num_steps=4, step_size=0.04)
CW = Attack(name="cw", objective="margin", num_steps=3, step_size=0.05, restarts=2)
TARGETED = Attack(name="towards", objective="targeted", targets=2, num_steps=4, step_size=("eps", "eps/4"))


class Counting(nn.Module):
    """Counts the images that a network sees."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, 0

    def forward(self, images):
        self.seen += len(images)
        return self.net(images)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return image_sets(tmp_path_factory.mktemp("sets"), train=40, val=30)


class Meter(SubnetMeter):
    """A meter whose networks count."""

    def _student(self, arch):
        self.net = Counting(super()._student(arch))
        return self.net


def meter(sets, folder, **changes):
    usual = {"threat": Threat(eps=EPS), "measurement": Measurement(recalibration_images=20, batch_size=10), "seed": 0}
    conditions = Conditions(**{name: changes.pop(name, value) for name, value in usual.items()})
    options = {"checksum": "abc", "conditions": conditions, **changes}
    net = random_supernet(tiny_space(), dtype=torch.float32)
    return Meter(net, train=options.pop("train", sets["train"]), cache=folder, **options)


def without_seconds(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_second_measurement_comes_from_the_cache_without_a_forward(sets, tmp_path):
    arch = tiny_space().largest
    first, second = meter(sets, tmp_path), meter(sets, tmp_path)
    fresh = first.rows(arch, sets["val"], [CE, CW], worst=True)
    assert first.net.seen > 0
    assert second.rows(arch, sets["val"], [CE, CW], worst=True) == fresh  # the recorded seconds too
    assert not hasattr(second, "net"), "a network was built"
    extra = Attack(name="more", num_steps=1)
    assert [row["attack"] for row in second.rows(arch, sets["val"], [CE, extra, CW])] == ["ce", "more", "cw"]
    assert 0 < second.net.seen < first.net.seen, "more than the missing attack was run"


def test_a_targeted_attack_continues_with_what_the_attacks_before_it_left(sets, tmp_path):
    arch = tiny_space().largest
    first, second = meter(sets, tmp_path), meter(sets, tmp_path)
    first.measure(arch, sets["val"], [CE])
    found = first.measure(arch, sets["val"], [CE, TARGETED, CW])  # cross-entropy's comes from the cache
    assert not (found["towards"]["robust"] & ~found["ce"]["robust"]).any()
    (*_, worst) = first.rows(arch, sets["val"], [CE, TARGETED, CW], worst=True)
    assert worst["robust_acc"] <= min(entry["robust"].mean() for entry in found.values())
    assert worst["gradients"] == sum(entry["gradients"] for entry in found.values())
    whole = measure(first.student(arch), sets["val"], [CE, TARGETED, CW], first.conditions)
    assert all(np.array_equal(whole[name]["robust"], entry["robust"]) for name, entry in found.items())
    assert {name: entry["gradients"] for name, entry in whole.items()} == {
        name: entry["gradients"] for name, entry in found.items()
    }
    second.measure(arch, sets["val"], [CE, CW, TARGETED])  # after two attacks it is another measurement
    assert second.net.seen > 0
    again = meter(sets, tmp_path)
    again.measure(arch, sets["val"], [CE, TARGETED])
    assert not hasattr(again, "net")


def test_a_schedule_stands_in_the_rows(sets):
    rows = meter(sets, None).rows(tiny_space().smallest, sets["val"], [CE, TARGETED], worst=True)
    shown = [(row.get("step_size"), row.get("last_step_size"), row.get("targets")) for row in rows]
    assert shown == [(0.04, 0.04, None), (EPS, EPS / 4, 2), (None, None, None)]


def test_renamed_attack_is_the_same_measurement(sets, tmp_path):
    arch = tiny_space().smallest
    meter(sets, tmp_path).rows(arch, sets["val"], [CE])
    again = meter(sets, tmp_path)
    (row,) = again.rows(arch, sets["val"], [CE.model_copy(update={"name": "other"})])
    assert row["attack"] == "other"
    assert not hasattr(again, "net")


@pytest.mark.parametrize(
    "changes",
    [
        {"checksum": "another supernet"},
        {"seed": 1},
        {"threat": Threat(eps=EPS / 2)},
        {"measurement": Measurement(recalibration_images=20, batch_size=10, accounting="last_iterate")},
        {"measurement": Measurement(recalibration_images=30, batch_size=10)},
    ],
    ids=["supernet", "seed", "eps", "accounting", "recalibration"],
)
def test_whatever_a_measurement_depends_on_makes_a_new_one(sets, tmp_path, changes):
    arch = tiny_space().smallest
    meter(sets, tmp_path).rows(arch, sets["val"], [CE])
    other = meter(sets, tmp_path, **changes)
    other.rows(arch, sets["val"], [CE])
    assert other.net.seen > 0


def test_other_images_archs_and_attacks_make_a_new_measurement(sets, tmp_path):
    arch, val = tiny_space().smallest, sets["val"]
    meter(sets, tmp_path).rows(arch, val, [CE])
    swapped = val.take([1, 0, *range(2, len(val))])
    more = CE.model_copy(update={"num_steps": 5})
    for changed in ((arch, val.first(29), [CE]), (arch, swapped, [CE]), (arch, val, [more])):
        again = meter(sets, tmp_path)
        again.rows(*changed)
        assert again.net.seen > 0
    again = meter(sets, tmp_path)
    again.rows(tiny_space().largest, val, [CE])
    assert again.net.seen > 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "7",
        lambda text: "\x00" * len(text),
        lambda text: json.dumps({**json.loads(text), "clean": "zz"}),
        lambda text: json.dumps({**json.loads(text), "clean": None}),
        lambda text: json.dumps({**json.loads(text), "robust": json.loads(text)["robust"][:-2]}),
        lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != "gradients"}),
        lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != "seconds"}),
    ],
    ids=["empty", "half", "list", "number", "zeros", "letters", "null", "short", "no_gradients", "no_seconds"],
)
def test_damaged_cache_file_is_measured_again(sets, tmp_path, damage):
    arch = tiny_space().smallest
    fresh = meter(sets, tmp_path).rows(arch, sets["val"], [CE])
    (path,) = tmp_path.rglob("*.json")
    path.write_text(damage(path.read_text()))
    again = meter(sets, tmp_path)
    assert without_seconds(again.rows(arch, sets["val"], [CE])) == without_seconds(fresh)
    assert again.net.seen > 0
    healed = meter(sets, tmp_path)
    healed.rows(arch, sets["val"], [CE])
    assert not hasattr(healed, "net")


def test_meter_without_a_cache_writes_nothing_and_finds_the_same(sets, tmp_path):
    arch = tiny_space().smallest
    rows = meter(sets, None).rows(arch, sets["val"], [CE])
    assert not list(tmp_path.iterdir())
    assert without_seconds(rows) == without_seconds(meter(sets, tmp_path).rows(arch, sets["val"], [CE]))


def test_measured_network_is_extracted_recalibrated_and_folded(sets):
    measured = meter(sets, None)
    arch = random_archs(tiny_space(), 1)[0]
    net = extract(measured.supernet, arch)
    recalibrate(net, to_float(sets["train"].images[:20]), batch_size=10)
    images = to_float(sets["val"].images)
    torch.testing.assert_close(measured.student(arch)(images), net(images), rtol=1e-4, atol=1e-4)


def test_rows_have_the_contract_s_columns_and_costs(sets):
    arch = tiny_space().largest
    rows = meter(sets, None).rows(arch, sets["val"], [CE, CW], worst=True)
    spec = tiny_space().spec(arch)
    assert [row["attack"] for row in rows] == ["ce", "cw", "worst"]
    for row in rows:
        assert set(MEASURED) - set(row) <= {"step_size", "last_step_size", "targets"}
        assert set(row) <= set(MEASURED)
        assert (row["macs"], row["params"], row["split"], row["num_images"]) == (spec.macs, spec.params, "val", 30)
        assert row["robust_acc"] <= row["clean_acc"]
        for kind in ("clean", "robust"):
            accuracy = row[f"{kind}_acc"]
            assert row[f"{kind}_acc_low"] <= accuracy <= row[f"{kind}_acc_high"]
            assert math.isclose((row[f"{kind}_acc_half_a"] + row[f"{kind}_acc_half_b"]) / 2, accuracy)
    assert (rows[1]["num_steps"], rows[1]["restarts"], rows[1]["eps"]) == (3, 2, EPS)


def test_worst_row_is_the_conjunction_image_by_image(sets):
    clean = np.array([True, True, True, True, False, True])
    masks = {"a": [1, 1, 0, 0, 0, 1], "b": [1, 0, 1, 0, 0, 1]}
    measured = {
        name: {"clean": clean, "robust": np.array(mask, bool), "gradients": 10, "seconds": 1.0}
        for name, mask in masks.items()
    }
    rows = rows_of(
        measured,
        space=tiny_space(),
        arch=tiny_space().smallest,
        images=sets["val"].first(6),
        attacks=[Attack(name="a", num_steps=3, restarts=2), Attack(name="b", num_steps=5)],
        conditions=Conditions(Threat(), Measurement(), 0),
        worst=True,
    )
    assert [row["robust_acc"] for row in rows] == [3 / 6, 3 / 6, 2 / 6]
    assert [row["clean_acc"] for row in rows] == [5 / 6] * 3
    assert (rows[2]["num_steps"], rows[2]["restarts"], rows[2]["gradients"]) == (5, 3, 20)
    assert rows[2]["robust_acc_half_a"] == 1 / 3  # images 0, 2, 4: the first one is robust
    assert rows[2]["robust_acc_half_b"] == 1 / 3  # images 1, 3, 5: the last one
    assert rows[2]["robust"] == [True, False, False, False, False, True]
    assert rows[2]["image_set"] == sets["val"].first(6).checksum != sets["val"].checksum


def test_measure_agrees_with_a_plain_count(sets):
    images: ImageSet = sets["val"]
    space = tiny_space()
    net = fold(extract(random_supernet(space, dtype=torch.float32).eval(), space.largest)).eval()
    conditions = Conditions(Threat(eps=1e-6), Measurement(batch_size=7), 0)
    entry = measure(net, images, [Attack(name="none", num_steps=1, step_size=1e-6)], conditions)["none"]
    expected = (net(to_float(images.images)).argmax(1) == images.labels).numpy()
    assert np.array_equal(entry["clean"], expected)
    assert np.array_equal(entry["robust"], expected)


def test_on_a_gpu_a_batch_is_as_large_as_its_memory_allows():
    space = tiny_space()
    net = fold(extract(random_supernet(space, dtype=torch.float32), space.largest).eval())
    maps = sum(conv.out_channels * conv.out_size**2 for conv in net.spec.convs)
    pixels = torch.zeros(1000, 1, 8, 8)
    for images, expected in ((0, 20), (39, 20), (40, 40), (200, 160), (10**9, 640)):
        free = 2 * 8 * maps * images
        assert batch_that_fits(net, pixels, least=20, free=lambda device, free=free: free) == expected
    assert batch_that_fits(net, pixels, least=20) == 20, "a CPU keeps the batch of the settings"
    assert batch_that_fits(lambda images: images, pixels, least=20, free=lambda device: 10**12) == 20
