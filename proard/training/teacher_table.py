"""A frozen teacher's logits on the views of the clean images that have come up, so that each is computed once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from proard.config import UserError
from proard.data import Views


class TeacherTable:
    """Logits by (image, row offset, column offset, mirrored), filled as views come up.

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
        Logits of a view.
    dtype : torch.dtype
        float32 returns what the teacher said, bit for bit; float16 halves the table and rounds logits to 11 bits, the
        first time already, so that a resumed training, whose table starts empty, sees the same numbers.
    device : torch.device or str
        Where the images are.

    Raises
    ------
    UserError
        The table does not fit into memory.

    Notes
    -----
    num_images * (2 padding + 1)^2 * (2 if flip) * classes numbers: 324 MB in float32 for CIFAR-10 padded by 4, 3.2 GB
    for CIFAR-100. The teacher sees new views in batches of other sizes than the step's; where a machine's kernels round
    differently for another batch size, logits differ in their last bits.
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
    ) -> None:
        self.side, self.mirrors = 2 * padding + 1, 2 if flip else 1
        shape = (num_images * self.side**2 * self.mirrors, classes)
        self.bytes = shape[0] * shape[1] * dtype.itemsize
        try:
            self.logits = torch.full(shape, torch.nan, dtype=dtype, device=device)
        except RuntimeError:
            raise UserError(
                f"teacher_logits: a table of {self.bytes / 2**30:.1f} GiB does not fit on {device}; leave it out, or "
                "set float16 or a smaller augment.crop_padding"
            ) from None

    def __call__(self, teacher: Callable[[Tensor], Tensor], images: Tensor, views: Views) -> tuple[Tensor, int]:
        """Logits of a batch, and how many of its images the teacher had to see.

        Parameters
        ----------
        teacher : callable
            Images to logits, without a graph.
        images : Tensor of shape (batch, channels, height, width)
        views : Views
            Which views these are.

        Returns
        -------
        logits : Tensor of shape (batch, classes)
            float32.
        computed : int
        """
        slots = ((views.indices * self.side + views.top) * self.side + views.left) * self.mirrors
        if self.mirrors == 2:
            slots = slots + views.mirrored
        known = self.logits[slots]
        new = known[:, 0].isnan().nonzero()[:, 0]
        if len(new):
            asked = images if len(new) == len(images) else images[new].contiguous(memory_format=torch.channels_last)
            known[new] = teacher(asked).to(self.logits.dtype)
            self.logits[slots] = known
        return known.float(), len(new)
