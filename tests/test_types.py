"""The type that is computed in: bfloat16 where the processor has instructions for it, float32 elsewhere, said once."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import image_sets, random_supernet, tiny_space

from proard.config import Attack, Measurement, Threat
from proard.evaluation import SubnetMeter
from proard.kernels import computed_type, one_pass, types

NARROW = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.fixture
def lacking(monkeypatch):
    """A CPU without bfloat16."""
    types._explain.cache_clear()
    monkeypatch.setattr(types, "has_bfloat16", lambda kind: False)


def test_another_type_is_said_once(lacking, capsys):
    assert [computed_type(name, "cpu") for name in ("bfloat16", "bfloat16", "float32")] == ["float32"] * 3
    assert capsys.readouterr().out.count("float32 is used") == 1


def test_float32_is_always_computed():
    assert one_pass(torch.float32)
    assert computed_type("float32", "cpu") == "float32"


def test_a_measurement_records_the_type_that_ran(lacking, tmp_path):
    space = tiny_space()
    sets = image_sets(tmp_path, train=20, val=6)
    meter = SubnetMeter(
        random_supernet(space, dtype=torch.float32),
        checksum="net",
        train=sets["train"],
        threat=Threat(eps=0.1),
        measurement=Measurement(recalibration_images=20, batch_size=10),
        seed=0,
    )
    attacks = [Attack(name=name, num_steps=1, dtype=name) for name in ("float32", "bfloat16")]
    rows = meter.rows(space.smallest, sets["val"], attacks, worst=True)
    assert [row["dtype"] for row in rows] == ["float32"] * 3
    assert rows[0]["robust_acc"] == rows[1]["robust_acc"]


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="no x86 CPU with AVX2")
def test_without_avx512_a_rounded_network_is_attacked_all_the_same(monkeypatch):
    script = """
import torch
from helpers import random_images, random_supernet, tiny_space
from proard.kernels import one_pass
from proard.nets import extract, fold
space = tiny_space()
net = fold(extract(random_supernet(space, dtype=torch.float32), space.largest).eval()).rounded(torch.bfloat16)
logits, gradient = net.input_gradient()(random_images(space, 4, dtype=torch.float32), lambda logits: logits)
assert not one_pass(torch.bfloat16) and torch.isfinite(gradient).all()
"""
    for name, value in NARROW.items():
        monkeypatch.setenv(name, value)
    folder = __file__.rpartition("/")[0]
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{folder}/..")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
