"""A matrix product with an epilogue, in Triton: 1x1 convolutions of maps, and their input gradients, in one pass.

A map of shape (batch, channels, height, width), channels last, is a matrix with a row per pixel. A 1x1 convolution is
its product with the filters, and reads and writes more than it computes; bias, sum, activation and slope cost nothing
while its result is still in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from proard.kernels.fused_maps import KINDS, UNIT, WIDTH, activated, fits, sloped

ROWS, COLUMNS, DEPTH = 128, 128, 64  # pixels and output channels per program, input channels at once


@triton.jit(do_not_specialize=["rows", "column_units", "depth_units", "stride_units"])
def _product(
    x,
    weight,
    bias,
    side,
    before,
    out,
    rows,
    column_units,
    depth_units,
    stride_units,
    HAS_BIAS: tl.constexpr,
    HAS_SIDE: tl.constexpr,
    KIND: tl.constexpr,
    SLOPE: tl.constexpr,
    EVEN: tl.constexpr,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of x @ weight^T, plus bias and side, activated, times a slope; neighbours share their rows of `x`."""
    columns, depth = column_units * UNIT, depth_units * UNIT
    weight_row, weight_column = stride_units * UNIT, 1
    if TURNED:
        weight_row, weight_column = 1, stride_units * UNIT
    across = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    row = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    reached, live = row < rows, column < columns
    left = x + row[:, None] * depth + inner[None, :]
    right = weight + column[None, :] * weight_row + inner[:, None] * weight_column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        if EVEN:
            a = tl.load(left, mask=reached[:, None], other=0.0)
            b = tl.load(right, mask=live[None, :], other=0.0)
        else:
            inside = start + inner < depth
            a = tl.load(left, mask=reached[:, None] & inside[None, :], other=0.0)
            b = tl.load(right, mask=live[None, :] & inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += DEPTH
        right += DEPTH * weight_column
    if HAS_BIAS:
        total += tl.load(bias + column, mask=live, other=0.0).to(tl.float32)[None, :]
    index = row[:, None] * columns + column[None, :]
    inside = reached[:, None] & live[None, :]
    if HAS_SIDE:
        total += tl.load(side + index, mask=inside, other=0.0).to(tl.float32)
    total = activated(total, KIND)
    if SLOPE > 0:
        total = sloped(total, tl.load(before + index, mask=inside, other=0.0).to(tl.float32), SLOPE)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=inside)


def product(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    side: Tensor | None = None,
    activation: str = "none",
    before: Tensor | None = None,
    slope: str = "none",
) -> Tensor:
    """The 1x1 convolution of a map, plus bias and a map, activated; or such a gradient times an activation's slope.

    Parameters
    ----------
    x : Tensor of shape (batch, in, height, width)
        Channels last and dense.
    weight : Tensor of shape (out, in)
        Dense rows, or dense columns: for an input gradient the transposed filters.
    bias : Tensor of shape (out,), optional
    side : Tensor of shape (batch, out, height, width), optional
        Channels last and dense; added before the activation.
    activation : str
        One of `fused_maps.KINDS`.
    before : Tensor of shape (batch, out, height, width), optional
        Channels last and dense; where the slope of the activation `slope` is taken.

    Returns
    -------
    Tensor of shape (batch, out, height, width)
        A new map, channels last, in the type of `x`; computed in float32.
    """
    images, depth, height, width = x.shape
    columns, rows = len(weight), images * height * width
    out = torch.empty(
        (images, columns, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    if not out.numel():
        return out
    turned = weight.stride(0) == 1 and weight.stride(1) != 1
    stride = weight.stride(1 if turned else 0)
    tile = COLUMNS if columns > COLUMNS // 2 else COLUMNS // 2
    _product[(triton.cdiv(rows, ROWS) * triton.cdiv(columns, tile),)](
        x,
        weight,
        x if bias is None else bias,
        x if side is None else side,
        x if before is None else before,
        out,
        rows,
        columns // WIDTH,
        depth // WIDTH,
        stride // WIDTH,
        HAS_BIAS=bias is not None,
        HAS_SIDE=side is not None,
        KIND=KINDS.index(activation),
        SLOPE=0 if before is None else KINDS.index(slope),
        EVEN=depth % DEPTH == 0,
        TURNED=turned,
        ROWS=ROWS,
        COLUMNS=tile,
        DEPTH=DEPTH,
        num_warps=8 if tile == COLUMNS else 4,
        num_stages=3,
    )
    return out


def suits(x: Tensor, weight: Tensor, *maps: Tensor | None) -> bool:
    """Whether the kernel computes these tensors: one type, multiples of 8 channels, dense maps, channels last."""
    alike = all(each is None or (each.dtype is x.dtype and fits(each)) for each in maps)
    whole = all(count % WIDTH == 0 for count in weight.shape[:2])
    return weight.dtype is x.dtype and whole and 1 in weight.stride() and fits(x) and alike
