"""Training stages as programs on the stripes, started, killed and compared."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import tiny_config

from proard.artifacts import ArtifactError, read_header, read_table
from proard.config import job_settings
from proard.stages import train_phase, train_teacher

ROOT = Path(__file__).resolve().parents[1]
LONG = {"epochs": 10, "minutes_between": 0.0005}  # 60 steps; the state is written after nearly every one
OUTPUTS = {
    "train_teacher": ["teacher.safetensors", "history.parquet"],
    "train_phase": ["supernet.safetensors", "history.parquet"],
}


STARTED: list[subprocess.Popen] = []


class Stage:
    """A training stage on the stripes with a folder of its own."""

    def __init__(
        self, name, inputs, folder, *, seed=0, previous=None, teacher=None, taught_by=None, minutes_between=5, **changes
    ):
        changes |= {} if taught_by is None else {"teacher": taught_by}  # `teacher` is the file
        section = "phase" if name == "train_phase" else name
        own = {key: changes.pop(key) for key in ("validation",) if key in changes}
        config = tiny_config(**own, **{f"{section}__{key}": value for key, value in changes.items()})
        self.name, self.folder = name, folder
        self.outputs = [folder / output for output in OUTPUTS[name]]
        self.state = self.outputs[0].with_suffix(".state")
        phase = "all" if name == "train_phase" else None
        files = {"train": inputs["train"], "val": inputs["val"]}
        files |= {Path(output).stem: folder / output for output in OUTPUTS[name]}
        if phase:
            files |= {"teacher": teacher or inputs["teacher"]} | ({"previous": previous} if previous else {})
        self.arguments = ["--settings", job_settings(config, name, phase=phase), "--seed", str(seed)]
        self.arguments += ["--device", "cpu", "--threads", "1", "--save-every-minutes", str(minutes_between)]
        self.arguments += [text for flag, path in files.items() for text in (f"--{flag}", str(path))]

    def start(self, *more, processes=1, **environment):
        """The stage as a process, or as several under torchrun."""
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        module = f"proard.stages.{self.name}"
        process = subprocess.Popen(
            [sys.executable, "-m", *(launcher if processes > 1 else []), module, *self.arguments, *more],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        STARTED.append(process)
        return process

    def run(self):
        """The same command inside this process."""
        {"train_teacher": train_teacher, "train_phase": train_phase}[self.name].main(self.arguments)

    def wait_until_step(self, process, step):
        """Wait until the state of this step or of a later one is on disk."""
        for _ in range(9000):
            assert process.poll() is None, process.communicate()[1]
            with contextlib.suppress(ArtifactError):
                if read_header(self.state)["facts"]["done"]["step"] >= step:
                    return
            time.sleep(0.02)
        pytest.fail("the training saved no state")

    def nothing_declared_is_there(self):
        """No output, not even a part of one, under its declared name."""
        return not any(path.exists() for path in self.outputs)

    def checksum(self):
        """Of the contents of the weights."""
        return read_header(self.outputs[0])["checksum"]

    def history(self):
        """The history without its wall times."""
        return read_table(self.outputs[1]).drop(columns="seconds").to_dict("list")

    def costs(self):
        """The ledger's one row."""
        return read_table(self.folder / "costs.parquet").iloc[0]

    def equals(self, other):
        """Whether both ended with the same weights and history, and no other files."""
        names = {path.name for path in self.folder.iterdir()}
        assert names == {*OUTPUTS[self.name], "costs.parquet"}, names
        return self.checksum() == other.checksum() and str(self.history()) == str(other.history())
