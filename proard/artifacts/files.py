"""Atomic writes: a run that is killed at any moment leaves no half-written file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from proard.config import UserError


class ArtifactError(UserError):
    """A file of a run is missing, damaged or from another run: the text names it and what to rerun."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush and rename it, on failure remove it.

    Raises
    ------
    ArtifactError
        The disk is full. Libraries report this either by an error number or by a text.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except Exception as error:
        if not _is_full(error):
            raise
        said = f"no space left to write {path.name} in {path.parent}, or the quota is exceeded"
        raise ArtifactError(f"{said}; free some space, then repeat the same command: it continues") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _is_full(error: Exception) -> bool:
    """Whether an error reports a full disk or quota."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in numbers:
        return True
    return any(f"os error {number}" in str(error) for number in numbers)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def sha256(path: str | Path) -> str:
    """Checksum of a file's bytes, in hexadecimal.

    Raises
    ------
    ArtifactError
        The file does not exist.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); rerun the stage that writes it") from None
