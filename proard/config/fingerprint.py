"""A fingerprint of the image files of a run: if it changes, the workflow reads them again."""

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
    """Hash of the paths, sizes and modification times of the user's image files; no file is opened.

    Returns
    -------
    str
        16 hex digits; empty for images that come from a library alone: `digits`, and CIFAR, for which torchvision
        checks the published checksums. A path that does not exist counts as no file; `prepare_data` reports it.
    """
    read = []
    if settings.source in ("parquet", "imagefolder"):
        read += [(settings.train, settings.source), (settings.test, settings.source)]
    if settings.additional is not None:
        read += [(settings.additional.files, "parquet")]
    if not read:
        return ""
    digest = hashlib.sha256()
    for paths, source in read:
        for text in (paths,) if isinstance(paths, str) else paths or ():
            digest.update(f"{text}\n".encode(errors="surrogateescape"))  # as in the config: equal in every checkout
            for path, status in _files(text, source):
                line = f"{path}\t{status.st_size}\t{status.st_mtime_ns}\n"
                digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _files(pattern: str, source: str) -> Iterator[tuple[str, os.stat_result]]:
    """Image files that `prepare_data` reads for one path or glob: sorted, as relative paths."""
    for match in matching_paths(pattern, folder_holds="*.parquet" if source == "parquet" else None):
        in_folders = source == "imagefolder" and match.is_dir()
        try:
            files = _of_classes(match) if in_folders else [match]
        except (OSError, DataError):  # a folder that cannot be read: `prepare_data` reports it
            continue
        for file in files:
            if file.exists():  # not deleted meanwhile
                yield os.path.relpath(file, match) if in_folders else file.name, file.stat()


def _of_classes(root: Path) -> list[Path]:
    """The image files of all class folders."""
    return [file for name in class_folders(root) for file, _ in list_images(root, name, Counter())]
