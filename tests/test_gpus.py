"""Jobs on a workstation with several GPUs take different ones, and share only where there are more jobs than GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from proard.stages import common
from proard.training import ranks

ROOT = Path(__file__).parents[1]
CLAIM = """
import sys
from pathlib import Path
from proard.stages.gpus import claim_gpu
print(claim_gpu(int(sys.argv[1]), folder=Path(sys.argv[2])), flush=True)
sys.stdin.read()
"""


class Claims:
    """Processes that each hold a GPU until they are ended."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, []

    def __call__(self, gpus: int, *, visible: str | None = None) -> int:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        if visible is not None:
            environment["CUDA_VISIBLE_DEVICES"] = visible
        command = [sys.executable, "-c", CLAIM, str(gpus), str(self.folder)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.processes.append(process)
        return int(process.stdout.readline())

    def end(self, number: int) -> None:
        self.processes[number].kill()
        self.processes[number].wait()


@pytest.fixture
def claim(tmp_path):
    claims = Claims(tmp_path)
    yield claims
    for process in claims.processes:
        process.kill()
        process.communicate()


def test_jobs_side_by_side_hold_different_gpus_until_they_end(claim):
    assert sorted([claim(3), claim(3), claim(3)]) == [0, 1, 2]
    claim.end(1)
    assert claim(3) == 1


def test_more_jobs_than_gpus_share_evenly(claim):
    assert sorted([claim(2) for _ in range(4)]) == [0, 0, 1, 1]


def test_gpus_are_told_apart_by_their_number_on_the_machine(claim):
    assert claim(2, visible="2,3") == 0
    assert claim(2, visible="3,2") == 0  # the machine's number 3
    assert claim(4, visible="0,1,2,3") == 0
    assert claim(3, visible="2,3,1") == 2


@pytest.mark.parametrize(
    ("device", "several", "entered"),
    [("auto", False, True), ("cuda", False, True), ("cpu", False, False), ("auto", True, False)],
)
def test_a_gpu_is_prepared_with_a_backward_pass(device, several, entered):
    """The thread of backward passes has no CUDA context before its first kernel, and cuBLAS would warn."""
    expected = ("cpu" if device == "cpu" else "cuda", entered)
    assert common.chosen_device(device, gpu=True, several=several) == expected


def test_the_backward_pass_that_prepares_a_gpu_launches_a_kernel():
    names = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        ranks.enter_backward_thread("cpu")
    assert names.count("aten.mul.Tensor") == 2  # forward, and backward
