"""Runs of the workflow on the tests' SLURM: started with the repository's profile, disturbed, and compared."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import yaml
from filelock import FileLock
from mini_slurm import Slurm, die_with_parent
from pipeline_runs import SHORT, SMALL

from proard.artifacts import read_header, read_table

ROOT = Path(__file__).parents[1]
CONFIG = {
    **SMALL,
    "train_phase": {
        "phases": [
            {"name": "depth", "width": [1.0], **SHORT},
            {"name": "all", **SHORT, "epochs": 24},
        ]
    },
    "evaluate_archs": {**SMALL["evaluate_archs"], "archs_per_shard": 4},
}
FROM_PHASE = ["train_phase/all", "evaluate_archs", "merge_table", "fit_predictor", "search_front", "verify_front"]
FROM_PHASE += ["select_student", "export_student", "autoattack_student", "check_student", "describe_student"]
FROM_PHASE += ["quantize_student", "report", "cache"]
# A machine of 2 cores has no 8 for a job; the number of threads is part of the weights, so all runs have the same.
THREADS = ["prepare_data", "train_teacher", "train_control", "train_phase", "fit_predictor", "search_front"]
THREADS += ["verify_front", "autoattack_student"]
ONE_THREAD = ["--set-threads", *(f"{rule}=1" for rule in THREADS)]
IMPATIENT = ["--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "5"]


class Run:
    """A run in a folder of its own; commands start in the repository's root, where the profile's link lies."""

    def __init__(self, folder: Path, slurm: Slurm | None = None) -> None:
        self.folder, self.slurm, self.started = folder, slurm, []
        self.results, self.logs = folder / "results" / CONFIG["run"], folder / "logs" / CONFIG["run"]
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(CONFIG))
        self.options = ["--configfile", "config/quickstart.yaml", config, "--directory", folder, *ONE_THREAD]
        self.profile: list[str | Path] = ["--profile", "slurm", *IMPATIENT] if slurm else ["--cores", "2"]

    def start(self, *arguments: str | Path) -> subprocess.Popen:
        """Start Snakemake in a process group of its own."""
        command = [sys.executable, "-m", "snakemake", *arguments, *self.profile, *self.options]
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=self.slurm.environment if self.slurm else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.started.append(process)
        return process

    def __call__(self, *arguments: str | Path, status: int = 0) -> str:
        """Run to the end; what Snakemake printed."""
        return self.end(self.start(*arguments), status=status)

    def end(self, process: subprocess.Popen, *, status: int = 0, seconds: float = 1200) -> str:
        """Wait for a started run; what it printed. A wrong exit status shows it."""
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            jobs = self.slurm.jobs() if self.slurm else ""
            raise AssertionError(f"Snakemake did not end\n{output[-6000:]}\n{jobs}") from None
        assert process.returncode == status, output[-6000:]
        return output

    def stop(self) -> None:
        """Kill what still runs, here and in the queue."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        self.slurm("scancel", *self.jobs("", states="pending,running"), check=False)

    def remove(self, names: Iterable[str]) -> None:
        """Remove results, as if they had never been made."""
        for name in names:
            shutil.rmtree(self.results / name)

    # The jobs and processes of the phase `all`.

    def trains(self, process: subprocess.Popen) -> str:
        """Wait until the phase has saved a state; the id of its job."""
        state = self.results / "train_phase" / "all" / "supernet.state"
        wait_until(state.exists, "the phase saved no state", process)
        (job,) = self.jobs("train_phase", states="running")
        return job

    def jobs(self, rule: str, *, states: str = "all") -> dict[str, dict[str, str]]:
        """The jobs of a rule in this run, by id; other runs may have used the same cluster."""
        found = self.slurm.jobs(f"rule_{rule}", states=states)
        return {number: job for number, job in found.items() if job["folder"] == str(self.folder)}

    def states(self, rule: str) -> list[str]:
        """How the jobs of a rule ended, in the order of their submission."""
        return [job["state"] for job in self.jobs(rule).values()]

    def signal_trainers(self, number: signal.Signals) -> int:
        """Send a signal to the python processes of the phase only, not to their parents; return their number."""
        found = 0
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                here = (entry / "cwd").samefile(self.folder)
            except OSError:  # gone, or not ours
                continue
            if here and b"python" in words[0] and words[1:3] == [b"-m", b"proard.stages.train_phase"]:
                os.kill(int(entry.name), number)
                found += 1
        return found

    def resumed(self) -> bool:
        """Whether the phase's last attempt continued from a state."""
        return "resumed after step" in (self.logs / "train_phase" / "all.log").read_text()

    # Results.

    def weights(self) -> dict[str, str]:
        """Checksums of all weights."""
        files = sorted(self.results.rglob("*.safetensors"))
        return {str(path.relative_to(self.results)): read_header(path).get("checksum") for path in files}

    def tables(self) -> dict[str, pd.DataFrame]:
        """All tables except the ledgers of costs, without wall times."""
        files = [path for path in sorted(self.results.rglob("*.parquet")) if path.name != "costs.parquet"]
        times = ["seconds", "latency_ms"]
        return {
            str(path.relative_to(self.results)): read_table(path).drop(columns=times, errors="ignore") for path in files
        }

    def parity(self) -> list[bool]:
        """Whether each exported student equals the measured one."""
        files = sorted(self.results.glob("export_student/*/parity.json"))
        return [json.loads(path.read_text())["passed"] for path in files]


def copy_of(run: Run, folder: Path, slurm: Slurm, *, without: Iterable[str]) -> Run:
    """A finished run again, on the cluster, with some of its results missing."""
    shutil.copytree(run.folder, folder, symlinks=True)
    copied = Run(folder, slurm)
    os.utime(folder / "config.yaml")
    copied.remove(without)
    return copied


def same(first: Run, second: Run) -> bool:
    """Whether two runs have the same tables and the same weights, to the last bit."""
    ours, theirs = first.tables(), second.tables()
    assert ours.keys() == theirs.keys()
    for name, table in ours.items():
        pd.testing.assert_frame_equal(table, theirs[name], check_exact=True, obj=name)
    assert first.weights() == second.weights()
    return True


def wait_until(holds: Callable[[], object], what: str, process: subprocess.Popen, *, seconds: float = 240) -> None:
    """Wait while Snakemake runs; its output shows why it ended before its time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, process.communicate()[0][-6000:]
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def made_once(folder: Path, make: Callable[[], None]) -> None:
    """Let one of the test processes make a file that all of them read."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        done = folder.with_suffix(".done")
        if not done.exists():
            make()
            done.touch()
