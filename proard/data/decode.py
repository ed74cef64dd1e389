"""Decode encoded images (JPEG, PNG, ...) into one uint8 array, in threads; errors name the image."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from proard.config import DataError
from proard.progress import Progress

CHUNK = 64  # images per task; the overhead of a task is about the time to decode one 32 x 32 image

Encoded = tuple[int, str, bytes | Path]
"""Position in the result, source of the image (for messages), and its bytes or its file."""


@dataclass(frozen=True)
class Decoded:
    """Decoded images, uint8 of shape (k, height, width, channels), and digests of their encoded bytes, if any.

    Equal files have equal digests.
    """

    images: NDArray[np.uint8]
    digests: tuple[bytes, ...] = ()


def preprocess(image: Image.Image, size: int | None = None, mode: str = "RGB") -> np.ndarray:
    """Convert a Pillow image into the pixels of training and measurement.

    The image is rotated upright (EXIF), put on white where it is transparent, cropped to its centre square and, if its
    size differs, resized to `size` x `size` pixels (bicubic).

    Returns
    -------
    ndarray of shape (height, width, 3), or (height, width) in mode "L"
        uint8.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(f"pixels of type {image.mode}; expected 8 bits per channel, convert it")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(mode)
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(image)


def decode_image(encoded: bytes | Path, where: str, *, size: int | None = None, mode: str = "RGB") -> NDArray[np.uint8]:
    """Decode one image.

    Parameters
    ----------
    encoded : bytes or Path
        The encoded image, or its file.
    where : str
        Source of the image, for messages.
    size, mode
        As in `preprocess`.

    Returns
    -------
    ndarray of shape (height, width, 3), or (height, width) in mode "L"

    Raises
    ------
    DataError
        The bytes are no complete image, or have more than 8 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
            return preprocess(image, size, mode)
    except Exception as error:  # Pillow's readers may raise any error on damaged bytes
        reason = str(error).split("<")[0].strip() or type(error).__name__
        raise DataError(f"{where} cannot be decoded as an image ({reason}); replace or remove it") from None


def decode_all(batches: Iterable[Sequence[Encoded]], count: int, *, size: int | None, label: str) -> Decoded:
    """Decode images into one array, with at most torch's number of threads.

    Parameters
    ----------
    batches : iterable of sequences of (position, where, encoded)
        Every position of the result occurs exactly once.
    count : int
        Number of images in all.
    size : int, optional
        See `decode_image`. Without it all images must be of one size.
    label : str
        Name of the images, for the progress line.

    Raises
    ------
    DataError
        An image cannot be decoded, or two images differ in size.
    """
    images: NDArray[np.uint8] | None = None
    first = ""
    digests = [b""] * count
    progress = Progress(f"decoding {label}", count, "images")

    def decode_chunk(chunk: Sequence[Encoded]) -> list[tuple[NDArray[np.uint8], bytes]]:
        return [(decode_image(encoded, where, size=size), _digest(encoded)) for _, where, encoded in chunk]

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for batch in batches:
            chunks = [batch[start : start + CHUNK] for start in range(0, len(batch), CHUNK)]
            for chunk, decoded in zip(chunks, pool.map(decode_chunk, chunks), strict=True):
                for (position, where, _), (pixels, digest) in zip(chunk, decoded, strict=True):
                    if images is None:
                        images, first = np.empty((count, *pixels.shape), np.uint8), where
                    if pixels.shape != images.shape[1:]:
                        raise DataError(
                            f"images differ in size: {first} is {_size(images[0])}, {where} is {_size(pixels)}; "
                            "set prepare_data.image_size to one side for all images"
                        )
                    images[position], digests[position] = pixels, digest
                progress.advance(len(chunk))
    progress.close()
    assert images is not None
    assert progress.done == count
    return Decoded(images, tuple(digests))


def _digest(encoded: bytes | Path) -> bytes:
    """Digest of the encoded image; a file that was just decoded is still in the system's cache."""
    content = encoded if isinstance(encoded, bytes) else encoded.read_bytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def _size(pixels: NDArray[np.uint8]) -> str:
    """Width x height in pixels, for messages."""
    return f"{pixels.shape[1]} x {pixels.shape[0]} pixels"
