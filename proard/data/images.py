"""A split in memory and on disk: uint8 images with labels, checksum and statistics of the training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proard.artifacts import Provenance, load_tensors, read_header, save_tensors, tensors_checksum


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one split, stored on one device.

    Attributes
    ----------
    images : Tensor of shape (n, height, width, channels)
        uint8.
    labels : Tensor of shape (n,)
        int64, on the same device.
    checksum : str
        Checksum of these images and labels in this order.
    split : str
        train, val or test.
    classes : tuple of str
        Class names in label order.
    mean, std : tuple of float
        Statistics per channel of the training images, for every split, in pixel units of [0, 1].
    additional : int
        How many images, the last ones, come from a second source and are for training alone.
    share : float
        The part of a training batch that they fill.
    """

    images: Tensor
    labels: Tensor
    checksum: str
    split: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    additional: int = 0
    share: float = 0.0

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def take(self, indices: Tensor | Sequence[int]) -> ImageSet:
        """The images at these indices, as a set with its own checksum."""
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.images.device)
        return self._subset(self.images[index], self.labels[index])

    @property
    def own(self) -> int:
        """Number of images without the additional ones."""
        return len(self) - self.additional

    @property
    def mixed_in(self) -> int:
        """How many additional images a pass over the own images takes."""
        return round(self.own * self.share / (1 - self.share))

    @property
    def per_pass(self) -> int:
        """Number of images of a pass of training."""
        return self.own + self.mixed_in

    def first(self, number: int | None) -> ImageSet:
        """The first `number` images, a stratified sample; for None or a larger number all but the additional ones."""
        number = self.own if number is None else min(number, self.own)
        return self if number == len(self) else self._subset(self.images[:number], self.labels[:number])

    def _subset(self, images: Tensor, labels: Tensor) -> ImageSet:
        """A new set with some of the images of this set."""
        checksum = tensors_checksum({"images": images, "labels": labels})
        return replace(self, images=images, labels=labels, checksum=checksum, additional=0, share=0.0)


def save_split(
    path: str | Path,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    split: str,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    provenance: Provenance,
    additional: int = 0,
    share: float = 0.0,
) -> str:
    """Write a split for `load_split`; return the checksum of its contents.

    Parameters
    ----------
    images : ndarray of shape (n, height, width, channels)
    labels : ndarray of shape (n,)
    split, classes, mean, std, additional, share
        See `ImageSet`.
    """
    tensors = {"images": torch.from_numpy(images), "labels": torch.from_numpy(labels)}
    extra: dict[str, Any] = {"split": split, "classes": list(classes), "mean": list(mean), "std": list(std)}
    extra |= {"additional": additional, "share": share}
    save_tensors(path, tensors, kind="images", provenance=provenance, **extra)
    return read_header(path)["checksum"]


def load_split(path: str | Path, device: str | torch.device = "cpu") -> ImageSet:
    """Read a split that `prepare_data` wrote.

    Raises
    ------
    ArtifactError
        The file is missing, truncated, damaged, or has no images.
    """
    tensors, header = load_tensors(path, kind="images")
    return ImageSet(
        tensors["images"].to(device),
        tensors["labels"].to(device),
        header["checksum"],
        header["split"],
        tuple(header["classes"]),
        tuple(header["mean"]),
        tuple(header["std"]),
        header.get("additional", 0),  # splits of earlier versions have none
        header.get("share", 0.0),
    )


def to_float(images: Tensor) -> Tensor:
    """Convert stored images into network inputs.

    Parameters
    ----------
    images : Tensor of shape (batch, height, width, channels)
        uint8.

    Returns
    -------
    Tensor of shape (batch, channels, height, width)
        float32 in [0, 1], in channels_last memory: the values of x / 255, correctly rounded, on every device.
    """
    pixels = images.permute(0, 3, 1, 2).to(torch.float32)  # memory layout unchanged: (batch, height, width, channels)
    return pixels.div_(pixels.new_full((), 255))  # for a Python number CUDA would multiply by its reciprocal


def pixel_statistics(images: NDArray[np.uint8], *, batch: int = 1000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, in pixel units of [0, 1], exact up to the last rounding.

    Parameters
    ----------
    images : ndarray of shape (n, height, width, channels)

    Returns
    -------
    mean, std : tuple of float
        `std` is at least 1/255, so that a constant channel causes no division by zero.
    """
    channels = images.shape[-1]
    counts = np.zeros((channels, 256))
    for start in range(0, len(images), batch):
        for channel in range(channels):
            counts[channel] += np.bincount(images[start : start + batch, ..., channel].ravel(), minlength=256)
    values, weights = np.arange(256) / 255, counts / counts.sum(axis=1, keepdims=True)
    mean = weights @ values
    std = np.sqrt((weights * (values - mean[:, None]) ** 2).sum(axis=1))
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())
