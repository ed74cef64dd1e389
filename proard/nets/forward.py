"""The one forward pass that supernet, views, static and folded networks share.

A network is its `NetSpec` plus two callables that say how a named convolution (with its norm) and the head are
computed. Whoever supplies them decides where weights come from and which statistics batch norm uses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from proard.space import ConvSpec, NetSpec


def run_network(
    spec: NetSpec, x: Tensor, conv: Callable[[ConvSpec, Tensor], Tensor], head: Callable[[Tensor], Tensor]
) -> Tensor:
    """Logits of normalised images.

    Parameters
    ----------
    spec : NetSpec
        Blocks in order.
    x : Tensor of shape (batch, channels, height, width)
        Normalised images.
    conv : callable
        `conv(layer, x)`: the layer's convolution and norm, without its activation.
    head : callable
        `head(features)` of shape (batch, classes) for features of shape (batch, spec.features).
    """
    for block in spec.blocks:
        out = x
        for layer in block.convs:
            out = conv(layer, out)
            if layer.relu:
                out = F.relu(out, inplace=True)
        if isinstance(block.shortcut, ConvSpec):
            out = out + conv(block.shortcut, x)
        elif block.shortcut is not None:
            out = out + x
        x = F.relu(out, inplace=True) if block.final_relu else out
    return head(x.mean((2, 3)))
