"""Batch norm in training mode with its activation, and with the sum before it: in C, in Triton, or by reference.

In a training pass the library's batch norm on channels-last maps of few channels takes longer than the convolutions.
The kernels read each map twice forward and twice backward, and need no separate passes for sum and activation. The C
kernel fills the vector unit with several pixels at once.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.kernels import native
from proard.kernels.compiled import maps_library
from proard.kernels.dispatch import fused_for
from proard.kernels.maps import TYPES
from proard.kernels.switch import in_use

JOINED = ("none", "relu")  # activations after a sum whose slope is known from their output
PLAIN = {"relu": F.relu, "relu6": F.relu6, "h_swish": F.hardswish, "silu": F.silu, "none": lambda x: x}


def norm_activation(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float, activation: str, side: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise by the batch's mean and variance, scale and shift, add a map, then apply the activation.

    Parameters
    ----------
    x : Tensor of shape (batch, channels, height, width)
        Output of a convolution.
    scale, shift : Tensor of shape (channels,)
        Batch norm's weight and bias.
    eps : float
        Added to the variance.
    activation : str
        `none`, `relu`, `relu6`, `h_swish` or `silu`.
    side : Tensor of the shape of `x`, optional
        Added before the activation: the shortcut of a residual block.

    Returns
    -------
    tuple of Tensor
        The activated map; per channel, without a graph, the mean and the (biased) variance used for the normalisation.

    Notes
    -----
    For every type of `x` the kernels compute in float32, the C kernel with sums in double. A gradient of their gradient
    is computed by the reference implementation.
    """
    fused, usual = fused_for(x.device) if in_use("norms") else None, _usual(x, scale, shift)
    if fused is not None and usual and fused.maps.fits(x, side) and (side is None or activation in JOINED):
        return _Norm.apply(x, scale, shift, side, eps, activation, fused.norms)
    if side is not None:
        out, mean, var = norm_activation(x, scale, shift, eps=eps, activation="none")
        return PLAIN[activation](out + side), mean, var
    if suits(x, scale, shift) and in_use("maps") and maps_library() is not None:
        return _Norm.apply(x, scale, shift, None, eps, activation, native)
    return plain_norm_activation(x, scale, shift, eps=eps, activation=activation)


def plain_norm_activation(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float, activation: str, side: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference implementation by library calls, for any device and type."""
    mean, var = torch.zeros_like(scale.detach()), torch.zeros_like(scale.detach())  # momentum 1: the batch's statistics
    out = F.batch_norm(x, mean, var, scale, shift, training=True, momentum=1.0, eps=eps)
    out = out if side is None else out + side
    values = out.numel() / out.shape[1]  # per channel
    return PLAIN[activation](out), mean, var * ((values - 1) / values)


def suits(x: Tensor, scale: Tensor, shift: Tensor) -> bool:
    """Whether the tensors are valid for the C kernel: on the CPU, channels last and dense, float32 coefficients."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return x.device.type == "cpu" and x.dtype in TYPES and last and _usual(x, scale, shift)


def _usual(x: Tensor, scale: Tensor, shift: Tensor) -> bool:
    """Whether there are several values per channel (for one the library raises an error) and float32 coefficients."""
    return x.numel() > x.shape[1] and all(
        each.dtype is torch.float32 and each.is_contiguous() for each in (scale, shift)
    )


class _Norm(torch.autograd.Function):
    """The kernels of a module, `norm_forward` and `norm_backward`, as one differentiable operation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        side: Tensor | None,
        eps: float,
        activation: str,
        kernels: ModuleType,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var = kernels.norm_forward(x, scale, shift, eps, activation, side)
        ctx.save_for_backward(x, scale, shift, mean, var, *(() if side is None else (side, y)))
        ctx.eps, ctx.activation, ctx.kernels = eps, activation, kernels
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, mean, var, *joined = ctx.saved_tensors
        side, y = joined or (None, None)
        if torch.is_grad_enabled():  # a gradient of this gradient is needed
            again = plain_norm_activation(x, scale, shift, eps=ctx.eps, activation=ctx.activation, side=side)[0]
            given = (x, scale, shift, side)
            wanted = [each for each, needed in zip(given, ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(again, wanted, dy, create_graph=True))
            return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:4]), None, None, None)
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        gradients = ctx.kernels.norm_backward(dy, x, scale, shift, mean, var, ctx.eps, ctx.activation, y)
        return (*gradients, None, None, None)
