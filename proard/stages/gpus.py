"""One GPU for one job where no scheduler hands them out: a lock for every GPU, held as long as the process lives."""

from __future__ import annotations

import os
import tempfile
from itertools import count as numbers
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

HELD: list[BaseFileLock] = []  # locks of this process


def claim_gpu(visible: int, *, folder: Path | None = None) -> int:
    """Take a GPU that no other job of this user on this machine holds; where all are taken, one with the fewest jobs.

    Parameters
    ----------
    visible : int
        GPUs that the process sees, at least one. CUDA_VISIBLE_DEVICES tells which of the machine's they are.
    folder : path, optional
        Where the locks lie; by default in the system's folder for temporary files.

    Returns
    -------
    int
        Index among the visible ones.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"proard-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = names if len(names) == visible else [str(index) for index in range(visible)]
    for share in numbers():
        for index, name in enumerate(names):
            lock = FileLock(folder / f"{name}.{share}")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            HELD.append(lock)
            return index
    raise AssertionError("a lock nobody ever held is free")
