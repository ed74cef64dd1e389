"""Differences between systems: the number of cores a process may use, and the characters of its output."""

from __future__ import annotations

import os
import sys


def usable_cores() -> int:
    """CPU cores that this process may use; all cores if the system has no limit per process (macOS)."""
    limited = getattr(os, "sched_getaffinity", None)
    return len(limited(0)) if limited else os.cpu_count() or 1


def take_any_character() -> None:
    """Let the output replace characters missing in its encoding (a C locale has only ASCII) instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")
