"""The dtype of computation: bfloat16 if the processor has instructions for it, else float32 with one message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from proard.kernels import computed_type, one_pass

NARROW = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
ATTACKED = """
import torch
from helpers import random_images, random_supernet, tiny_space
from proard.kernels import one_pass
from proard.nets import extract, fold
space = tiny_space()
net = fold(extract(random_supernet(space, dtype=torch.float32), space.largest).eval()).rounded(torch.bfloat16)
logits, gradient = net.input_gradient()(random_images(space, 4, dtype=torch.float32), lambda logits: logits)
assert not one_pass(torch.bfloat16) and torch.isfinite(gradient).all()
"""
ASKED = """
from proard.kernels import computed_type
assert [computed_type(name, "cpu") for name in ("bfloat16", "bfloat16", "float32")] == ["float32"] * 3
"""
MEASURED = """
import tempfile
from pathlib import Path
import torch
from helpers import image_sets, random_supernet, tiny_space
from proard.config import Attack, Measurement, Threat
from proard.evaluation import Conditions, SubnetMeter
space = tiny_space()
with tempfile.TemporaryDirectory() as folder:
    sets = image_sets(Path(folder), train=20, val=6)
how = {"conditions": Conditions(Threat(eps=0.1), Measurement(recalibration_images=20, batch_size=10), 0)}
meter = SubnetMeter(random_supernet(space, dtype=torch.float32), checksum="net", train=sets["train"], **how)
attacks = [Attack(name=name, num_steps=1, dtype=name) for name in ("float32", "bfloat16")]
rows = meter.rows(space.smallest, sets["val"], attacks, worst=True)
assert [row["dtype"] for row in rows] == ["float32"] * 3
assert rows[0]["robust_acc"] == rows[1]["robust_acc"]
"""


def test_float32_is_always_computed():
    assert one_pass(torch.float32)
    assert computed_type("float32", "cpu") == "float32"


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="no x86 CPU with AVX2")
@pytest.mark.parametrize(("script", "said"), [(ATTACKED, 0), (ASKED, 1), (MEASURED, 1)])
def test_without_avx512_a_rounded_network_is_attacked_and_another_type_is_said_once_and_recorded(script, said):
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parent)])
    environment = {**os.environ, **NARROW, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("float32 is used") == said
