"""The second half of a bottleneck, differentiable in its inputs: the fused kernel where it is the faster one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from proard.kernels import plain
from proard.kernels.dispatch import proven

PAYS: dict[tuple[object, ...], bool] = {}  # whether the fused kernel was the faster twin, by shapes and type
CALLS = 10  # that are timed


def bottleneck_for(device: torch.device) -> ModuleType | None:
    """The fused bottleneck, where it serves this device."""
    return proven("bottleneck", device)


def bottleneck_end(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    last_weights: tuple[Tensor, Tensor],
    side: Tensor,
    *,
    stride: int,
    relu: bool,
) -> Tensor:
    """3x3 convolution, bias, ReLU, 1x1 convolution, bias, shortcut and ReLU; gradients go to `x` and `side` alone.

    On a GPU and in half precision, the first call with some shapes times both twins, and the faster one serves all that
    follow. While a graph is captured nothing is timed: what has not been timed before is left to the plain twin.

    Parameters
    ----------
    x : Tensor of shape (batch, channels, height, width)
    weights : weight of shape (middle, channels, 3, 3) and bias of shape (middle,)
    last_weights : weight of shape (out, middle, 1, 1) and bias of shape (out,)
    side : Tensor of shape (batch, out, height', width')
        Added before the last activation.
    stride : int
        Of the 3x3 convolution.
    relu : bool
        Whether a ReLU follows the sum.

    Returns
    -------
    Tensor of shape (batch, out, height', width')
    """
    return BottleneckEnd.apply(x, *weights, *last_weights, side, stride, relu)


class BottleneckEnd(torch.autograd.Function):
    """`bottleneck_end` with its gradient written out: two masks and two convolutions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        """Run the faster twin; keep what the masks need."""
        *weights, side, stride, relu = rest
        given, options = (x, *weights, side), {"stride": stride, "relu": relu}
        middle, out = faster(given, options).bottleneck_end(*given, **options)
        ctx.save_for_backward(x, weights[0], weights[2], middle, out)
        ctx.stride, ctx.relu = stride, relu
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `x` and `side`."""
        x, weight, last_weight, middle, out = ctx.saved_tensors
        if ctx.relu:
            gradient = torch.ops.aten.threshold_backward(gradient, out, 0)
        inner = _input_gradient(gradient, middle, last_weight, stride=1, padding=0)
        inner = torch.ops.aten.threshold_backward(inner, middle, 0)
        own = _input_gradient(inner, x, weight, stride=ctx.stride, padding=1)
        return own, None, None, None, None, gradient, None, None


def _input_gradient(gradient: Tensor, x: Tensor, weight: Tensor, *, stride: int, padding: int) -> Tensor:
    """Gradient of a convolution with respect to its input."""
    options = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [True, False, False])
    return torch.ops.aten.convolution_backward(gradient, x, weight, None, *options)[0]


def faster(given: Sequence[Tensor], options: Mapping[str, object]) -> ModuleType:
    """The twin that serves these arguments."""
    x, weight = given[:2]
    fused = bottleneck_for(x.device)
    if fused is None or not fused.fits(x, weight):
        return plain
    key = (x.device, x.dtype, *options.values(), *(tuple(tensor.shape) for tensor in given))
    if key not in PAYS and not torch.cuda.is_current_stream_capturing():
        PAYS[key] = milliseconds(fused.bottleneck_end, given, options) < milliseconds(
            plain.bottleneck_end, given, options
        )
    return fused if PAYS.get(key, False) else plain


def milliseconds(function: Callable[..., object], given: Sequence[Tensor], options: Mapping[str, object]) -> float:
    """Time of some calls on the GPU, after one that compiles; the host waits."""
    function(*given, **options)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
        function(*given, **options)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
