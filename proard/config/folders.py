"""Image files of a class folder: all formats that Pillow decodes, in linked folders too, without hidden files."""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from pathlib import Path

from proard.config.fields import DataError

NOT_DECODED = {"EPS", "MPEG"}  # EPS needs Ghostscript; of MPEG Pillow reads only the size


@cache
def readable_suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the formats that the installed Pillow decodes itself."""
    from PIL import Image, ImageFile  # imported here: Snakemake, which only reads settings, rarely needs it

    Image.init()
    readers = {name: reader for name, (reader, _) in Image.OPEN.items() if isinstance(reader, type)}
    stubs = {name for name, reader in readers.items() if issubclass(reader, ImageFile.StubImageFile)}  # no decoder
    formats = {*Image.OPEN, "MPO"} - stubs - NOT_DECODED  # the JPEG reader opens MPO
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def is_hidden_folder(name: str) -> bool:
    """Whether a program created the folder, not the user: `.ipynb_checkpoints`, `.thumbnails`, `@eaDir`."""
    return name.startswith((".", "@"))


def class_folders(root: Path) -> list[str]:
    """Names of the class folders, sorted."""
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not is_hidden_folder(entry.name))


def list_images(root: Path, name: str, left_out: Counter[str]) -> list[tuple[Path, str]]:
    """List the image files below `root/name`, at any depth.

    Linked folders are followed, unless they lead to a folder that contains the link or `root`.

    Parameters
    ----------
    left_out : Counter
        Entries that are not read are added to it, by suffix or reason.

    Returns
    -------
    list of (Path, str)
        Path of each file, sorted, and its real path with all links resolved.
    """
    base, seen = os.path.realpath(root), set()
    files: list[tuple[Path, str]] = []
    linked: list[Path] = []
    folders = [root / name]  # links come last: a file found directly keeps its own path
    while folders or linked:
        folder = folders.pop() if folders else linked.pop()
        real = os.path.realpath(folder)
        if real in seen or not folder.is_dir() or _holds(real, base):
            continue
        seen.add(real)
        for entry in _entries(folder):
            path = folder / entry.name
            if entry.is_dir():
                if is_hidden_folder(entry.name):
                    left_out["hidden"] += 1
                elif not entry.is_symlink():
                    folders.append(path)
                elif _holds(os.path.realpath(path), real):
                    left_out["linked in a loop"] += 1
                else:
                    linked.append(path)
            elif entry.name.startswith("."):
                left_out["hidden"] += 1
            elif path.suffix.lower() in readable_suffixes():
                files.append((path, os.path.realpath(path) if entry.is_symlink() else os.path.join(real, entry.name)))
            else:
                left_out[path.suffix.lower() or "without suffix"] += 1
    return sorted(files)


def _holds(folder: str, inner: str) -> bool:
    """Whether `folder` is `inner` or one of its parents; both with links resolved."""
    return Path(inner).is_relative_to(folder)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read ({error.strerror})") from None
