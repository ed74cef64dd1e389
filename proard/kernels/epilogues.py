"""Biased convolutions, and their input gradients, with the elementwise work that follows in the same pass.

On a CPU oneDNN applies bias, sum and ReLU while it convolves. On a GPU they take one pass (`fused_maps`) instead of one
for each operation. In half precision a 1x1 convolution may be a matrix product with such an epilogue (`fused_product`),
and cuDNN can do the same for other convolutions before a ReLU, where `prove` lets it. No kernel depends on the subnet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.kernels.dispatch import Fused, fused_for
from proard.kernels.maps import slope_
from proard.kernels.switch import in_use
from proard.kernels.types import one_pass

FROM_OUTPUT = ("none", "relu", "relu6")  # activations whose slope is known from their output
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu_,
    "relu6": lambda x: F.relu6(x, inplace=True),
}
NOTHING: tuple[None, list[float], None] = (None, [], None)  # after oneDNN's sum
ONE_DNN: dict[str, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0, 6]),
}


def convolve_activate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: str = "none",
    side: Tensor | None = None,
) -> Tensor:
    """Convolution padded by half the kernel, plus a bias per channel and a map, activated.

    Parameters
    ----------
    x : Tensor of shape (batch, in, height, width)
    weight : Tensor of shape (out, in / groups, kernel, kernel)
    bias : Tensor of shape (out,)
    stride, groups : int
        As in `torch.nn.functional.conv2d`; `groups` is 1 or `in`.
    activation : {'none', 'relu', 'relu6'}
        One of `FROM_OUTPUT`.
    side : Tensor of the shape of the result, optional
        Added before the activation.
    """
    padding = weight.shape[-1] // 2
    if x.is_cuda or fused_for(x.device) is not None:
        return _on_gpu(x, weight, bias, stride, groups, activation, side)
    if (activation != "none" or side is not None) and x.dtype in (torch.float32, torch.bfloat16) and one_pass(x.dtype):
        shape = ([padding] * 2, [stride] * 2, [1, 1], groups)
        name, numbers = ONE_DNN[activation]
        if side is None:
            return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *shape, name, numbers, "")
        if activation in ("none", "relu"):
            last: tuple[str | None, list[float], str | None] = ("relu", [], "") if activation == "relu" else NOTHING
            return torch.ops.mkldnn._convolution_pointwise.binary(x, side, weight, bias, *shape, "add", 1.0, *last)
    out = F.conv2d(x, weight, bias, stride, padding, 1, groups)
    out = out if side is None else out.add_(side)
    return ACTIVATIONS[activation](out)


def gradient_slope(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    groups: int = 1,
    before: Tensor | None = None,
    activation: str = "none",
    side: Tensor | None = None,
) -> Tensor:
    """Gradient with respect to a convolution's input, plus a map, times an activation's slope.

    Parameters
    ----------
    gradient : Tensor of the shape of the convolution's result
    x : Tensor of shape (batch, in, height, width)
        The convolution's input; only its shape and layout matter.
    weight, stride, groups
        As in `convolve_activate`.
    before : Tensor of the shape of `x`, optional
        Where the slope of `activation` is taken: its input, or its output for those in `FROM_OUTPUT`.
    side : Tensor of the shape of `x`, optional
        Added before the multiplication by the slope.
    """
    fused, kernel = fused_for(x.device), weight.shape[-1]
    if fused is not None and _is_product(fused, gradient, weight, stride, groups, before, side):
        filters = weight[:, :, 0, 0].t()
        return fused.product.product(gradient, filters, side=side, before=before, slope=activation)
    options = ([stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], groups, [True, False, False])
    out, _, _ = torch.ops.aten.convolution_backward(gradient, x, weight, None, *options)
    return slope_(out, before, side, activation=activation)


def _on_gpu(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, groups: int, activation: str, side: Tensor | None
) -> Tensor:
    """`convolve_activate` with the fused kernels where they can run."""
    fused, kernel = fused_for(x.device), weight.shape[-1]
    if fused is not None and _is_product(fused, x, weight, stride, groups, side):
        return fused.product.product(x, weight[:, :, 0, 0], bias=bias, side=side, activation=activation)
    if fused is not None and x.dtype in fused.types and activation == "relu" and groups == 1:
        out = fused.library.convolve_relu(x, weight, bias, stride=stride, side=side)
        if out is not None:
            return out
    out = F.conv2d(x, weight, None, stride, kernel // 2, 1, groups)
    if fused is not None and fused.maps.fits(out, side):
        return fused.maps.finish_(out, bias, side, activation)
    out = out.add_(bias[:, None, None])
    out = out if side is None else out.add_(side)
    return ACTIVATIONS[activation](out)


def _is_product(fused: Fused, x: Tensor, weight: Tensor, stride: int, groups: int, *maps: Tensor | None) -> bool:
    """Whether a convolution is a matrix product that the fused kernel computes; in float32 the library is faster."""
    bare = weight.shape[-1] == stride == groups == 1
    return bare and in_use("products") and x.dtype in fused.types and fused.product.suits(x, weight, *maps)
