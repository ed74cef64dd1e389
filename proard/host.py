"""Differences between systems: cores a process may use, the processor, the characters of the output."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

INTEGER_FLAGS = r"avx2|avx512\w*|avx_\w+|avx10\w*|amx_\w+|asimd\w*|i8mm|sve\w*"  # decide which integer kernels run


def usable_cores() -> int:
    """CPU cores that this process may use; all cores if the system has no limit per process (macOS)."""
    limited = getattr(os, "sched_getaffinity", None)
    return len(limited(0)) if limited else os.cpu_count() or 1


def processor() -> tuple[str, tuple[str, ...]]:
    """The processor's name, and those of its flags that decide which integer kernels run; none outside Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), ()
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)
    found = sorted(flag for flag in (flags[1].split() if flags else ()) if re.fullmatch(INTEGER_FLAGS, flag))
    return name[1] if name else platform.machine(), tuple(found)


def take_any_character() -> None:
    """Let the output replace characters missing in its encoding (a C locale has only ASCII) instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")
