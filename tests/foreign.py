"""Image files as users have them, for the tests of reading and of the card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

UPRIGHT = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}


def wide_pixels(channels: int = 3, *, seed: int = 0) -> np.ndarray:
    """Random pixels, 48 wide and 24 high."""
    return np.random.default_rng(seed).integers(0, 256, (24, 48, channels), dtype=np.uint8)


def turned(path: Path, orientation: int = 6, *, seed: int = 0) -> Path:
    """A 48 x 24 PNG with a rotation in its metadata, as cameras write them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(wide_pixels(seed=seed)).save(path, exif=exif)
    return path


def transparent(path: Path, *, seed: int = 1) -> Path:
    """A 48 x 24 PNG of random colour and random alpha."""
    Image.fromarray(wide_pixels(4, seed=seed)).save(path)
    return path
