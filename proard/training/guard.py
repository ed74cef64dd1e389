"""Losses and gradients that are not finite, detected on the device: later steps change nothing; no host waits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Guard:
    """Remembers the first step whose loss or gradient is not finite.

    `failed`, of shape (), is 0 up to there and 1 ever after: what fused optimizers call `found_inf`, at 1 of which they
    leave parameters and momentum as they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.failed = torch.zeros((), device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def watch(self, loss: Tensor, step: int, gradients: Sequence[Tensor] = ()) -> None:
        """Look at a step's loss, of shape (), and at its gradients; only the first failure is remembered.

        A finite loss may have a gradient that is not. Its sum of absolute values tells, without a look at each.
        """
        finite = torch.isfinite(loss)
        if gradients:
            finite &= torch.isfinite(torch.stack(torch._foreach_norm(list(gradients), 1)).sum())
        first = ~finite & (self.failed == 0)
        self.step.masked_fill_(first, step)
        torch.where(first, loss.double(), self.loss, out=self.loss)
        self.failed.masked_fill_(first, 1.0)

    @property
    def alive(self) -> Tensor:
        """1 while everything was finite, then 0; float64 of shape ()."""
        return 1 - self.failed.double()

    def restore_(self, tensors: Sequence[Tensor], saved: Tensor) -> None:
        """Put back what `flat` gave before the step, if there has been a failure."""
        if not tensors:
            return
        kept = torch.where(self.failed > 0, saved, flat(tensors))
        parts = kept.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])

    def failure(self) -> tuple[int, float] | None:
        """Step and loss of the first failure, or None; a finite loss had another gradient. The host waits."""
        if not bool(self.failed):
            return None
        return int(self.step), float(self.loss)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers of some tensors, none in a network without batch norm, in one copy; of shape (numbers,)."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]) if tensors else torch.empty(0)
