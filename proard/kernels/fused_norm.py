"""Triton kernels of batch norm in training mode with its activation and the sum before it, in both directions.

They read a map twice, since its statistics come first. All sums are added in a fixed order, so results are equal in
every run. Layout, types and sizes are those of `fused_maps`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from proard.kernels.fused_maps import KINDS, SIZES, UNIT, WIDTH, activated, sloped

ROWS, COLUMNS = 128, 32  # pixels and channels of a tile
MAX_CHUNKS = 1024  # programs that sum parts of the same map, all channels together
SUMMED = tl.constexpr(64)  # chunks whose sums are read at once


@triton.jit
def _part(rows, channels, chunk_rows, COLUMNS: tl.constexpr):
    """A program's channels, which of them exist, its chunk of rows, and the chunk's first row and end."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    chunk = tl.program_id(1).to(tl.int64)
    begin = chunk * chunk_rows
    return column, column < channels, chunk, begin, tl.minimum(begin + chunk_rows, rows)


@triton.jit
def _tile(row, end, column, live, channels, ROWS: tl.constexpr):
    """Places of a tile's numbers in memory, and which of them exist."""
    place = row + tl.arange(0, ROWS)
    return place[:, None] * channels + column[None, :], (place < end)[:, None] & live[None, :]


@triton.jit
def _line(scale, shift, mean, var, column, live, eps):
    """Per channel: mean, inverse standard deviation, and the factor and constant of the normalised map."""
    inverse = 1.0 / tl.sqrt(tl.load(var + column, mask=live, other=1.0) + eps)
    factor = tl.load(scale + column, mask=live, other=0.0) * inverse
    centre = tl.load(mean + column, mask=live, other=0.0)
    return centre, inverse, factor, tl.load(shift + column, mask=live, other=0.0)


@triton.jit
def _keep_sums(sums, first, second, chunk, chunks, column, live, channels):
    """Store both sums of a chunk."""
    target = sums + chunk * channels + column
    tl.store(target, tl.sum(first, 0), mask=live)
    tl.store(target + chunks * channels, tl.sum(second, 0), mask=live)


@triton.jit(do_not_specialize=SIZES)
def _norm_sums(
    x,
    sums,
    rows,
    channel_units,
    chunk_rows,
    chunks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Per channel and chunk of rows: sums of differences from the first row, and of their squares."""
    channels = channel_units * UNIT
    column, live, chunk, begin, end = _part(rows, channels, chunk_rows, COLUMNS)
    pivot = tl.load(x + column, mask=live, other=0.0).to(tl.float32)
    first = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in range(begin, end, ROWS):
        index, inside = _tile(row, end, column, live, channels, ROWS)
        value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - pivot[None, :], 0.0)
        first += value
        second += value * value
    _keep_sums(sums, first, second, chunk, chunks, column, live, channels)


@triton.jit
def _total(sums, column, live, channels, chunks, COLUMNS: tl.constexpr):
    """Both sums over all chunks, in a fixed order."""
    first = tl.zeros((SUMMED, COLUMNS), tl.float32)
    second = tl.zeros((SUMMED, COLUMNS), tl.float32)
    for start in range(0, chunks, SUMMED):
        chunk = start + tl.arange(0, SUMMED)
        source = sums + chunk[:, None] * channels + column[None, :]
        inside = (chunk < chunks)[:, None] & live[None, :]
        first += tl.load(source, mask=inside, other=0.0)
        second += tl.load(source + chunks * channels, mask=inside, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit(do_not_specialize=SIZES)
def _norm_apply(
    x,
    sums,
    scale,
    shift,
    side,
    y,
    mean_out,
    var_out,
    rows,
    channel_units,
    chunk_rows,
    chunks,
    eps,
    HAS_SIDE: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Normalise the rows of a chunk, scale and shift, add side, activate; the first chunk stores the statistics."""
    channels = channel_units * UNIT
    column, live, chunk, begin, end = _part(rows, channels, chunk_rows, COLUMNS)
    first, second = _total(sums, column, live, channels, chunks, COLUMNS)
    offset = first / rows
    mean = tl.load(x + column, mask=live, other=0.0).to(tl.float32) + offset
    var = tl.maximum(second / rows - offset * offset, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if chunk == 0:
        tl.store(mean_out + column, mean, mask=live)
        tl.store(var_out + column, var, mask=live)
    factor = tl.load(scale + column, mask=live, other=0.0) * (1.0 / tl.sqrt(var + eps))
    constant = tl.load(shift + column, mask=live, other=0.0)
    for row in range(begin, end, ROWS):
        index, inside = _tile(row, end, column, live, channels, ROWS)
        value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
        value = (value - mean[None, :]) * factor[None, :] + constant[None, :]
        if HAS_SIDE:
            value += tl.load(side + index, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + index, activated(value, KIND).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _slope_at(dy, x, y, index, inside, mean, factor, constant, FROM_OUTPUT: tl.constexpr, KIND: tl.constexpr):
    """Gradient with respect to the activation's input, and the centred map, of a tile."""
    slope = tl.load(dy + index, mask=inside, other=0.0).to(tl.float32)
    centred = tl.load(x + index, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
    if KIND > 0:
        if FROM_OUTPUT:
            before = tl.load(y + index, mask=inside, other=0.0).to(tl.float32)
        else:
            before = centred * factor[None, :] + constant[None, :]
        slope = sloped(slope, before, KIND)
    return slope, centred


@triton.jit(do_not_specialize=SIZES)
def _norm_slope_sums(
    dy,
    x,
    y,
    scale,
    shift,
    mean,
    var,
    sums,
    rows,
    channel_units,
    chunk_rows,
    chunks,
    eps,
    FROM_OUTPUT: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Per channel and chunk of rows: sums of the slopes, and of slopes times the normalised map."""
    channels = channel_units * UNIT
    column, live, chunk, begin, end = _part(rows, channels, chunk_rows, COLUMNS)
    centre, inverse, factor, constant = _line(scale, shift, mean, var, column, live, eps)
    first = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in range(begin, end, ROWS):
        index, inside = _tile(row, end, column, live, channels, ROWS)
        slope, centred = _slope_at(dy, x, y, index, inside, centre, factor, constant, FROM_OUTPUT, KIND)
        slope = tl.where(inside, slope, 0.0)
        first += slope
        second += slope * (centred * inverse[None, :])
    _keep_sums(sums, first, second, chunk, chunks, column, live, channels)


@triton.jit(do_not_specialize=SIZES)
def _norm_gradient(
    dy,
    x,
    y,
    scale,
    shift,
    mean,
    var,
    sums,
    dx,
    dscale,
    dshift,
    dside,
    rows,
    channel_units,
    chunk_rows,
    chunks,
    eps,
    HAS_SIDE: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients with respect to the map and, of the first chunk's programs, to scale and shift."""
    channels = channel_units * UNIT
    column, live, chunk, begin, end = _part(rows, channels, chunk_rows, COLUMNS)
    first, second = _total(sums, column, live, channels, chunks, COLUMNS)
    if chunk == 0:
        tl.store(dshift + column, first, mask=live)
        tl.store(dscale + column, second, mask=live)
    centre, inverse, factor, constant = _line(scale, shift, mean, var, column, live, eps)
    offset = first / rows
    slant = second / rows * inverse
    for row in range(begin, end, ROWS):
        index, inside = _tile(row, end, column, live, channels, ROWS)
        slope, centred = _slope_at(dy, x, y, index, inside, centre, factor, constant, HAS_SIDE, KIND)
        if HAS_SIDE:
            tl.store(dside + index, slope.to(dside.dtype.element_ty), mask=inside)
        value = factor[None, :] * (slope - offset[None, :] - centred * slant[None, :])
        tl.store(dx + index, value.to(dx.dtype.element_ty), mask=inside)


def norm_forward(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, activation: str, side: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Activated map, mean and biased variance of `norm_activation`."""
    grid, size, tile = _grid(x)
    y, mean, var = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)
    sums = torch.empty(2, grid[1], x.shape[1], device=x.device)
    _norm_sums[grid](x, sums, *size, **tile)
    how = {"HAS_SIDE": side is not None, "KIND": KINDS.index(activation), **tile}
    _norm_apply[grid](x, sums, scale, shift, x if side is None else side, y, mean, var, *size, eps, **how)
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
    """Gradients of `norm_activation` for map, scale, shift and, where its output `y` is given, the map added to it."""
    grid, size, tile = _grid(x)
    sums = torch.empty(2, grid[1], x.shape[1], device=x.device)
    dx, dscale, dshift = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(shift)
    dside = None if y is None else torch.empty_like(y)
    tile["KIND"] = KINDS.index(activation)
    given = (dy, x, x if y is None else y, scale, shift, mean, var, sums)
    _norm_slope_sums[grid](*given, *size, eps, FROM_OUTPUT=y is not None, **tile)
    found = (dx, dscale, dshift, dx if dside is None else dside)
    _norm_gradient[grid](*given, *found, *size, eps, HAS_SIDE=y is not None, **tile)
    return dx, dscale, dshift, dside


def _grid(x: Tensor) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int]]:
    """Programs of a kernel of batch norm; sizes of map and chunks; constants."""
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    across = triton.cdiv(channels, COLUMNS)
    chunks = max(min(triton.cdiv(rows, ROWS), MAX_CHUNKS // across), 1)
    chunk_rows = triton.cdiv(triton.cdiv(rows, chunks), ROWS) * ROWS
    chunks = triton.cdiv(rows, chunk_rows)
    return (across, chunks), (rows, channels // WIDTH, chunk_rows, chunks), {"ROWS": ROWS, "COLUMNS": COLUMNS}
