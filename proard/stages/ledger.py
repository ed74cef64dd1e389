"""What a job costs, written beside its outputs: time, counted work, memory, energy."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from proard.artifacts import COSTS, Provenance, write_table
from proard.space import Tally, Work
from proard.stages.energy import EnergyMeter

FILE = "costs.parquet"
ADDED_UP = ("attempts", "seconds", "energy_wh")
LARGEST = ("peak_rss_bytes", "peak_cuda_bytes")


def job_of(folder: Path, stage: str) -> str:
    """Name of a job: its folder inside that of its stage, as in `NAME` or `NAME/PHASE`."""
    parts = folder.parts
    inside = parts[len(parts) - parts[::-1].index(stage) :] if stage in parts else parts[-1:]
    return "/".join(inside)


class Ledger:
    """Costs of one job, from its creation to `write`.

    Parameters
    ----------
    stage : str
        Name of the stage.
    output : path
        One of the job's outputs; the table lies beside it. Its folder names the job, where it is not the stage's.
    device : str
        Where networks run; a job on a GPU holds one, any other job its threads.
    threads : int
        CPU threads of the job.
    processes : int
        Processes that train together; on GPUs each holds one.

    Attributes
    ----------
    trained : Work
        Of the training, over all its attempts.
    tally : Tally
        Of measuring networks.
    alone : tuple of float
        Passes of one image in a step that trains a subnet of the phase alone (`training.passes_alone`), of a phase.
    """

    def __init__(self, stage: str, output: str | Path, *, device: str, threads: int, processes: int = 1) -> None:
        folder = Path(output).parent
        self.stage, self.path, self.job = stage, folder / FILE, job_of(folder, stage)
        self.on_gpu, self.threads, self.processes = device.startswith("cuda"), threads, processes
        self.trained, self.tally = Work(), Tally()
        self.alone: tuple[float | None, float | None] = (None, None)
        self.earlier: dict[str, Any] = {}
        self.started, self.energy = time.monotonic(), EnergyMeter(gpu=self.on_gpu)
        if self.on_gpu:
            _cuda().reset_peak_memory_stats()

    def state(self) -> dict[str, Any]:
        """Costs so far, earlier attempts included; plain numbers, for a resume state."""
        here = {
            "attempts": 1,
            "seconds": time.monotonic() - self.started,
            "energy_wh": self.energy.read(),
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_cuda_bytes": _cuda().max_memory_allocated() if self.on_gpu else None,
        }
        for name in ADDED_UP:
            here[name] = _both(lambda a, b: a + b, here[name], self.earlier.get(name))
        for name in LARGEST:
            here[name] = _both(max, here[name], self.earlier.get(name))
        return {**here, "tally": asdict(self.tally)}

    def resume(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what `state` gave in an earlier attempt; None where that did not count its costs."""
        if state is None:
            return
        self.earlier = {name: state[name] for name in (*ADDED_UP, *LARGEST)}
        before = state["tally"]
        self.tally.spent += Work(**before["spent"])
        self.tally.cached += Work(**before["cached"])
        self.tally.cached_seconds += before["cached_seconds"]

    def row(self) -> dict[str, Any]:
        """The job as a row of the COSTS table."""
        costs = self.state()
        tally = costs.pop("tally")
        devices = self.processes if self.on_gpu else self.threads
        done = self.trained + self.tally.spent
        return {
            **costs,
            "stage": self.stage,
            "job": self.job,
            "device": _cuda().get_device_name() if self.on_gpu else "cpu",
            "devices": devices,
            "device_seconds": devices * costs["seconds"],
            "forward_equivalents": done.forwards,
            "work_macs": done.macs,
            "weight_gradients": self.trained.weight_gradients,
            "train_forward_equivalents": self.trained.forwards,
            "train_macs": self.trained.macs,
            "alone_forward_equivalents": self.alone[0],
            "alone_other_forwards": self.alone[1],
            "measure_forward_equivalents": self.tally.spent.forwards,
            "measure_macs": self.tally.spent.macs,
            "cached_forward_equivalents": self.tally.cached.forwards,
            "cached_macs": self.tally.cached.macs,
            "cached_seconds": tally["cached_seconds"],
            "energy_method": self.energy.method,
        }

    def write(self, provenance: Provenance) -> None:
        """Write the table."""
        write_table(self.path, [{**self.row(), "seed": provenance.seed}], COSTS, provenance)


def _cuda() -> Any:
    """`torch.cuda`, where a job holds a GPU."""
    import torch

    return torch.cuda


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB elsewhere
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _both(combine: Any, first: float | None, second: float | None) -> float | None:
    """Combine two figures; the known one where the other is not."""
    known = [value for value in (first, second) if value is not None]
    return combine(*known) if len(known) == 2 else known[0] if known else None
