"""The benchmark of attacks: what a row counts, and that its lists are those that it names."""

from __future__ import annotations

import numpy as np
import torch
from helpers import image_sets, random_supernet, tiny_space

from proard.config import Measurement, Threat, VerifyFront
from proard.data import to_float
from proard.evaluation import Conditions
from proard.nets import extract, fold


def test_rows_count_images_that_only_one_of_two_attacks_finds(tmp_path):
    import bench_strength

    space, images = tiny_space(), image_sets(tmp_path, train=20, val=30)["val"]
    net = fold(extract(random_supernet(space, dtype=torch.float32).eval(), space.largest))
    with torch.no_grad():
        images.labels.copy_(net(to_float(images.images)).argmax(1))
    noises = [Conditions(Threat(eps=0.02), Measurement(batch_size=20), seed) for seed in (0, 1)]
    (default,) = [row for row in bench_strength.student_rows("a", net, images, noises, {}) if row["lever"] == "default"]
    theirs = np.zeros(30, bool)
    theirs[:10] = True
    others = {"autoattack": {"outcome": theirs, "seconds": 1.0}}
    rows = {row["lever"]: row for row in bench_strength.student_rows("a", net, images, noises, others)}
    assert rows["autoattack"]["robust"] == 10
    for row in (rows["default"], rows["earlier"]):
        assert row["robust"] - 10 == row["missed"] - row["found"]
        assert row["points_low"] <= row["points"] <= row["points_high"]
        assert row["points_low"] - 1e-3 <= 100 * (row["robust"] - 10) / 30 <= row["points_high"] + 1e-3
    assert rows["default"]["robust"] == default["robust"]
    assert rows["default"]["gradients"] == default["gradients"] > 0


def test_the_default_list_is_the_settings():
    import bench_strength

    assert bench_strength.LISTS["default"] == VerifyFront().attacks
    assert bench_strength.LISTS["earlier"] != VerifyFront().attacks
