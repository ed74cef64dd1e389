"""Which image files a run reads: a fingerprint that changes with them, so that the workflow reads them again."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from proard.config.images import PrepareData


def image_fingerprint(settings: PrepareData) -> str:
    """Hash of the paths, sizes and modification times of the user's image files; nothing is opened.

    Returns
    -------
    str
        16 hex digits; empty for images that a library brings: `digits`, and CIFAR, whose files torchvision accepts
        only with the published checksums. A path that does not exist counts as no file: `prepare_data` names it.
    """
    if settings.source not in ("parquet", "imagefolder"):
        return ""
    digest = hashlib.sha256()
    for paths in (settings.train, settings.test):
        for text in (paths,) if isinstance(paths, str) else paths or ():
            digest.update(f"{text}\n".encode(errors="surrogateescape"))  # as written: another checkout, the same words
            for path, status in _files(os.path.expanduser(text)):
                line = f"{path}\t{status.st_size}\t{status.st_mtime_ns}\n"
                digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _files(pattern: str) -> Iterator[tuple[str, os.stat_result]]:
    """Files of one path or glob and those below its folders, in order, by their path from there."""
    matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    for match in matches:
        for file in _below(Path(match)) if os.path.isdir(match) else [Path(match)]:
            try:
                yield os.path.relpath(file, match) if os.path.isdir(match) else file.name, file.stat()
            except OSError:  # a broken link, or deleted meanwhile
                continue


def _below(folder: Path) -> Iterator[Path]:
    """Files below a folder, linked folders included; hidden names and names in @ are no images."""
    seen = {folder.resolve()}
    for parent, folders, files in os.walk(folder, followlinks=True):
        inside = {name: (Path(parent) / name).resolve() for name in sorted(folders) if name[0] not in ".@"}
        folders[:] = [name for name, place in inside.items() if place not in seen]  # a link may lead back up
        seen |= set(inside.values())
        yield from (Path(parent) / name for name in sorted(files) if name[0] not in ".@")
