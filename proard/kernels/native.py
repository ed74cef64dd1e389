"""Batch norm with activation by the kernels of `maps.c`; without a graph, and without a map to add."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from proard.kernels.compiled import loaded_maps
from proard.kernels.maps import TYPES

KINDS = ("none", "relu", "relu6", "h_swish", "silu")  # as numbered in maps.c


def norm_forward(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, activation: str, side: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Activated map, mean and biased variance of `norm_activation`."""
    assert side is None
    y, mean, var = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)
    _run(loaded_maps().norm_forward, activation, (x, scale, shift), eps, (), x, (y, mean, var))
    return y, mean, var


def norm_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `norm_activation` for map, scale and shift."""
    assert y is None
    dx, dscale, dshift = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(shift)
    _run(loaded_maps().norm_backward, activation, (dy, x, scale, shift), eps, (mean, var), x, (dx, dscale, dshift))
    return dx, dscale, dshift, None


def _run(
    kernel: Callable[..., int],
    activation: str,
    given: tuple[Tensor, ...],
    eps: float,
    statistics: tuple[Tensor, ...],
    x: Tensor,
    results: tuple[Tensor, ...],
) -> None:
    """Call a kernel on a map `x` with all threads."""
    first, more, last = ((each.data_ptr() for each in tensors) for tensors in (given, statistics, results))
    size = (x.numel() // x.shape[1], x.shape[1])
    kind = (TYPES[x.dtype], KINDS.index(activation))
    if kernel(*kind, *first, eps, *more, *size, *last, torch.get_num_threads()):
        raise MemoryError("batch norm's kernel found no memory")
