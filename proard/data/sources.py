"""Sources of images: bundled digits, CIFAR, Parquet files, folders. Labels are read first, pixels on demand."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proard.config import DataError, PrepareData
from proard.config.columns import matching_paths
from proard.config.folders import class_folders, list_images
from proard.data.decode import Decoded, Encoded, decode_all
from proard.data.parquet import ImageTable, open_parquet

READ_AHEAD = 4096  # files per batch of the decoder


@dataclass(frozen=True)
class Source:
    """Labelled images that are not decoded yet.

    Attributes
    ----------
    name : str
        Name of the source, for messages.
    labels : ndarray of shape (n,)
        Class index of each image.
    classes : tuple of str
        Class names in label order.
    where : callable
        Maps an index to the location of that image, for messages.
    read : callable
        Maps indices in any order to their images, uint8 of shape (k, height, width, channels), and digests.
    files : tuple of Path
        Files or folders that are read; empty for data from a library.
    notes : tuple of str
        Lines for the user: which columns are read and which files are left out.
    """

    name: str
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    where: Callable[[int], str]
    read: Callable[[NDArray[np.int64]], Decoded]
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def open_sources(settings: PrepareData) -> tuple[Source, Source | None]:
    """Open the training images and, if there are any, the test images; the labels are checked.

    Raises
    ------
    DataError
        A file is missing or has no images, a label is out of range, a class is empty, or train and test share files.
    """
    if settings.source == "digits":
        train, test = _digits(settings), None
    elif settings.source in ("cifar10", "cifar100"):
        train, test = _cifar(settings, train=True), _cifar(settings, train=False)
    else:
        opener = _parquet if settings.source == "parquet" else _image_folder
        train = opener(settings, "train", settings.train, None)
        test = None if settings.test is None else opener(settings, "test", settings.test, train.classes)
    for source in (train,) if test is None else (train, test):
        _check_labels(source)
    shared = {file.resolve() for file in train.files} & {file.resolve() for file in test.files} if test else None
    if shared:
        raise DataError(f"{min(shared)} is in prepare_data.train and in prepare_data.test; remove it from one")
    return train, test


def open_additional(settings: PrepareData, classes: tuple[str, ...]) -> Source:
    """Open the additional training images; their labels are checked, and classes may be missing.

    Raises
    ------
    DataError
        A file is missing, is no Parquet file or archive of images and labels, or a label is out of range.
    """
    assert settings.additional is not None
    key = "additional"
    files = _expand(f"prepare_data.{key}", settings.additional.files, folder_holds="*.parquet")
    archives = [file for file in files if file.suffix == ".npz"]
    if archives and len(archives) < len(files):
        raise DataError(f"prepare_data.{key} mixes npz archives with other files; name files of one kind")
    source = _npz(files, classes) if archives else _parquet(settings, key, settings.additional.files, classes)
    _check_range(source)
    return source


def _npz(files: tuple[Path, ...], classes: tuple[str, ...]) -> Source:
    """Archives of numpy arrays `image` and `label`."""
    images, labels, starts = [], [], [0]
    for file in files:
        try:
            with np.load(file) as archive:
                images.append(archive["image"])
                labels.append(archive["label"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{file} is no npz archive with the arrays image and label ({error})") from None
        if images[-1].dtype != np.uint8 or images[-1].ndim != 4 or labels[-1].shape != images[-1].shape[:1]:
            raise DataError(
                f"{file} has image {images[-1].dtype} of shape {images[-1].shape} and label of shape "
                f"{labels[-1].shape}; expected uint8 of shape (n, height, width, channels) and (n,)"
            )
        starts.append(starts[-1] + len(labels[-1]))

    def where(index: int) -> str:
        number = int(np.searchsorted(starts, index, side="right")) - 1
        return f"{files[number]} image {index - starts[number]}"

    def read(indices: NDArray[np.int64]) -> Decoded:
        return Decoded(stacked[indices])

    stacked = np.concatenate(images)
    return Source(_names(files), np.concatenate(labels).astype(np.int64), classes, where, read, files)


def _names(files: tuple[Path, ...]) -> str:
    """The first files and the number of others, for messages."""
    return ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _check_labels(source: Source) -> None:
    """Check that every label is the index of a class and that every class has an image."""
    _check_range(source)
    number = len(source.classes)
    empty = np.flatnonzero(np.bincount(source.labels, minlength=number) == 0)
    if len(empty):
        raise DataError(
            f"{source.name} has no image of class {empty[0]} ({source.classes[empty[0]]!r}); add images of it, or "
            f"correct prepare_data.classes ({len(empty)} of {number} classes are empty)"
        )


def _check_range(source: Source) -> None:
    """Check that every label is the index of a class."""
    number = len(source.classes)
    wrong = np.flatnonzero((source.labels < 0) | (source.labels >= number))
    if len(wrong):
        raise DataError(
            f"{source.where(int(wrong[0]))} has label {source.labels[wrong[0]]}; expected 0 to {number - 1}, because "
            f"prepare_data.classes has {number} classes ({len(wrong)} such images in all)"
        )


def _class_names(settings: PrepareData, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """The class names of the settings, else those of the source, else 0 to n - 1."""
    if isinstance(settings.classes, tuple):
        return settings.classes
    number = settings.classes or len(default or ())
    return default if default is not None and number == len(default) else tuple(map(str, range(number)))


def _digits(settings: PrepareData) -> Source:
    """scikit-learn's bundled digits: 1,797 grey images of 8 x 8 pixels with values 0 to 16."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return Source(
        "digits",
        digits.target.astype(np.int64),
        _class_names(settings, tuple(map(str, range(10)))),
        "digits, image {}".format,
        lambda indices: Decoded(images[indices]),
    )


def _cifar(settings: PrepareData, *, train: bool) -> Source:
    """Torchvision's CIFAR; torchvision verifies the checksums of the files before it opens them."""
    from torchvision import datasets

    dataset = datasets.CIFAR10 if settings.source == "cifar10" else datasets.CIFAR100
    try:
        data = dataset(settings.folder, train=train, download=settings.download)
    except (RuntimeError, OSError) as error:
        if settings.download:
            raise DataError(
                f"{settings.source} could not be downloaded to {settings.folder} ({error}); try again, or put its "
                "files there by hand and set prepare_data.folder"
            ) from None
        raise DataError(
            f"{settings.source} is not in the folder {settings.folder}, or is damaged there; set "
            "prepare_data.download: true to fetch it, or set prepare_data.folder to the folder that contains "
            f"{dataset.base_folder}"
        ) from None
    return of_torchvision(settings, data, train=train)


def of_torchvision(settings: PrepareData, data: Any, *, train: bool) -> Source:
    """The images of one of torchvision's CIFAR data sets."""
    name = f"{settings.source} ({'train' if train else 'test'})"
    return Source(
        name,
        np.asarray(data.targets, np.int64),
        _class_names(settings, tuple(data.classes)),
        f"{name}, image {{}}".format,
        lambda indices: Decoded(data.data[indices]),
    )


def _parquet(
    settings: PrepareData, key: str, paths: str | tuple[str, ...] | None, classes: tuple[str, ...] | None
) -> Source:
    """Parquet files of encoded images."""
    classes = classes or _class_names(settings)
    files = _expand(f"prepare_data.{key}", paths, folder_holds="*.parquet")
    tables = [open_parquet(file, settings) for file in files]
    starts = np.cumsum([0] + [len(table.labels) for table in tables])

    def where(index: int) -> str:
        number = int(np.searchsorted(starts, index, side="right")) - 1
        return f"{tables[number].path} row {index - starts[number]}"

    def read(indices: NDArray[np.int64]) -> Decoded:
        position = np.full(starts[-1], -1)
        position[indices] = np.arange(len(indices))
        batches = (
            batch
            for table, start, stop in zip(tables, starts, starts[1:], strict=False)
            for batch in table.encoded(position[start:stop])
        )
        return decode_all(batches, len(indices), size=settings.image_size, label=f"{key} images")

    labels = np.concatenate([table.labels for table in tables])
    return Source(_names(files), labels, classes, where, read, files, _columns(key, tables, classes))


def _columns(key: str, tables: list[ImageTable], classes: tuple[str, ...]) -> tuple[str, ...]:
    """One line for each pair of columns that is read; an error if a file has another order of classes."""
    for table in tables:
        if table.classes and table.classes != classes and sorted(table.classes) == sorted(classes):
            raise DataError(
                f"{table.path} has the class order {', '.join(table.classes[:10])}, prepare_data.classes is "
                f"{', '.join(classes[:10])}; remove prepare_data.classes, or use the file's order"
            )
    chosen = dict.fromkeys((table.image_column, table.label_column) for table in tables)
    return tuple(f"{key}: images from column {images}, labels from column {labels}" for images, labels in chosen)


def _image_folder(
    settings: PrepareData, key: str, paths: str | tuple[str, ...] | None, classes: tuple[str, ...] | None
) -> Source:
    """Folders with one folder of image files per class."""
    roots = _expand(f"prepare_data.{key}", paths)
    for root in roots:
        if not root.is_dir():
            raise DataError(f"prepare_data.{key}: {root} is no folder; expected a folder of class folders")
    found = sorted({name for root in roots for name in class_folders(root)})
    classes = classes or (settings.classes if isinstance(settings.classes, tuple) else tuple(found))
    places = ", ".join(map(str, roots))
    if isinstance(settings.classes, int) and len(classes) != settings.classes:
        raise DataError(
            f"{places} has {len(classes)} class folders ({', '.join(classes[:10])}), but prepare_data.classes is "
            f"{settings.classes}"
        )
    strange = [name for name in found if name not in classes]
    if strange:
        raise DataError(
            f"{places} has a folder {strange[0]!r} that is no class; expected {', '.join(classes[:10])}"
            f"{', ...' if len(classes) > 10 else ''}: remove the folder, or correct prepare_data.classes"
        )
    labelled, left_out = _labelled(roots, classes)

    def read(indices: NDArray[np.int64]) -> Decoded:
        encoded: list[Encoded] = [
            (position, str(labelled[index][0]), labelled[index][0]) for position, index in enumerate(indices)
        ]
        batches = (encoded[start : start + READ_AHEAD] for start in range(0, len(encoded), READ_AHEAD))
        return decode_all(batches, len(indices), size=settings.image_size, label=f"{key} images")

    labels = np.array([label for _, label in labelled], np.int64)
    counts = ", ".join(f"{number} {what}" for what, number in sorted(left_out.items()))
    notes = (f"{key}: left out {counts}",) if counts else ()
    return Source(places, labels, classes, lambda index: str(labelled[index][0]), read, roots, notes)


def _labelled(roots: tuple[Path, ...], classes: tuple[str, ...]) -> tuple[list[tuple[Path, int]], Counter[str]]:
    """Image files with their labels, each file once, and counts of files left out."""
    left_out: Counter[str] = Counter()
    first: dict[str, tuple[Path, int]] = {}  # by the real path, with links resolved
    for label, name in enumerate(classes):
        for root in roots:
            for file, real in list_images(root, name, left_out):
                known, its_label = first.setdefault(real, (file, label))
                if its_label != label:
                    raise DataError(f"{file} and {known} are the same file in two classes; remove one of the links")
                left_out["linked twice"] += known != file
    return list(first.values()), +left_out


def _expand(key: str, paths: str | tuple[str, ...] | None, *, folder_holds: str | None = None) -> tuple[Path, ...]:
    """Existing files or folders of one path, several paths or globs, sorted and without repetitions."""
    found: list[Path] = []
    for text in (paths,) if isinstance(paths, str) else paths or ():
        matches = matching_paths(text, folder_holds=folder_holds)
        if not matches:
            is_folder = Path(text).expanduser().is_dir()
            what = f"folder {text} has no {folder_holds}" if is_folder else f"{text} does not exist"
            raise DataError(f"{key}: {what} (seen from {Path.cwd()}); correct the path")
        found.extend(matches)
    if not found:
        raise DataError(f"{key} is empty; expected a path, several paths or a glob")
    return tuple({path.resolve(): path for path in found}.values())
