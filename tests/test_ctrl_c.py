"""A real run that a user stops: by Ctrl-C in a terminal, and by signals to Snakemake alone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from pipeline_runs import Run


class Stoppable(Run):
    """A teacher's training that lasts longer than the test."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        long = folder / "long.yaml"
        long.write_text("train_teacher: {epochs: 4000}")
        self.options.append(long)
        self.log = folder / "logs" / "small" / "train_teacher.log"

    def stop(self, when: Callable[[], bool], *, alone: int = 0) -> str:
        """Start, interrupt Snakemake alone so many times, or all as a terminal does; what was printed."""
        process = self.start("train_teacher")
        wait(process, when)
        if alone == 0:
            os.killpg(process.pid, signal.SIGINT)
        for number in range(alone):
            process.send_signal(signal.SIGINT)
            time.sleep(1 if number + 1 < alone else 0)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 1, output
        return output


def wait(process: subprocess.Popen, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not until():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_stopped_run_loses_no_finished_job_and_the_same_command_continues(tmp_path: Path):
    run = Stoppable(tmp_path)
    state = run.results / "train_teacher" / "teacher.state"
    last = "Stopped. Trainings have saved their state, measurements are kept; the same command continues."
    reading = tmp_path / "logs" / "small" / "prepare_data.log"

    output = run.stop(reading.exists, alone=1)
    assert output.rstrip().splitlines()[-1] == last
    assert (run.results / "prepare_data" / "manifest.json").exists()

    output = run.stop(state.exists, alone=2)
    assert "rule prepare_data:" not in output
    assert "error: teacher: stopped by SIGINT after step" in output
    assert output.rstrip().splitlines()[-1] == last

    output = run.stop(lambda: run.log.exists() and "resumed after step" in run.log.read_text())
    assert "error: teacher: stopped by SIGINT after step" in run.log.read_text()
    assert "Traceback" not in output
    assert output.rstrip().splitlines()[-1] == last
    assert state.exists()
