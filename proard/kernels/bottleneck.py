"""The second half of a bottleneck in one Triton kernel: its middle stays on chip between two convolutions.

Imported on demand, as `fused` is; `plain.bottleneck_end` says what is computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from proard.kernels import plain

PIXELS, CHANNELS = 64, 32  # of a program's tile; input channels that it multiplies at a time
WIDEST = 128  # middle channels up to which a tile's middle fits a program


@triton.jit
def _bottleneck_end(
    x, weight, bias, last_weight, last_bias, side, middle, out, pixels, height, width, out_height, out_width,
    channels, mid, outs,
    STRIDE: tl.constexpr, RELU: tl.constexpr, MID: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of output pixels: 3x3 convolution, bias, ReLU, then 1x1 convolution, bias, sum and ReLU."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    column, row = pixel % out_width, pixel // out_width % out_height
    image = pixel // (out_width * out_height)
    inner = tl.arange(0, MID)
    known = inner < mid
    total = tl.zeros((PIXELS, MID), tl.float32)
    for tap in range(9):
        from_row, from_column = row * STRIDE + tap // 3 - 1, column * STRIDE + tap % 3 - 1
        met = inside & (from_row >= 0) & (from_row < height) & (from_column >= 0) & (from_column < width)
        start = ((image * height + from_row) * width + from_column) * channels
        for first in range(0, channels, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            there = channel < channels
            pixels_of = tl.load(x + start[:, None] + channel[None, :], mask=met[:, None] & there[None, :], other=0.0)
            place = (tap * channels + channel)[:, None] * mid + inner[None, :]
            taps = tl.load(weight + place, mask=there[:, None] & known[None, :], other=0.0)
            total = tl.dot(pixels_of, taps, total, input_precision="ieee")
    total += tl.load(bias + inner, mask=known, other=0.0).to(tl.float32)[None, :]
    active = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL).to(x.dtype.element_ty)
    tl.store(middle + pixel[:, None] * mid + inner[None, :], active, mask=inside[:, None] & known[None, :])
    for first in range(0, outs, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        there = channel < outs
        place = inner[:, None] * outs + channel[None, :]
        taps = tl.load(last_weight + place, mask=known[:, None] & there[None, :], other=0.0)
        value = tl.dot(active, taps, input_precision="ieee")
        value += tl.load(last_bias + channel, mask=there, other=0.0).to(tl.float32)[None, :]
        place, here = pixel[:, None] * outs + channel[None, :], inside[:, None] & there[None, :]
        value += tl.load(side + place, mask=here, other=0.0).to(tl.float32)
        if RELU:
            value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out + place, value.to(out.dtype.element_ty), mask=here)


def bottleneck_end(
    x: Tensor, weight: Tensor, bias: Tensor, last_weight: Tensor, last_bias: Tensor, side: Tensor, *,
    stride: int, relu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`plain.bottleneck_end` in one launch. The middle is written, for the gradient's masks, and not read again."""
    layout = torch.channels_last
    mid, channels = weight.shape[:2]
    outs, images = len(last_weight), len(x)
    x, side = x.contiguous(memory_format=layout), side.contiguous(memory_format=layout)
    size = [(length - 1) // stride + 1 for length in x.shape[2:]]
    middle = torch.empty((images, mid, *size), dtype=x.dtype, device=x.device, memory_format=layout)
    out = torch.empty((images, outs, *size), dtype=x.dtype, device=x.device, memory_format=layout)
    pixels = images * size[0] * size[1]
    _bottleneck_end[(triton.cdiv(pixels, PIXELS),)](
        x,
        weight.permute(2, 3, 1, 0).contiguous(),  # (row, column, in, out)
        bias,
        last_weight.flatten(1).T.contiguous(),
        last_bias,
        side,
        middle,
        out,
        pixels,
        *x.shape[2:],
        *size,
        channels,
        mid,
        outs,
        STRIDE=stride,
        RELU=relu,
        MID=max(16, triton.next_power_of_2(mid)),
        PIXELS=PIXELS,
        CHANNELS=CHANNELS,
    )
    return middle, out


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether a half-precision tile's middle fits a program; float32 would be rounded or slow in it."""
    return x.dtype in (torch.bfloat16, torch.float16) and len(weight) <= WIDEST


def prove(device: torch.device) -> None:
    """Run the kernel on a few numbers of the device and compare it with its twin.

    Raises
    ------
    RuntimeError
        It does not give what the twin gives; other errors come from the compiler or the driver.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 20, 5, 5), (12, 20, 3, 3), (12,), (40, 12, 1, 1), (40,), (2, 40, 3, 3))
    given = [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes]
    pairs = zip(*(twin(*given, stride=2, relu=True) for twin in (bottleneck_end, plain.bottleneck_end)), strict=True)
    for own, other in pairs:
        if not torch.allclose(own.float(), other.float(), rtol=0.05, atol=0.05 * float(other.float().abs().max())):
            raise RuntimeError("the fused bottleneck differs from its plain twin")
