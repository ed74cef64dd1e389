"""One thing that was checked."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

SECONDS = 60  # limit for a cluster command


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes
    ----------
    name : str
        What was checked.
    result : str
        What was found.
    fix : str
        What to do about it; empty where there is nothing to do.
    fails : bool
        Whether a run would fail because of it. If False, a finding with a fix is a remark.
    """

    name: str
    result: str
    fix: str = ""
    fails: bool = False


def failure(name: str, result: str, fix: str) -> Finding:
    """A finding because of which a run would fail."""
    return Finding(name, result, fix, fails=True)


def run_command(*command: str, stdin: str | None = None, seconds: float = SECONDS) -> tuple[bool, str]:
    """Run a command; return whether it succeeded, and its output or its error in one line."""
    if shutil.which(command[0]) is None:
        return False, f"there is no command {command[0]}"
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return False, f"{command[0]} did not answer within {seconds:g} s"
    except OSError as error:
        return False, f"{command[0]} cannot be run ({error.strerror})"
    if done.returncode == 0:
        return True, done.stdout.strip()
    return False, in_a_line(done.stderr or done.stdout) or f"{command[0]} ended with status {done.returncode}"


def in_a_line(text: str) -> str:
    """An error's lines as one line, without the command's name before each."""
    lines = [re.sub(r"^\w+: ((error|fatal): )?", "", line.strip()) for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line))[-400:]


def listing(names: Sequence[str]) -> str:
    """Names in a list; `none` where there are none."""
    return ", ".join(names) or "none"
