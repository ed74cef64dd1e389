"""One thread per test worker, as two on two cores would fight over both; Triton is interpreted where no GPU is."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton, whose own functions heed it too


@pytest.fixture(autouse=True)
def one_thread():
    """What a test sets, through a stage or a benchmark, is taken back before and after it."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
