"""Which image files a run reads: a fingerprint that changes with them, so that the workflow reads them again."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from proard.config.columns import matching_paths
from proard.config.fields import DataError
from proard.config.folders import class_folders, list_images
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
            for path, status in _files(text, settings.source):
                line = f"{path}\t{status.st_size}\t{status.st_mtime_ns}\n"
                digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _files(pattern: str, source: str) -> Iterator[tuple[str, os.stat_result]]:
    """Image files of one path or glob, in order, by their path from there: those that `prepare_data` reads."""
    for match in matching_paths(pattern, folder_holds="*.parquet" if source == "parquet" else None):
        in_folders = source == "imagefolder" and match.is_dir()
        try:
            files = _of_classes(match) if in_folders else [match]
        except (OSError, DataError):  # a folder that cannot be read: `prepare_data` names it
            continue
        for file in files:
            if file.exists():  # not deleted meanwhile
                yield os.path.relpath(file, match) if in_folders else file.name, file.stat()


def _of_classes(root: Path) -> list[Path]:
    """Image files of all class folders."""
    return [file for name in class_folders(root) for file, _ in list_images(root, name, Counter())]
