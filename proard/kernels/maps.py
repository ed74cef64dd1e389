"""Sum of gradients of a feature map, times the slope of an activation: in C, in Triton, or by reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from proard.kernels.compiled import maps_library
from proard.kernels.dispatch import fused_for
from proard.kernels.switch import in_use

SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # in place, except for h_swish
    "relu": lambda dy, x: torch.ops.aten.threshold_backward.grad_input(dy, x, 0, grad_input=dy),
    "relu6": lambda dy, x: torch.ops.aten.hardtanh_backward.grad_input(dy, x, 0, 6, grad_input=dy),
    "h_swish": lambda dy, x: torch.ops.aten.hardswish_backward(dy, x),
    "silu": lambda dy, x: torch.ops.aten.silu_backward.grad_input(dy, x, grad_input=dy),
    "h_sigmoid": lambda dy, x: torch.ops.aten.hardsigmoid_backward.grad_input(dy, x, grad_input=dy),
}
TYPES = {torch.float32: 0, torch.bfloat16: 1}


def slope_(gradient: Tensor, before: Tensor | None, side: Tensor | None = None, *, activation: str = "relu") -> Tensor:
    """Add `side` to a gradient and multiply it by the slope of an activation, in place.

    Parameters
    ----------
    gradient : Tensor
        Changed in place and returned.
    before : Tensor of the shape of `gradient`, optional
        Input of the activation; for `relu` and `relu6` its output is as good. Without it nothing is multiplied.
    side : Tensor of the shape of `gradient`, optional
        A second gradient of the same map.
    activation : {'none', 'relu', 'relu6', 'h_swish', 'silu', 'h_sigmoid'}
        For `none`, `before` is not read.
    """
    before = None if activation == "none" else before
    fused = fused_for(gradient.device)
    if fused is not None and activation in fused.maps.KINDS and fused.maps.fits(gradient, before, side):
        return fused.maps.slope_(gradient, before, side, activation)
    others = [each for each in (side, before) if each is not None]
    alike = others and (before is None or activation == "relu") and in_use("maps")
    library = maps_library() if alike and all(_alike(each, gradient) for each in others) else None
    if library is not None:
        places = (None if each is None else each.data_ptr() for each in (side, before))
        library.mask_gradient(
            TYPES[gradient.dtype], gradient.data_ptr(), *places, gradient.numel(), torch.get_num_threads()
        )
        return gradient
    gradient = gradient if side is None else gradient.add_(side)
    return gradient if before is None else SLOPES[activation](gradient, before)


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
