"""Depthwise convolution on a CPU, with faster gradients in the cases where the library is slow.

For filter gradients of kernels above 3 the library takes 2 to 30 times as long as the C kernel. For input gradients of
strided convolutions in bfloat16 it takes up to 90 times as long as a convolution of the dilated gradient with flipped
filters. Measured with torch 2.15 on a processor with AVX-512 and AMX.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.kernels.compiled import loaded_maps, maps_library
from proard.kernels.maps import TYPES
from proard.kernels.switch import in_use

WIDE = 5  # smallest kernel for which the C kernel's filter gradient is faster


def depthwise_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Convolve every channel with its own filter, padded by half the kernel.

    Parameters
    ----------
    x : Tensor of shape (batch, channels, height, width)
        Maps.
    weight : Tensor of shape (channels, 1, kernel, kernel)
        Filters of odd size. Under autocast maps and filters are cast as for a convolution.
    bias : Tensor of shape (channels,), optional
        Added to the result.
    stride : int
        Stride in rows and columns.

    Returns
    -------
    Tensor of shape (batch, channels, height', width')
        Equal to the library's result; its gradients differ from the library's in rounding.
    """
    kind = x.device.type
    if kind == "cpu" and torch.is_autocast_enabled(kind):
        x, weight = (each.to(torch.get_autocast_dtype(kind)) for each in (x, weight))
    if pays(x, weight, stride):
        return _Depthwise.apply(x, weight, bias, stride)
    return _library(x, weight, stride, bias)


def pays(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether a gradient is needed that is faster here, and the tensors are valid for the C kernel."""
    return (
        torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
        and x.device.type == "cpu"
        and x.dtype is weight.dtype
        and x.dtype in TYPES
        and (weight.shape[-1] >= WIDE or (x.dtype is torch.bfloat16 and stride > 1))
        and x.is_contiguous(memory_format=torch.channels_last)
        and in_use("depthwise")
        and maps_library() is not None
    )


def depthwise_input_gradient(dy: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Gradient of `depthwise_convolution` with respect to maps `x`, by the fastest way for their type and device."""
    if x.device.type == "cpu" and (weight.shape[-1] >= WIDE or (x.dtype is torch.bfloat16 and stride > 1)):
        return _input_gradient(dy, x, weight, stride)
    return _by_library(dy, x, weight, stride, of_input=True)


def _library(x: Tensor, weight: Tensor, stride: int, bias: Tensor | None = None) -> Tensor:
    """The library's convolution."""
    return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, 1, len(weight))


class _Depthwise(torch.autograd.Function):
    """The library's convolution with own gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return _library(x, weight, stride, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        db = dy.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        if torch.is_grad_enabled():  # a gradient of this gradient is needed
            wanted = [each for each, needed in zip((x, weight), ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(_library(x, weight, ctx.stride), wanted, dy, create_graph=True))
            dx, dw = (next(found) if needed else None for needed in ctx.needs_input_grad[:2])
            return dx, dw, db, None
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = _input_gradient(dy, x, weight, ctx.stride) if ctx.needs_input_grad[0] else None
        dw = _filter_gradient(dy, x, weight, ctx.stride) if ctx.needs_input_grad[1] else None
        return dx, dw, db, None


def _input_gradient(dy: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Gradient with respect to `x`: a convolution of `dy`, dilated by the stride, with flipped filters."""
    if stride > 1 and x.dtype is torch.float32:
        return _by_library(dy, x, weight, stride, of_input=True)
    if stride > 1:
        spread = torch.zeros_like(x)
        spread[:, :, ::stride, ::stride] = dy
        dy = spread
    return _library(dy, weight.flip(2, 3), 1)


def _filter_gradient(dy: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Gradient with respect to the filters, in their type."""
    if weight.shape[-1] < WIDE:
        return _by_library(dy, x, weight, stride, of_input=False)
    found = torch.empty(weight.shape, dtype=torch.float32)
    failed = loaded_maps().depthwise_filter_gradient(
        TYPES[x.dtype],
        dy.data_ptr(),
        x.data_ptr(),
        *x.shape,
        *dy.shape[2:],
        weight.shape[-1],
        stride,
        found.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("the kernel of the depthwise convolution cannot allocate memory")
    return found.to(weight.dtype)


def _by_library(dy: Tensor, x: Tensor, weight: Tensor, stride: int, *, of_input: bool) -> Tensor:
    """One of the library's two gradients."""
    shape = ([stride] * 2, [weight.shape[-1] // 2] * 2, [1, 1], False, [0, 0], len(weight))
    mask = [of_input, not of_input, False]
    found = torch.ops.aten.convolution_backward(dy, x, weight, None, *shape, mask)
    return found[0 if of_input else 1]
