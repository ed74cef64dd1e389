"""Electrical energy of this process, read or estimated by CodeCarbon: no network, no file, no output."""

from __future__ import annotations

import contextlib
import logging
import re
import weakref
from pathlib import Path
from threading import Thread, current_thread
from typing import Any

COUNTRY = "USA"  # the tracker needs one; only energy is kept, and the report converts it for the country it is told
SECONDS_BETWEEN_READINGS = 15.0
WH_PER_KWH = 1e3
COUNTERS = {  # what CodeCarbon calls the way it reads a CPU
    "CPU(Intel Rapl)": "CPU: RAPL counter of the whole socket",
    "CPU(Cpu Load)": "CPU: estimate, load times rated power",
}


class EnergyMeter:
    """Energy from its creation on.

    CodeCarbon looks for counters; that happens in a thread beside the job. Where it finds none it
    estimates, and `method` says so; where it fails, there is no figure.

    Parameters
    ----------
    gpu : bool
        Whether the job holds the visible GPUs, so that theirs counts as well.
    """

    def __init__(self, *, gpu: bool = False) -> None:
        self._gpu, self._reading = gpu, _Reading()
        self._starting = Thread(target=_start, args=(self._reading,), daemon=True)
        self._starting.start()
        weakref.finalize(self, _stop, self._reading, self._starting)  # a job that fails reads nothing

    def read(self) -> float | None:
        """Watt-hours so far; None where there is no figure."""
        self._starting.join()
        try:
            self._reading.tracker.flush()
            data = self._reading.data
            parts = [data.cpu_energy, data.ram_energy] + ([data.gpu_energy] if self._gpu else [])
            return WH_PER_KWH * float(sum(parts))
        except Exception:  # of any kind, from a driver: a job must not fail because its energy is unknown
            return None

    @property
    def method(self) -> str:
        """How the figure came about."""
        self._starting.join()
        if self._reading.failure is not None or not self._reading.hardware:
            return f"none: {self._reading.failure or 'no hardware was found'}"
        found = [COUNTERS.get(name, name) for name in self._reading.hardware]
        words = ["RAM: estimate by size" if name.startswith("RAM") else name for name in found]
        gpus = [] if self._gpu else ["GPU"]
        kept = [name for name in words if not name.startswith(tuple(gpus))] if gpus else words
        return f"codecarbon {self._reading.version}: " + "; ".join(sorted(kept))


class _Reading:
    """Output handler of the tracker, which passes its totals to `out`."""

    def __init__(self) -> None:
        self.tracker: Any = None
        self.data: Any = None
        self.hardware: list[str] = []
        self.version = ""
        self.failure: str | None = None

    def out(self, total: Any, _delta: Any) -> None:
        """Keep the newest totals."""
        self.data = total

    def live_out(self, total: Any, _delta: Any) -> None:
        """Keep the newest totals."""
        self.data = total

    def task_out(self, _data: Any, _experiment_name: str) -> None:
        """Nothing: there are no tasks."""

    def exit(self) -> None:
        """Nothing to close."""


def read_brand_alone(path: Path = Path("/proc/cpuinfo")) -> None:
    """Let py-cpuinfo read the processor's brand from the system and nothing else, where the system says it.

    CodeCarbon reads nothing but the brand, and the rest takes a second of processor time in every job.
    """
    import cpuinfo

    with contextlib.suppress(OSError):
        found = re.search(
            r"^model name\s*:\s*(\S.*)$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
        )
        if found:
            cpuinfo.get_cpu_info = lambda: {"brand_raw": found[1].strip()}


def _start(reading: _Reading) -> None:
    """Find the counters and start reading them."""
    try:
        import codecarbon

        read_brand_alone()
        logging.getLogger("codecarbon").disabled = True
        reading.version = codecarbon.__version__
        reading.tracker = codecarbon.OfflineEmissionsTracker(
            country_iso_code=COUNTRY,
            tracking_mode="process",
            measure_power_secs=SECONDS_BETWEEN_READINGS,
            allow_multiple_runs=True,
            output_methods=[],
            emissions_endpoint=None,
            electricitymaps_api_token=None,
            output_handlers=[reading],
        )
        reading.tracker.start()
        reading.hardware = [str(item) for item in reading.tracker._conf.get("hardware", [])]
    except Exception as error:
        reading.failure = f"{type(error).__name__}: {error}"


def _stop(reading: _Reading, starting: Thread) -> None:
    """End the tracker's threads."""
    if starting is not current_thread():  # the meter may be finalised in that very thread
        starting.join()
    try:
        reading.tracker.stop()
    except Exception:  # it never started
        return
