"""What systems do not have in common: how many cores a process may use, which characters its output takes."""

from __future__ import annotations

import os
import sys


def usable_cores() -> int:
    """CPU cores that this process may use; all of the machine's where the system does not limit them (macOS)."""
    limited = getattr(os, "sched_getaffinity", None)
    return len(limited(0)) if limited else os.cpu_count() or 1


def take_any_character() -> None:
    """Let the output replace what its encoding lacks (a C locale has ASCII alone), instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")
