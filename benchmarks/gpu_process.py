"""A process per section of the GPU benchmark: what one of them loses, a CUDA context say, no other one misses."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from gpu_sections import Result, Section, Start, prepare, run_section

from proard.artifacts.files import write_text

SCRIPT = Path(__file__).with_name("bench_gpu.py")
SANITIZER = "compute-sanitizer"
CHECKS = ("--tool", "memcheck", "--report-api-errors", "no", "--target-processes", "application-only")
FAULT = 86  # its exit code where it has found an access out of bounds


class OwnProcess:
    """A section's process. It loads and prepares what needs no device, then waits for its turn.

    Parameters
    ----------
    section : Section
    args : Namespace
        `args.argv` is the command line that it comes from.
    """

    def __init__(self, section: Section, args: Namespace) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "result.json"
        own = [sys.executable, str(SCRIPT), *args.argv, "--one", section.title, "--result", str(self.path)]
        tool = sanitizer(section, args.device)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if tool:  # torch would keep freed memory and hide what reads it
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        self.process = subprocess.Popen(
            [*tool, *own], stdin=subprocess.PIPE, env=environment, text=True, start_new_session=True
        )

    def finish(self, start: Start, seconds: float) -> Result:
        """Give it its turn and wait for what it gives, at most so many seconds."""
        try:
            self.process.communicate(json.dumps(asdict(start)) + "\n", timeout=max(seconds, 0))
        except subprocess.TimeoutExpired:
            return Result("failed", f"stopped after {seconds:.0f} s")
        except BrokenPipeError:  # it ended before its turn
            self.process.wait()
        finally:
            self._kill()
        code = self.process.returncode
        if code == FAULT:
            return Result("failed", f"{SANITIZER} found accesses out of bounds, see above")
        if self.path.exists():
            return Result(**json.loads(self.path.read_text(encoding="utf-8")))
        why = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
        return Result("failed", f"its process ended with {why}")

    def stop(self) -> None:
        """End it, and remove its folder."""
        self._kill()
        self.folder.cleanup()

    def _kill(self) -> None:
        """End it and what it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def sanitizer(section: Section, device: str) -> list[str]:
    """The words before the command of a section that is run under the sanitizer, where it is installed."""
    tool = shutil.which(SANITIZER) if section.proves_kernels and device == "cuda" else None
    return [tool, *CHECKS, "--error-exitcode", str(FAULT)] if tool else []


def run_as_process(section: Section, args: Namespace) -> None:
    """What a section's process does: prepare, wait for its turn, run, write the result."""
    problem = prepare(section, args)
    line = sys.stdin.readline()
    if not line:  # the benchmark has ended
        return
    result = run_section(section, args, problem, Start(**json.loads(line)))
    write_text(args.result, json.dumps(asdict(result)))
