"""Batched augmentation on the images' device: no workers, one gather per batch, orders keyed by seed and epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from proard.config import Augmentation
from proard.data.images import to_float


@dataclass(frozen=True)
class Views:
    """The window of the padded image that each image of a batch is cropped from.

    Attributes
    ----------
    indices : Tensor of shape (batch,)
        Indices of the images, all different.
    top, left : Tensor of shape (batch,)
        Offsets into the padded image, in pixels.
    mirrored : Tensor of shape (batch,)
        bool: flipped left to right after the crop.
    box : Tensor of shape (batch, 4), optional
        First and last-plus-one row and column of the crop that are shown, before it is flipped; the rest is black.
    """

    indices: Tensor
    top: Tensor
    left: Tensor
    mirrored: Tensor
    box: Tensor | None = None

    def __getitem__(self, part: slice) -> Views:
        """The views of a part of the batch."""
        box = None if self.box is None else self.box[part]
        return Views(self.indices[part], self.top[part], self.left[part], self.mirrored[part], box)

    def pixels(self, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image, row and column of every pixel of the views, as an index into padded images.

        `padded[views.pixels(height, width)]` reads the views, of shape (batch, height, width, ...) and mirrored if they
        are. An assignment to it writes values back to their places in the padded images.
        """
        rows = self.top[:, None] + torch.arange(height, device=self.top.device)
        steps = torch.arange(width, device=self.left.device)
        columns = self.left[:, None] + torch.where(self.mirrored[:, None], steps.flip(0), steps)
        return self.indices[:, None, None], rows[:, :, None], columns[:, None, :]


class Augmenter:
    """Random crops of padded images, mirrored with probability 1/2.

    Parameters
    ----------
    images : Tensor of shape (n, height, width, channels)
        uint8. They are padded once; all crops are windows of this copy.
    padding : int
        Black pixels added on each side; offsets are uniform over the (2 padding + 1)^2 windows.
    flip : bool
        Mirror left to right with probability 1/2.
    shift : int
        Instead of random crops, cut a part out of the image and put it at a random place on black (CropShift). The
        number of rows and columns that are cut off together is uniform between 0 and `shift`.

    References
    ----------
    `shift`: Li and Spratling, Data Augmentation Alone Can Improve Adversarial Training, ICLR 2023, arXiv:2301.09879.
    """

    def __init__(self, images: Tensor, *, padding: int = 4, flip: bool = True, shift: int = 0) -> None:
        height, width = images.shape[1:3]
        self.shift, padding = shift, shift or padding
        self.size = (height, width)
        padded = F.pad(images, (0, 0, padding, padding, padding, padding))
        windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # (n, y, x, channels, height, width)
        self.windows = windows.permute(0, 1, 2, 4, 5, 3)  # (n, y, x, height, width, channels), a view
        self.padding, self.flip = padding, flip
        self.padded_shape = tuple(padded.shape)

    @classmethod
    def of(cls, images: Tensor, settings: Augmentation) -> Augmenter:
        """The augmenter that a training's settings describe."""
        return cls(images, padding=settings.crop_padding, flip=settings.flip, shift=settings.crop_shift)

    def __call__(self, indices: Tensor, generator: torch.Generator, part: slice = slice(None)) -> Tensor:
        """Augmented images.

        Parameters
        ----------
        indices : Tensor of shape (batch,)
            int64, on the CPU.
        generator : torch.Generator
            On the CPU, also for images on a GPU, so that one seed gives the same crops everywhere.
        part : slice
            The part of the batch to return; random numbers are drawn for the whole batch.

        Returns
        -------
        Tensor of shape (batch, channels, height, width)
            float32 in [0, 1], in channels_last memory, on the images' device.
        """
        views = self.draw(indices, generator)[part]
        return self.crop(views.indices, views.top, views.left, views.mirrored, views.box)

    def draw(self, indices: Tensor, generator: torch.Generator) -> Views:
        """Draw the views of a call with the same arguments."""
        if self.shift:
            return self._draw_shifts(indices, generator)
        offsets = torch.randint(2 * self.padding + 1, (2, len(indices)), generator=generator)
        mirrored = torch.randint(2 if self.flip else 1, (1, len(indices)), generator=generator)
        draws = torch.cat([indices[None], offsets, mirrored]).to(self.windows.device, non_blocking=True)  # (4, batch)
        return Views(draws[0], draws[1], draws[2], draws[3].bool())

    def _draw_shifts(self, indices: Tensor, generator: torch.Generator) -> Views:
        """Draw what is cut off, from where, and where the rest is put."""
        draws = torch.rand((6, len(indices)), generator=generator)
        mirrored = torch.randint(2 if self.flip else 1, (len(indices),), generator=generator)

        def up_to(most: Tensor, draw: Tensor) -> Tensor:
            return (draw * (most + 1)).long().minimum(most)

        cut = up_to(torch.full((len(indices),), self.shift), draws[0])
        rows = up_to(cut, draws[1])
        sides, boxes = [], []
        for number, (lost, length) in enumerate(zip((rows, cut - rows), self.size, strict=True)):
            taken, put = (up_to(lost, draws[place + number]) for place in (2, 4))
            sides.append(self.shift + taken - put)
            boxes += [put, put + length - lost]
        found = torch.stack([indices, *sides, mirrored, *boxes]).to(
            self.windows.device, non_blocking=True
        )  # (8, batch)
        return Views(found[0], found[1], found[2], found[3].bool(), found[4:].T)

    def crop(self, indices: Tensor, top: Tensor, left: Tensor, mirrored: Tensor, box: Tensor | None = None) -> Tensor:
        """Crops at given offsets into the padded images, mirrored where `mirrored` is true; all of shape (batch,).

        With a `box`, of shape (batch, 4), as in `Views`, what lies outside of it is black.
        """
        crops = self.windows[indices, top, left]  # (batch, height, width, channels)
        if box is not None:
            rows, columns = (torch.arange(length, device=crops.device)[None] for length in self.size)
            shown = ((rows >= box[:, :1]) & (rows < box[:, 1:2]))[:, :, None]
            shown = shown & ((columns >= box[:, 2:3]) & (columns < box[:, 3:]))[:, None, :]
            crops = crops * shown[..., None]
        if self.flip:
            if crops.is_cuda:  # avoids a wait of the host for the number of mirrored rows
                crops = torch.where(mirrored[:, None, None, None], crops.flip(2), crops)
            else:
                crops[mirrored] = crops[mirrored].flip(2)
        return to_float(crops)


def keyed_generator(seed: int, *key: int) -> torch.Generator:
    """CPU generator that depends only on its key, such as (seed, epoch): a resumed job draws the same numbers."""
    state = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def mixed_order(own: int, additional: int, mixed_in: int, *, seed: int, epoch: int) -> Tensor:
    """One pass over own images with some of the additional ones, mixed so evenly that each batch has the same share.

    Parameters
    ----------
    own, additional : int
        Numbers of images; the additional ones have the indices from `own` on.
    mixed_in : int
        Additional images of a pass. Passes continue where the one before ended, in random orders of all of them.

    Returns
    -------
    Tensor of shape (own + mixed_in,)
        int64, on the CPU; it depends only on the arguments.
    """
    numbers = torch.arange(epoch * mixed_in, (epoch + 1) * mixed_in)
    rounds, within = numbers // additional, numbers % additional
    drawn = [
        torch.randperm(additional, generator=keyed_generator(seed, int(number), 3))[within[rounds == number]]
        for number in rounds.unique()
    ]
    generator = keyed_generator(seed, epoch)
    indices = torch.cat([torch.randperm(own, generator=generator), *(own + each for each in drawn)])
    places = [(torch.arange(count) + torch.rand(count, generator=generator)) / count for count in (own, mixed_in)]
    return indices[torch.cat(places).argsort(stable=True)]


def epoch_order(number: int, *, seed: int, epoch: int) -> Tensor:
    """Permutation of `number` images for one epoch.

    Returns
    -------
    Tensor of shape (number,)
        int64, on the CPU; it depends only on the three arguments.
    """
    return torch.randperm(number, generator=keyed_generator(seed, epoch))
