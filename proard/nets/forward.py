"""The one forward pass that supernet, views, static and folded networks share.

A network is a `NetSpec` plus two callables that compute a named convolution (with its norm) and the head. The caller
supplies both, and thereby chooses the weights and the statistics of batch norm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from proard.kernels import convolution, depthwise_convolution
from proard.space import Activation, BlockSpec, ConvSpec, GateSpec, NetSpec, PoolSpec, Step

Conv = Callable[[ConvSpec, Tensor], Tensor]
Join = Callable[[ConvSpec, Tensor, Tensor, Activation], Tensor]


def run_network(
    spec: NetSpec,
    x: Tensor,
    conv: Conv,
    head: Callable[[Tensor], Tensor],
    *,
    activated: bool = False,
    join: Join | None = None,
) -> Tensor:
    """Logits of shape (batch, classes) of normalised images.

    Parameters
    ----------
    spec : NetSpec
        Blocks in order.
    x : Tensor of shape (batch, channels, height, width)
        Normalised images.
    conv : callable
        `conv(layer, x)`: the layer's convolution with its norm or bias, without its activation.
    head : callable
        `head(features)` of shape (batch, classes) for features of shape (batch, spec.features).
    activated : bool
        `conv` applies the layer's activation too.
    join : callable, optional
        `join(layer, x, side, activation)`: the last convolution of a block with its norm, plus the shortcut's map
        `side`, activated; without it the three are computed one after the other.
    """
    if not activated:
        conv = with_activation(conv)
    return head(run_pooling(spec.mixer, run_blocks(spec.blocks, x, conv, join), conv))


def with_activation(conv: Conv) -> Conv:
    """The same convolutions, each followed by its activation."""
    return lambda layer, x: activate(layer.activation, conv(layer, x))


def run_blocks(blocks: tuple[BlockSpec, ...], x: Tensor, conv: Conv, join: Join | None = None) -> Tensor:
    """Apply blocks in sequence; `conv` includes the activation, `join` is as in `run_network`."""
    for block in blocks:
        last = block.steps[-1]
        if join and block.shortcut is not None and isinstance(last, ConvSpec) and last.activation == "none":
            side = run_steps(block.shortcut, x, conv)
            x = join(last, run_steps(block.steps[:-1], x, conv), side, block.activation)
            continue
        out = run_steps(block.steps, x, conv)
        if block.shortcut is not None:
            out = out + run_steps(block.shortcut, x, conv)
        x = activate(block.activation, out)
    return x


def run_pooling(mixer: tuple[Step, ...], x: Tensor, conv: Conv) -> Tensor:
    """Features of shape (batch, features): means over height and width, then the mixer if there is one."""
    features = x.mean((2, 3))
    return run_steps(mixer, features[:, :, None, None], conv).flatten(1) if mixer else features


def run_steps(steps: tuple[Step, ...], x: Tensor, conv: Conv) -> Tensor:
    """Apply steps in sequence (`conv` includes the activation); without steps, return `x`."""
    for step in steps:
        if isinstance(step, ConvSpec):
            x = conv(step, x)
        elif isinstance(step, GateSpec):
            x = x * run_steps(step.convs, x.mean((2, 3), keepdim=True), conv)
        else:
            x = pool(step, x)
    return x


def activate(name: Activation, x: Tensor) -> Tensor:
    """Apply an activation; ReLU and ReLU6 overwrite `x`, since their result suffices for the backward pass."""
    if name == "relu":
        return F.relu(x, inplace=True)
    if name == "relu6":
        return F.relu6(x, inplace=True)
    if name == "h_swish":
        return F.hardswish(x)
    if name == "silu":
        return F.silu(x)
    if name == "h_sigmoid":
        return F.hardsigmoid(x)
    return x


def pool(step: PoolSpec, x: Tensor) -> Tensor:
    """Apply a pooling to maps of shape (batch, channels, height, width)."""
    if step.kind == "max":
        return F.max_pool2d(x, 3, step.stride, padding=1)
    return F.avg_pool2d(x, step.stride, ceil_mode=x.shape[-1] % step.stride > 0)


def convolve(layer: ConvSpec, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The bare convolution of a layer with given weights."""
    if layer.depthwise and layer.kernel > 1:
        return depthwise_convolution(x, weight, bias, layer.stride)
    return convolution(x, weight, bias, stride=layer.stride, groups=len(weight) if layer.depthwise else 1)


def widened(images: Tensor, channels: int) -> Tensor:
    """Images with zeros in further channels, up to so many."""
    more = channels - images.shape[1]
    return F.pad(images, (0, 0, 0, 0, 0, more)) if more else images
