"""Facts about the machine of a process, as one line of JSON: `python -m proard.doctor.probe [FOLDER]`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

from proard import __version__

TOKEN, HELD = "token", "held"  # files of the calling process: one to read, one that it keeps locked


def facts(folder: Path | None) -> dict[str, Any]:
    """Python, package, torch and its GPUs; whether the caller's folder can be read, written and locked."""
    import torch

    found: dict[str, Any] = {
        "host": os.uname().nodename,
        "python": sys.executable,
        "proard": __version__,
        "package": str(Path(__file__).parents[1]),
        "torch": torch.__version__,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    if folder is not None:
        found["token"] = (folder / TOKEN).read_text("utf-8") if (folder / TOKEN).exists() else None
        found["respects_locks"] = (folder / HELD).exists() and is_locked(folder / HELD)
    return found


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock of a file, so that this one cannot acquire it."""
    try:
        with FileLock(path, timeout=0):
            return False
    except OSError:  # filelock.Timeout is a subclass
        return True


def main() -> None:
    """Print the facts; write them to FOLDER too, to test that this works."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    line = json.dumps(facts(folder))
    if folder is not None:
        (folder / "answer.part").write_text(line, encoding="utf-8")
        (folder / "answer.part").replace(folder / "answer.json")
    print(line)


if __name__ == "__main__":
    main()
