"""Losses that are not finite, noticed on the device: nothing moves from there on, and the host need not wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Guard:
    """Remembers the first loss that is not finite.

    `failed`, of shape (), is 0 up to there and 1 ever after: what fused optimizers call `found_inf`, at 1 of which they
    leave parameters and momentum as they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.failed = torch.zeros((), device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def watch(self, loss: Tensor, step: int) -> None:
        """Look at the loss of a step, of shape (); only the first failure is remembered."""
        first = ~torch.isfinite(loss) & (self.failed == 0)
        self.step.masked_fill_(first, step)
        torch.where(first, loss.double(), self.loss, out=self.loss)
        self.failed.masked_fill_(first, 1.0)

    @property
    def alive(self) -> Tensor:
        """1 while every loss was finite, then 0; float64 of shape ()."""
        return 1 - self.failed.double()

    def restore_(self, tensors: Sequence[Tensor], saved: Tensor) -> None:
        """Put back what `flat` gave before the step, if there has been a failure."""
        if not tensors:
            return
        kept = torch.where(self.failed > 0, saved, flat(tensors))
        parts = kept.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])

    def failure(self) -> tuple[int, float] | None:
        """Step and value of the first loss that was not finite, or None. The host waits for the device."""
        if not bool(self.failed):
            return None
        return int(self.step), float(self.loss)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers of some tensors, none in a network without batch norm, in one copy; of shape (numbers,)."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]) if tensors else torch.empty(0)
