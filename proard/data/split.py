"""The train / val / test split: seeded, stratified, stored in an order whose every prefix is a stratified sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from proard.config import DataError, PrepareData
from proard.data.sources import Source, open_additional, open_sources


@dataclass(frozen=True)
class Splits:
    """Images and labels of train, val and test.

    Attributes
    ----------
    source : str
        Name of what was read, for messages.
    classes : tuple of str
        Class names in label order.
    images : dict of ndarray of shape (n, height, width, channels)
        uint8, by split.
    labels : dict of ndarray of shape (n,)
        int64, by split.
    files : tuple of Path
        Files or folders that were read.
    notes : tuple of str
        Lines for the user: columns that were read, files left out, copies.
    additional : int
        How many of the images of train, its last ones, are additional.
    """

    source: str
    classes: tuple[str, ...]
    images: dict[str, NDArray[np.uint8]]
    labels: dict[str, NDArray[np.int64]]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    additional: int = 0


def make_splits(settings: PrepareData, *, seed: int) -> Splits:
    """Read the images of the settings and split them.

    If there is no test set, it is split off first. Then the training images are reduced to `max_train_images`, and val
    is split off. Each of the three random choices has its own random stream, so one setting does not change the others'
    choice.

    Raises
    ------
    DataError
        An error in files, labels, classes or image sizes, or a test set that shares images with the training images;
        the text names the file or row.
    """
    source, test_source = open_sources(settings)
    pool = np.arange(len(source.labels))
    parts: dict[str, NDArray[np.int64]] = {}
    if test_source is None:
        rest, cut = stratified_cut(source.labels, settings.test_fraction, _stream(seed, 0), source, "test")
        pool, parts["test"] = rest, _thinned(source.labels, cut, settings.max_test_images, _stream(seed, 1))
    pool = _thinned(source.labels, pool, settings.max_train_images, _stream(seed, 2))
    train, val = stratified_cut(source.labels[pool], settings.val_fraction, _stream(seed, 3), source, "val")
    parts = {
        "train": _thinned(source.labels, pool[train], None, _stream(seed, 4)),
        "val": _thinned(source.labels, pool[val], None, _stream(seed, 5)),
        **parts,
    }
    images, labels, digests = _read(source, parts)
    notes = source.notes
    if test_source is not None:
        everything = np.arange(len(test_source.labels))
        order = _thinned(test_source.labels, everything, settings.max_test_images, _stream(seed, 1))
        parts["test"] = order
        test_images, test_labels, test_digests = _read(test_source, {"test": order})
        images, labels, digests = images | test_images, labels | test_labels, digests | test_digests
        notes += test_source.notes
    notes += _copies(source, test_source, parts, digests)
    files = source.files + (test_source.files if test_source is not None else ())
    more = None if settings.additional is None else open_additional(settings, source.classes)
    if more is not None:
        images["additional"] = more.read(np.arange(len(more.labels))).images
    _check_shapes(settings, images)
    if more is None:
        return Splits(settings.source, source.classes, images, labels, files, notes)
    _refuse_test_images(more, images["additional"], images["test"])
    images["train"] = np.concatenate([images["train"], images.pop("additional")])
    labels["train"] = np.concatenate([labels["train"], more.labels])
    files, notes = files + more.files, notes + more.notes
    return Splits(settings.source, source.classes, images, labels, files, notes, additional=len(more.labels))


def stratified_order(labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Random order in which every prefix contains each class in its proportion, up to one image.

    Parameters
    ----------
    labels : ndarray of shape (n,)

    Returns
    -------
    ndarray of shape (n,)
        A permutation.
    """
    key = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        key[members] = (np.arange(len(members)) + rng.random(len(members))) / len(members)
    return np.argsort(key, kind="stable")


def stratified_cut(
    labels: NDArray[np.int64], fraction: float, rng: np.random.Generator, source: Source, name: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split off a fraction of every class, at least one image.

    Parameters
    ----------
    labels : ndarray of shape (n,)
    fraction : float in (0, 1)
    source : Source
        Source of the names in the message.
    name : str
        Name of the part that is split off.

    Returns
    -------
    rest, cut : ndarray
        Indices into `labels`, ascending.

    Raises
    ------
    DataError
        A class has fewer than two images.
    """
    cut = np.zeros(len(labels), bool)
    for label, class_name in enumerate(source.classes):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise DataError(
                f"class {label} ({class_name!r}) of {source.name} has too few images left for both train and "
                f"{name}: {len(members)}, expected at least 2; add images of it or raise prepare_data.max_train_images"
            )
        number = min(max(1, round(fraction * len(members))), len(members) - 1)
        cut[rng.permutation(members)[:number]] = True
    return np.flatnonzero(~cut), np.flatnonzero(cut)


def _stream(seed: int, number: int) -> np.random.Generator:
    """Random stream of one choice."""
    return np.random.default_rng([seed, number])


def _thinned(
    labels: NDArray[np.int64], indices: NDArray[np.int64], limit: int | None, rng: np.random.Generator
) -> NDArray[np.int64]:
    """At most `limit` of `indices`, a stratified sample in stratified order."""
    return indices[stratified_order(labels[indices], rng)][:limit]


def _read(
    source: Source, parts: dict[str, NDArray[np.int64]]
) -> tuple[dict[str, NDArray[np.uint8]], dict[str, NDArray[np.int64]], dict[str, tuple[bytes, ...]]]:
    """Images, labels and digests of the parts, from one pass over the source; images are views of one array."""
    decoded = source.read(np.concatenate(list(parts.values())))
    ends = np.cumsum([len(indices) for indices in parts.values()])
    stacks = np.split(decoded.images, ends[:-1])
    digests = {
        name: decoded.digests[end - len(indices) : end]
        for (name, indices), end in zip(parts.items(), ends, strict=True)
    }
    labels = {name: source.labels[indices] for name, indices in parts.items()}
    return dict(zip(parts, stacks, strict=True)), labels, digests


def _copies(
    source: Source,
    test_source: Source | None,
    parts: dict[str, NDArray[np.int64]],
    digests: dict[str, tuple[bytes, ...]],
) -> tuple[str, ...]:
    """Refuse a test set that shares files or bytes with train or val; only note it if test was split off."""
    known = {
        digest: int(index)
        for name in ("train", "val")
        for digest, index in zip(digests[name], parts[name], strict=False)  # data of a library have no digests
    }
    tested = zip(digests["test"], parts["test"], strict=False)
    shared = [(int(index), known[digest]) for digest, index in tested if digest in known]
    if not shared:
        return ()
    index, twin = min(shared)
    pair = f"{(test_source or source).where(index)} equals {source.where(twin)}"
    if test_source is None:
        return (f"test: {len(shared)} images have a copy in train or val ({pair}); remove the copies",)
    raise DataError(
        f"prepare_data.test shares images with prepare_data.train: {len(shared)} of {len(parts['test'])} are copies "
        f"byte for byte ({pair}); remove them from one of both"
    )


def _refuse_test_images(source: Source, images: NDArray[np.uint8], test: NDArray[np.uint8]) -> None:
    """Refuse additional images that are images of test, pixel by pixel."""
    tested = {image.tobytes() for image in test}
    shared = [index for index, image in enumerate(images) if image.tobytes() in tested]
    if shared:
        raise DataError(
            f"prepare_data.additional contains {len(shared)} images of test (the first: {source.where(shared[0])}); "
            "remove them"
        )


def _check_shapes(settings: PrepareData, images: dict[str, NDArray[np.uint8]]) -> None:
    """Check that all splits have the shape that the networks expect."""
    channels, side, _ = settings.image_shape()
    for name, stack in images.items():
        height, width, found = stack.shape[1:]
        if (height, width, found) == (side, side, channels):
            continue
        if settings.source in ("parquet", "imagefolder"):
            hint = f"set prepare_data.image_size: {min(height, width)} to keep this size, or another one to resize"
        else:
            hint = "prepare_data.image_size applies to the sources parquet and imagefolder only; remove it"
        raise DataError(
            f"{name} images are {width} x {height} pixels with {found} channels, expected {side} x {side} with "
            f"{channels}; {hint}"
        )
