"""Triton kernels over feature maps: bias, sum and activation; sum and slope of an activation.

Maps are channels last and dense, so that a map of shape (batch, channels, height, width) is a matrix with a row per
pixel. Every kernel reads and writes a map once. Numbers are computed in float32.

Triton compiles a program for every combination of constants and, by default, for several properties of every integer;
each takes half a second. Here sizes are ordinary numbers that are not looked at, in units of 8 channels, so that
memory is read in vectors all the same, and tiles have one size: a network needs some twenty programs, whatever its
widths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 8  # channels that are read at once
UNIT = tl.constexpr(WIDTH)
BLOCK = 256  # units per program of a pass without sums
SIZES = ["units", "channel_units", "rows", "chunk_rows", "chunks"]
KINDS = ("none", "relu", "relu6", "h_swish", "silu")  # KIND in the kernels
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def activated(value, KIND: tl.constexpr):
    """The activation; a NaN stays a NaN, as in torch."""
    if KIND == 1 or KIND == 2:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if KIND == 2:
        value = tl.minimum(value, 6.0, propagate_nan=tl.PropagateNan.ALL)
    if KIND == 3:
        share = tl.maximum(value + 3.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
        value = value * tl.minimum(share, 6.0, propagate_nan=tl.PropagateNan.ALL) * (1.0 / 6.0)
    if KIND == 4:
        value = value * tl.sigmoid(value)
    return value


@triton.jit
def sloped(gradient, before, KIND: tl.constexpr):
    """The gradient times the activation's slope at `before`: its input; for KIND 1 and 2 its output is as good."""
    if KIND == 1:
        gradient = tl.where(before <= 0.0, 0.0, gradient)
    if KIND == 2:
        gradient = tl.where((before <= 0.0) | (before >= 6.0), 0.0, gradient)
    if KIND == 3:
        inner = gradient * (before * (1.0 / 3.0) + 0.5)
        gradient = tl.where(before <= -3.0, 0.0, tl.where(before < 3.0, inner, gradient))
    if KIND == 4:
        gate = tl.sigmoid(before)
        gradient = gradient * gate * (1.0 + before * (1.0 - gate))
    return gradient


@triton.jit
def _units(units, BLOCK: tl.constexpr):
    """A program's first unit, its units from there, the places of their numbers, and which of them exist."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    unit = tl.arange(0, BLOCK)
    lane = tl.arange(0, UNIT)
    return start, unit, (start + unit)[:, None] * UNIT + lane[None, :], ((start + unit) < units)[:, None]


@triton.jit(do_not_specialize=SIZES)
def _finish(
    x,
    bias,
    side,
    units,
    channel_units,
    HAS_BIAS: tl.constexpr,
    HAS_SIDE: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add bias and side to `x`, then activate, in place."""
    start, unit, index, inside = _units(units, BLOCK)
    value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        channel_unit = ((start % channel_units).to(tl.int32) + unit) % channel_units
        channel = channel_unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
        value += tl.load(bias + channel).to(tl.float32)
    if HAS_SIDE:
        value += tl.load(side + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + index, activated(value, KIND).to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _slope(
    gradient,
    side,
    before,
    units,
    HAS_SIDE: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add side to the gradient, then multiply by the activation's slope, in place."""
    _, _, index, inside = _units(units, BLOCK)
    value = tl.load(gradient + index, mask=inside, other=0.0).to(tl.float32)
    if HAS_SIDE:
        value += tl.load(side + index, mask=inside, other=0.0).to(tl.float32)
    if KIND > 0:
        value = sloped(value, tl.load(before + index, mask=inside, other=0.0).to(tl.float32), KIND)
    tl.store(gradient + index, value.to(gradient.dtype.element_ty), mask=inside)


def finish_(x: Tensor, bias: Tensor | None, side: Tensor | None, activation: str) -> Tensor:
    """Add a bias per channel and a map, then activate, in place; tensors as accepted by `fits`."""
    units = x.numel() // WIDTH
    _finish[(triton.cdiv(units, BLOCK),)](
        x,
        x if bias is None else bias,
        x if side is None else side,
        units,
        x.shape[1] // WIDTH,
        HAS_BIAS=bias is not None,
        HAS_SIDE=side is not None,
        KIND=KINDS.index(activation),
        BLOCK=BLOCK,
    )
    return x


def slope_(gradient: Tensor, before: Tensor | None, side: Tensor | None, activation: str) -> Tensor:
    """Add a map to a gradient, then multiply by an activation's slope, in place; tensors as accepted by `fits`."""
    units = gradient.numel() // WIDTH
    _slope[(triton.cdiv(units, BLOCK),)](
        gradient,
        gradient if side is None else side,
        gradient if before is None else before,
        units,
        HAS_SIDE=side is not None,
        KIND=0 if before is None else KINDS.index(activation),
        BLOCK=BLOCK,
    )
    return gradient


def fits(x: Tensor, *others: Tensor | None) -> bool:
    """Whether maps are dense, channels last, of one type and shape, with a multiple of 8 channels."""
    return (
        x.dtype in TYPES
        and x.shape[1] % WIDTH == 0
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and all(
            each is None
            or (
                each.dtype is x.dtype
                and each.shape == x.shape
                and each.is_contiguous(memory_format=torch.channels_last)
            )
            for each in others
        )
    )
