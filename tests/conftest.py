"""One thread per test worker: two workers on two cores would otherwise fight over both."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
