"""Passes over a CPU's feature maps: batch norm with activation, sum and mask of gradients; in C or by reference.

In a training pass the library's batch norm on channels-last maps of few channels takes longer than the convolutions.
The C kernel reads each map twice forward and twice backward, fills the vector unit with several pixels at once, and
needs no separate passes for the activation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.kernels.compiled import loaded_maps, maps_library
from proard.kernels.switch import in_use

KINDS = ("none", "relu", "relu6", "h_swish")  # as numbered in maps.c
PLAIN = {"relu": F.relu, "relu6": F.relu6, "h_swish": F.hardswish, "none": lambda x: x}
TYPES = {torch.float32: 0, torch.bfloat16: 1}


def norm_activation(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise by the batch's mean and variance, scale and shift, then apply the activation.

    Parameters
    ----------
    x : Tensor of shape (batch, channels, height, width)
        Output of a convolution.
    scale, shift : Tensor of shape (channels,)
        Batch norm's weight and bias.
    eps : float
        Added to the variance.
    activation : str
        `none`, `relu`, `relu6` or `h_swish`.

    Returns
    -------
    tuple of Tensor
        The activated map; per channel, without a graph, the mean and the (biased) variance used for the normalisation.

    Notes
    -----
    For every type of `x` the C kernel computes in float32, with sums in double. A gradient of its gradient is computed
    by the reference implementation.
    """
    if suits(x, scale, shift) and in_use("maps") and maps_library() is not None:
        return _Fused.apply(x, scale, shift, eps, activation)
    return plain_norm_activation(x, scale, shift, eps=eps, activation=activation)


def mask_gradient_(gradient: Tensor, out: Tensor | None, side: Tensor | None = None) -> Tensor:
    """Add `side` to a gradient and set it to zero where a ReLU's output is not positive, in place.

    Parameters
    ----------
    gradient : Tensor
        Changed in place and returned.
    out : Tensor of the shape of `gradient`, optional
        Output of the ReLU; without it nothing is set to zero.
    side : Tensor of the shape of `gradient`, optional
        A second gradient of the same map.
    """
    others = [each for each in (side, out) if each is not None]
    alike = others and in_use("maps") and all(_alike(each, gradient) for each in others)
    library = maps_library() if alike else None
    if library is not None:
        places = (None if each is None else each.data_ptr() for each in (side, out))
        library.mask_gradient(
            TYPES[gradient.dtype], gradient.data_ptr(), *places, gradient.numel(), torch.get_num_threads()
        )
        return gradient
    if side is not None:
        gradient = gradient.add_(side)
    return (
        gradient if out is None else torch.ops.aten.threshold_backward.grad_input(gradient, out, 0, grad_input=gradient)
    )


def _alike(tensor: Tensor, gradient: Tensor) -> bool:
    """Whether the C kernel can process both tensors in memory order."""
    return (
        gradient.device.type == tensor.device.type == "cpu"
        and tensor.dtype is gradient.dtype
        and gradient.dtype in TYPES
        and tensor.stride() == gradient.stride()
        and tensor.shape == gradient.shape
        and (gradient.is_contiguous(memory_format=torch.channels_last) or gradient.is_contiguous())
    )


def plain_norm_activation(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference implementation by library calls, for any device and type."""
    mean, var = torch.zeros_like(scale.detach()), torch.zeros_like(scale.detach())  # momentum 1: the batch's statistics
    out = F.batch_norm(x, mean, var, scale, shift, training=True, momentum=1.0, eps=eps)
    values = out.numel() / out.shape[1]  # per channel
    return PLAIN[activation](out), mean, var * ((values - 1) / values)


def suits(x: Tensor, scale: Tensor, shift: Tensor) -> bool:
    """Whether the tensors are valid for the C kernel: on the CPU, channels last and dense, float32 coefficients."""
    return (
        x.device.type == "cpu"
        and x.dtype in TYPES
        and x.numel() > x.shape[1]  # for one value per channel the library raises an error
        and x.is_contiguous(memory_format=torch.channels_last)
        and all(each.dtype is torch.float32 and each.is_contiguous() for each in (scale, shift))
    )


class _Fused(torch.autograd.Function):
    """The C kernel and its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float, activation: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)
        failed = loaded_maps().norm_forward(
            TYPES[x.dtype],
            KINDS.index(activation),
            *(each.data_ptr() for each in (x, scale, shift)),
            eps,
            x.numel() // x.shape[1],
            x.shape[1],
            *(each.data_ptr() for each in (y, mean, var)),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("batch norm's kernel found no memory")
        ctx.save_for_backward(x, scale, shift, mean, var)
        ctx.eps, ctx.activation = eps, activation
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is needed
            y = plain_norm_activation(x, scale, shift, eps=ctx.eps, activation=ctx.activation)[0]
            wanted = [each for each, needed in zip((x, scale, shift), ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None, None)
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx, dscale, dshift = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(shift)
        failed = loaded_maps().norm_backward(
            TYPES[x.dtype],
            KINDS.index(ctx.activation),
            *(each.data_ptr() for each in (dy, x, scale, shift)),
            ctx.eps,
            *(each.data_ptr() for each in (mean, var)),
            x.numel() // x.shape[1],
            x.shape[1],
            *(each.data_ptr() for each in (dx, dscale, dshift)),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("batch norm's kernel found no memory")
        return dx, dscale, dshift, None, None
