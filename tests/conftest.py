"""One thread per test worker, or OMP_NUM_THREADS; waiting threads sleep; Triton is interpreted where no GPU is."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two per worker on two cores would fight over both
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

THREADS = int(os.environ["OMP_NUM_THREADS"])
torch.set_num_threads(THREADS)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton, whose own functions heed it too


@pytest.fixture(autouse=True)
def own_threads():
    """Reset torch's number of threads, which stages and benchmarks change, before and after each test."""
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _no_stage_outlives_its_test():
    """Kill the stages that a test has started by `stage_runs`, where it imports that module."""
    yield
    started = getattr(sys.modules.get("stage_runs"), "STARTED", [])
    while started:
        started.pop().kill()
