"""Reference implementations of the fused kernels, for CPUs, machines without Triton, and comparisons in tests."""

from __future__ import annotations

import torch
from torch import Tensor


def pgd_update_(adv: Tensor, gradient: Tensor, low: Tensor, high: Tensor, *, step_size: float) -> Tensor:
    """Take one sign step in place and clip it to the bounds; `gradient` is overwritten."""
    return torch.clamp(adv.add_(gradient.sign_(), alpha=step_size), low, high, out=adv)


def softmax_difference(logits: Tensor, target: Tensor) -> Tensor:
    """softmax(logits) - target, computed in at least float32; integer targets are labels of one-hot rows."""
    difference = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
    if target.dtype.is_floating_point:
        difference.sub_(target)
    else:
        difference.scatter_add_(1, target[:, None], torch.full_like(difference[:, :1], -1.0))
    return difference.to(logits.dtype)
