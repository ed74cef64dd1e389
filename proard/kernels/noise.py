"""Random numbers by counter: each depends on its key, image and place alone, not on the device or the part that draws.

Philox 4x32-10 of a block's number in its image and the image's number in its batch gives four words. On a GPU nothing
waits for the host, and each process draws for its own images.

References
----------
Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from proard.kernels.dispatch import fused_for

WORD = 0xFFFFFFFF
MULTIPLIERS, WEYL, ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 10


class KeyedNoise:
    """A source of numbers for the images of a batch; every draw is another stream.

    Parameters
    ----------
    key : int
        From 0 to 2**63 - 1; equal keys give equal draws.
    first : int
        The number, in the whole batch, of the first image that numbers are drawn for.
    """

    def __init__(self, key: int, *, first: int = 0) -> None:
        self.key, self.first, self.draws = key, first, 0

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Numbers in [0, 1), float32, equal bit for bit on every device; shape (images, ...)."""
        stream, self.draws = self.draws, self.draws + 1
        fused = fused_for(device)
        if fused is not None:
            return fused.steps.philox_uniform(shape, self.key, self.first, stream, device)
        return plain_uniform(shape, self.key, self.first, stream, device)

    def normal(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Normal numbers, float32, equal on every device up to rounding; by Box and Muller's method."""
        radius, angle = self.uniform(shape, device), self.uniform(shape, device)
        return torch.log1p(-radius).mul_(-2).sqrt_().mul_(angle.mul_(2 * math.pi).cos_())


def plain_uniform(shape: Sequence[int], key: int, first: int, stream: int, device: torch.device) -> Tensor:
    """Reference implementation of the numbers, in int64 arithmetic."""
    count, numbers = shape[0], math.prod(shape[1:])
    block = torch.arange(-(-numbers // 4), device=device).expand(count, -1)
    image = torch.arange(first, first + count, device=device)[:, None].expand_as(block)
    words = philox(block, image, torch.full_like(block, stream), torch.zeros_like(block), key=key)
    return torch.stack(words, -1).flatten(1)[:, :numbers].bitwise_right_shift(8).float().mul_(2**-24).reshape(*shape)


def philox(*counter: Tensor, key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words, in int64, of four words of counter and a key of 64 bits."""
    a, b, c, d = counter
    low, high = key & WORD, key >> 32
    for _ in range(ROUNDS):
        left, right = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # modulo 2**64, as signed numbers
        a, b = (right >> 32 & WORD) ^ b ^ low, right & WORD
        c, d = (left >> 32 & WORD) ^ d ^ high, left & WORD
        low, high = (low + WEYL[0]) & WORD, (high + WEYL[1]) & WORD
    return a, b, c, d
