"""The straight-through twin of an int8 ONNX file: its integers in torch, with a gradient.

The file is the only description of the arithmetic: the twin reads scales, zero points and integers from it. Tensors
are kept as integers (exact in float32) beside their scale, as integer kernels compute; rounding passes the gradient on
where the value is inside the range, and stops it where it is clipped.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from proard.artifacts import ArtifactError
from proard.config import UserError


@dataclass(frozen=True)
class Scaled:
    """Integers, or sums of their products, times a scale (a scalar, or one per channel)."""

    integers: Tensor
    scale: Tensor

    @property
    def real(self) -> Tensor:
        """The values."""
        return self.integers * _per_channel(self.scale, self.integers.dim())


Value = Tensor | Scaled


class RoundThrough(torch.autograd.Function):
    """Round half to even and clip; the gradient passes where nothing is clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        """Integers between the limits."""
        rounded = x.round()
        ctx.save_for_backward((rounded >= low) & (rounded <= high))
        return rounded.clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient where nothing was clipped."""
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None


def round_through(x: Tensor, largest: float = math.inf) -> Tensor:
    """Integers between `-largest` and `largest`, with the straight-through gradient."""
    rounded: Tensor = RoundThrough.apply(x, -largest, largest)
    return rounded


class Twin(nn.Module):
    """An int8 ONNX file in QDQ form, as a torch module.

    Parameters
    ----------
    path : path
        The file; its operators must be known here.

    Raises
    ------
    UserError
        The file has an operator that the twin does not know.
    ArtifactError
        The file is missing or no ONNX model.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        try:
            graph = onnx.load(path).graph
        except Exception as error:
            raise ArtifactError(f"{path} is no readable ONNX file ({error}); rerun its stage") from None
        self.input, self.output = graph.input[0].name, graph.output[0].name
        self.nodes = list(graph.node)
        unknown = sorted({node.op_type for node in self.nodes} - set(OPERATORS))
        if unknown:
            raise UserError(
                f"{path} has the operator {', '.join(unknown)}, whose gradient the twin does not know: such a network "
                "is not quantised yet"
            )
        self.constants: dict[str, Value] = {}
        for entry in graph.initializer:
            self.constants[entry.name] = torch.from_numpy(np.array(numpy_helper.to_array(entry)))
        self.limits = {
            name: _limits(value)
            for name, value in self.constants.items()
            if isinstance(value, Tensor) and value.dtype in (torch.int8, torch.uint8) and value.numel() == 1
        }
        with torch.no_grad():
            for node in [node for node in self.nodes if all(name in self.constants or not name for name in node.input)]:
                self.constants[node.output[0]] = self._run(node, self.constants)
                self.nodes.remove(node)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Twin:
        """Move the constants with the module."""
        for name, value in self.constants.items():
            if isinstance(value, Scaled):
                self.constants[name] = Scaled(function(value.integers), function(value.scale))
            elif value.is_floating_point():  # shapes and zero points are read here, not there
                self.constants[name] = function(value)
        return super()._apply(function, recurse)

    def forward(self, images: Tensor, weights: Mapping[str, Value] | None = None) -> Tensor:
        """Logits of shape (batch, classes) for images in [0, 1] of shape (batch, channels, height, width).

        `weights` replace constants of the file, by name.
        """
        values: dict[str, Value] = {self.input: images, **(weights or {})}
        for node in self.nodes:
            values[node.output[0]] = self._run(node, ChainMap(values, self.constants))
        return _real(values[self.output])

    def _run(self, node: onnx.NodeProto, values: Mapping[str, Value]) -> Value:
        """One node's result."""
        given = [values[name] if name else None for name in node.input]
        options = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        if node.op_type == "QuantizeLinear":
            options["limits"] = self.limits[node.input[2]]
        return OPERATORS[node.op_type](*given, **options)


def _limits(zero_point: Tensor) -> tuple[int, int]:
    """Smallest and largest integer of a zero point's type, without the zero point."""
    info, zero = torch.iinfo(zero_point.dtype), int(zero_point)
    return info.min - zero, info.max - zero


def _per_channel(scale: Tensor, dims: int, axis: int = 1) -> Tensor:
    """A scalar, or a vector shaped so that it runs over the axis."""
    return (
        scale
        if scale.dim() == 0 or scale.numel() == 1
        else scale.reshape([-1 if i == axis else 1 for i in range(dims)])
    )


def _real(value: Value) -> Tensor:
    """Values of either form."""
    return value.real if isinstance(value, Scaled) else value


def _quantise(x: Value, scale: Tensor, zero_point: Tensor, *, limits: tuple[int, int], **_: Any) -> Scaled:
    """Integers without their zero point, clipped to the type's range."""
    if isinstance(x, Scaled):
        ratio = _per_channel(x.scale / scale, x.integers.dim())  # as a kernel: one multiplier per channel
        steps = x.integers * ratio
    else:
        steps = x / scale
    return Scaled(RoundThrough.apply(steps, *limits), scale)


def _dequantise(x: Value, scale: Tensor, zero_point: Tensor | None = None, *, axis: int = 1, **_: Any) -> Value:
    """Constants get their scale here; what `_quantise` gave has it already."""
    if isinstance(x, Scaled):
        return x
    integers = x.to(torch.float32)
    if zero_point is not None:
        integers = integers - _per_channel(zero_point.to(torch.float32), integers.dim(), axis)
    return Scaled(integers, scale)


def _products(
    x: Value, weight: Value, bias: Value | None, operation: Callable[[Tensor, Tensor, Tensor | None], Tensor]
) -> Value:
    """A linear operation: sums of integers where both factors are, else in float32."""
    if isinstance(x, Scaled) and isinstance(weight, Scaled):
        return Scaled(
            operation(x.integers, weight.integers, bias.integers if isinstance(bias, Scaled) else None),
            x.scale * weight.scale,
        )
    return operation(_real(x), _real(weight), None if bias is None else _real(bias))


def _conv(
    x: Value,
    weight: Value,
    bias: Value | None = None,
    *,
    pads: Any = (0, 0, 0, 0),
    strides: Any = (1, 1),
    dilations: Any = (1, 1),
    group: int = 1,
    **_: Any,
) -> Value:
    """Convolution with symmetric or other padding; zero is the zero point."""
    top, left, bottom, right = pads

    def operation(maps: Tensor, filters: Tensor, shift: Tensor | None) -> Tensor:
        padding = (top, left)
        if (top, left) != (bottom, right):
            maps, padding = F.pad(maps, (left, right, top, bottom)), (0, 0)
        return F.conv2d(maps, filters, shift, tuple(strides), padding, tuple(dilations), group)

    return _products(x, weight, bias, operation)


def _gemm(
    x: Value,
    weight: Value,
    bias: Value | None = None,
    *,
    transB: int = 0,
    **_: Any,
) -> Value:
    """Linear layer."""
    return _products(x, weight, bias, lambda a, b, c: F.linear(a, b if transB else b.T, c))


def _relu(x: Value) -> Value:
    """Rectified integers are integers."""
    return Scaled(F.relu(x.integers), x.scale) if isinstance(x, Scaled) else F.relu(x)


def _add(a: Value, b: Value) -> Tensor:
    """Sum of values."""
    return _real(a) + _real(b)


def _multiply(a: Value, b: Value) -> Tensor:
    """Product of values."""
    return _real(a) * _real(b)


def _global_mean(x: Value, **_: Any) -> Value:
    """Mean over height and width, of integers as their sum."""
    if isinstance(x, Scaled):
        area = x.integers.shape[2] * x.integers.shape[3]
        return Scaled(x.integers.sum((2, 3), keepdim=True), x.scale / area)
    return x.mean((2, 3), keepdim=True)


def _window(x: Value, kernel_shape: Any, strides: Any, pads: Any, pool: Callable[..., Tensor], **options: Any) -> Value:
    """Pooling of either form."""
    values = x.integers if isinstance(x, Scaled) else x
    pooled = pool(values, tuple(kernel_shape), tuple(strides), tuple(pads[:2]), **options)
    return Scaled(pooled, x.scale) if isinstance(x, Scaled) else pooled


def _max_pool(x: Value, *, kernel_shape: Any, strides: Any, pads: Any = (0, 0, 0, 0), **_: Any) -> Value:
    """Largest value of each window."""
    return _window(x, kernel_shape, strides, pads, F.max_pool2d)


def _mean_pool(
    x: Value,
    *,
    kernel_shape: Any,
    strides: Any,
    pads: Any = (0, 0, 0, 0),
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    **_: Any,
) -> Tensor:
    """Mean of each window."""
    counted = {"ceil_mode": bool(ceil_mode), "count_include_pad": bool(count_include_pad)}
    return _real(_window(x, kernel_shape, strides, pads, F.avg_pool2d, **counted))


def _pad(x: Value, pads: Tensor, value: Value | None = None, *_: Any, **__: Any) -> Tensor:
    """Constant padding on any axis."""
    sides = pads.tolist()
    half = len(sides) // 2
    flat = [entry for axis in reversed(range(half)) for entry in (sides[axis], sides[half + axis])]
    return F.pad(_real(x), flat, value=0.0 if value is None else float(_real(value)))


def _clip(x: Value, low: Value | None = None, high: Value | None = None) -> Tensor:
    """Values between two limits."""
    limits = [None if limit is None else float(_real(limit)) for limit in (low, high)]
    return _real(x).clamp(*limits)


def _flatten(x: Value, **_: Any) -> Value:
    """One row per image."""
    return Scaled(x.integers.flatten(1), x.scale) if isinstance(x, Scaled) else x.flatten(1)


def _unsqueeze(x: Value, axes: Tensor) -> Value:
    """Further dims of size 1."""
    values = x.integers if isinstance(x, Scaled) else x
    for axis in sorted(axes.tolist()):
        values = values.unsqueeze(axis)
    return Scaled(values, x.scale) if isinstance(x, Scaled) else values


def _squeeze(x: Value, axes: Tensor) -> Value:
    """Fewer dims of size 1."""
    values = x.integers if isinstance(x, Scaled) else x
    squeezed = values.squeeze(tuple(axes.tolist()))
    return Scaled(squeezed, x.scale) if isinstance(x, Scaled) else squeezed


def _reshape(x: Value, shape: Tensor, **_: Any) -> Tensor:
    """Another shape; 0 keeps a dim."""
    real = _real(x)
    return real.reshape([real.shape[place] if size == 0 else size for place, size in enumerate(shape.tolist())])


OPERATORS: dict[str, Callable[..., Value]] = {
    "QuantizeLinear": _quantise,
    "DequantizeLinear": _dequantise,
    "Conv": _conv,
    "Gemm": _gemm,
    "Relu": _relu,
    "Clip": _clip,
    "Sigmoid": lambda x: _real(x).sigmoid(),
    "HardSwish": lambda x: F.hardswish(_real(x)),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: (alpha * _real(x) + beta).clamp(0, 1),
    "Add": _add,
    "Mul": _multiply,
    "GlobalAveragePool": _global_mean,
    "MaxPool": _max_pool,
    "AveragePool": _mean_pool,
    "Pad": _pad,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Identity": lambda x: x,
}
