"""A frozen teacher's logits on the views of the clean images seen so far, so that each view is computed once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from proard.config import TrainingSettings, UserError
from proard.data import Views
from proard.nets.trainee import Trainee
from proard.training.plan import Plan

BLOCK = 16  # images; the teacher is asked in multiples of it


class TeacherTable:
    """Logits by (image, row offset, column offset, mirrored), filled when a view is first seen.

    Only a frozen teacher's answer to clean views is kept: it is a function of the view. What a loss asks the teacher
    at adversarial images never comes through here.

    Parameters
    ----------
    num_images : int
        Training images.
    padding : int
        Pixels that crops may move by in each direction.
    flip : bool
        Whether views may be mirrored.
    classes : int
        Numbers of a view: its logits, or its pixels where input gradients are kept.
    dtype : torch.dtype
        float32 returns what the teacher said, bit for bit; float16 halves the table and rounds logits to 11 bits, the
        first time already, so that a resumed training, whose table starts empty, sees the same numbers.
    device : torch.device or str
        Where the images are.
    key : str
        The setting that asked for it, for messages.

    Raises
    ------
    UserError
        The table does not fit into memory.

    Notes
    -----
    num_images * (2 padding + 1)^2 * (2 if flip) * classes numbers: 324 MB in float32 for CIFAR-10 padded by 4, 3.2 GB
    for CIFAR-100. A step waits once for the device, to learn how many of its views are new.

    Kernels chosen by shape may round an image's logits differently in a smaller batch. So the first batch finds out at
    which sizes, multiples of 16, the teacher says the same bit for bit; new views are asked at the smallest such size
    that holds them, filled up from the same batch, which itself is the largest. A training with the table in float32
    thus equals one without.
    """

    def __init__(
        self,
        num_images: int,
        *,
        padding: int,
        flip: bool,
        classes: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        key: str = "teacher_logits",
    ) -> None:
        self.side, self.mirrors = 2 * padding + 1, 2 if flip else 1
        shape = (num_images * self.side**2 * self.mirrors, classes)
        self.key, self.bytes = key, shape[0] * shape[1] * dtype.itemsize
        self.sizes: list[int] | None = None
        try:
            self.logits = torch.full(shape, torch.nan, dtype=dtype, device=device)
        except RuntimeError:
            raise UserError(
                f"{key}: a table of {self.bytes / 2**30:.1f} GiB does not fit on {device}; leave it out, or "
                "set float16 or a smaller augment.crop_padding"
            ) from None

    def __call__(
        self, teacher: Callable[..., Tensor], images: Tensor, views: Views, labels: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """Logits of a batch, and the number of images that the teacher computed.

        Parameters
        ----------
        teacher : callable
            Images to logits, without a graph.
        images : Tensor of shape (batch, channels, height, width)
        views : Views
            Which views these are.
        labels : Tensor of shape (batch,), optional
            A second argument of `teacher`, image by image.

        Returns
        -------
        logits : Tensor of shape (batch, classes)
            float32.
        computed : int
            Filling and the search for sizes included.
        """

        def ask(rows: Tensor) -> Tensor:
            more = () if labels is None else (labels[rows],)
            return teacher(_rows(images, rows), *more)

        slots = self._slots(views)
        known = self.logits[slots]
        new, computed = known[:, 0].isnan(), 0
        count = int(new.sum())
        if count:
            if self.sizes is None:
                self.sizes, computed = _exact_sizes(ask, images)
            size = next(size for size in self.sizes if size >= count)
            asked = new.to(torch.uint8).argsort(descending=True, stable=True)[:size]  # the new ones first
            if size == len(images):
                asked = torch.arange(size, device=images.device)
            known[asked] = ask(asked).to(known.dtype)
            self.logits[slots] = known
            computed += size
        return known.float(), computed

    def keep(self, views: Views, logits: Tensor) -> None:
        """Store logits of these views that were computed elsewhere."""
        self.logits[self._slots(views)] = logits.to(self.logits.dtype)

    def _slots(self, views: Views) -> Tensor:
        """Rows of the table, of shape (batch,)."""
        slots = ((views.indices * self.side + views.top) * self.side + views.left) * self.mirrors
        return slots + views.mirrored if self.mirrors == 2 else slots


def _exact_sizes(ask: Callable[[Tensor], Tensor], images: Tensor) -> tuple[list[int], int]:
    """Batch sizes, ascending, at which images get the logits that they get in this batch, and what the search cost."""
    last = torch.arange(len(images), device=images.device)
    whole, sizes = ask(last), range(BLOCK, len(images), BLOCK)
    exact = [size for size in sizes if torch.equal(ask(last[-size:]), whole[-size:])]
    return [*exact, len(images)], len(images) + sum(sizes)


def _rows(images: Tensor, index: Tensor) -> Tensor:
    """These images, in channels_last memory."""
    return images[index].contiguous(memory_format=torch.channels_last)


def table_for(kept: str, net: Trainee, settings: TrainingSettings, plan: Plan, *, images: int) -> TeacherTable:
    """The table of the frozen teacher's `logits` or `gradients` at the views of the clean images."""
    key = f"teacher_{kept}"
    if kept == "logits" and not plan.reads_target:
        raise UserError(f"teacher_logits keeps logits at clean images; loss {plan.loss} reads none there")
    shape, augment = net.space.settings, settings.augment
    numbers = shape.classes if kept == "logits" else shape.image_channels * shape.image_size**2
    return TeacherTable(
        images,
        padding=augment.crop_padding,
        flip=augment.flip,
        classes=numbers,
        dtype=getattr(torch, getattr(settings, key)),
        device=net.mean.device,
        key=key,
    )
