"""Memory and time of a student on an Ethos-U microcontroller NPU, as Arm's compiler Vela estimates them.

Vela's packages pin versions that the package's own environment need not have, so it runs in another one, which holds
exactly `requirements.lock`. No board is needed, and nothing is measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from proard.artifacts import read_header
from proard.config import UserError
from proard.export.executorch import deployable, zero_image
from proard.export.formats import load_student, quiet
from proard.export.usage import WEIGHTS

HOME = Path(__file__).parents[1] / "runs" / "repository" / "environments" / "ethos-u"
LOCK, SCRIPT = HOME / "requirements.lock", HOME / "estimate.py"
NUMBERS = {
    "sram_kib": r"Total SRAM used\s+([\d.]+) KiB",
    "flash_kib": r"Total (?:Off-chip|On-chip) Flash used\s+([\d.]+) KiB",
    "dram_kib": r"Total DRAM used\s+([\d.]+) KiB",
    "cycles": r"Total cycles\s+(\d+) cycles/batch",
    "clock_mhz": r"Accelerator clock\s+([\d.]+) MHz",
    "cpu_operators": r"CPU operators = (\d+)",
    "npu_operators": r"NPU operators = (\d+)",
}
TEXTS = {"system": r"System configuration\s+(\S+)", "memory": r"Memory mode\s+(\S+)"}


def estimate(
    student: str | Path, target: str, *, python: str | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """What Vela says of an exported student.

    Parameters
    ----------
    student : path
        Folder of an export, or its `student.safetensors`.
    target : str
        Such as `ethos-u55-128`.
    python : str, optional
        Interpreter of an environment that has the packages of `requirements.lock`; else one is made, once.
    say : callable
        Called with a line before something takes long.

    Returns
    -------
    dict
        `sram_kib`, `flash_kib` (None where the system has none), `dram_kib`, `cycles`, `milliseconds`, `clock_mhz`,
        `macs` of the network, `system` and `memory` of Vela's configuration, `undelegated` operators, versions.

    Raises
    ------
    UserError
        The environment cannot be made, the compiler fails, or an operator does not run on the NPU.
    """
    weights = Path(student) / WEIGHTS if Path(student).is_dir() else Path(student)
    net, header = load_student(weights), read_header(weights)
    interpreter = python or environment(say)
    with tempfile.TemporaryDirectory() as folder, quiet():
        program = Path(folder) / "student.pt2"
        torch.export.save(torch.export.export(deployable(net), (zero_image(net),), strict=False), program)
        report = _run([interpreter, str(SCRIPT), str(program), target], "Vela's compilation", folder=folder)
    found = {"name": header["name"], "budget": header["budget"], "macs": header["macs"], "target": target}
    found |= parse_report(report)
    if found["undelegated"] or found["cpu_operators"]:
        left = ", ".join(found["undelegated"]) or f"{found['cpu_operators']} operators, which Vela does not name"
        raise UserError(f"{weights}: {target} does not run {left}; an estimate of the rest would be too low")
    return found


def parse_report(text: str) -> dict[str, Any]:
    """Figures of Vela's summary, and the line of JSON behind it.

    Raises
    ------
    UserError
        Memory, cycles or clock are not in the text.
    """
    found: dict[str, Any] = {}
    for name, pattern in NUMBERS.items():
        match = re.search(pattern, text)
        found[name] = None if match is None else float(match[1]) if "." in match[1] else int(match[1])
    for name, pattern in TEXTS.items():
        match = re.search(pattern, text)
        found[name] = match[1] if match else None
    missing = [name for name in ("sram_kib", "cycles", "clock_mhz") if found[name] is None]
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if missing or not lines:
        raise UserError(
            f"the compiler's report has no {', '.join(missing) or 'versions'}; use the versions of {LOCK.name}"
        )
    return {**found, "milliseconds": found["cycles"] / (1e3 * found["clock_mhz"]), **json.loads(lines[-1])}


def environment(say: Callable[[str], None]) -> str:
    """The interpreter of the compiler's environment, which is made at the first use, in the user's cache folder.

    Raises
    ------
    UserError
        Its packages cannot be installed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "proard"
    folder = cache / f"ethos-u-{hashlib.sha256(LOCK.read_bytes()).hexdigest()[:8]}"
    interpreter, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        say(f"making the environment of Vela in {folder}, once; torch is large, this takes minutes")
        _run([sys.executable, "-m", "venv", "--clear", str(folder)], "making the environment")
        _run([str(interpreter), "-m", "pip", "install", "--quiet", "-r", str(LOCK)], "installing its packages")
        complete.touch()
    return str(interpreter)


def _run(command: list[str], what: str, *, folder: str | None = None) -> str:
    """Output of a command in an environment that is not this one.

    Raises
    ------
    UserError
        It cannot be started, or fails; the message has its last line.
    """
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=folder)
    except OSError as error:
        raise UserError(f"{what} failed: {command[0]} cannot be started ({error.strerror})") from None
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise UserError(f"{what} failed: {lines[-1] if lines else f'exit status {done.returncode}'}")
    return done.stdout
