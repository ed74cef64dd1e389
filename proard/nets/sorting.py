"""Channels inside blocks in the order of their importance, as far as that leaves trained subnets what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from proard.nets.elastic import Supernet, key_of
from proard.nets.subnet import NORM_TENSORS
from proard.space import BlockSpec, ConvSpec, GateSpec


@dataclass(frozen=True)
class Link:
    """Channels between two convolutions of a block: the layers whose outputs they are, and those that read them."""

    carriers: tuple[ConvSpec, ...]
    readers: tuple[ConvSpec, ...]


@torch.no_grad()
def sort_channels(net: Supernet, trained: Mapping[str, set[int]]) -> None:
    """Reorder the channels inside every block, most important first, between the widths trained so far.

    Narrow subnets use leading channels. Whoever opens narrower ones wants the important channels there; but the order
    may only change among channels that every trained subnet has all or none of. Then all trained subnets stay the same
    functions, batch-norm statistics included; only the order of their sums differs.

    Parameters
    ----------
    net : Supernet
        Changed in place.
    trained : mapping of str to set of int
        Per convolution, every number of output channels that trained subnets use (`SearchSpace.layer_widths`); the
        full number counts as trained.

    Notes
    -----
    A channel's importance is the L1 norm of the weights that the convolution at the end of its link applies to it,
    as in once-for-all; the released ProARD code sorts across the trained widths too, which scrambles narrow subnets.

    References
    ----------
    Cai et al., Once-for-All, ICLR 2020, arXiv:1908.09791, section 3.2.
    """
    for block in net.space.spec(net.space.largest).blocks:
        for link in links(block):
            importance = net.layers[key_of(link.readers[-1])].weight.abs().sum((0, 2, 3))
            edges = sorted(trained.get(link.carriers[0].name, set()) | {0, len(importance)})
            parts = [importance[a:b].argsort(descending=True, stable=True) + a for a, b in pairwise(edges)]
            _reorder(net, link, torch.cat(parts))


def links(block: BlockSpec) -> Iterator[Link]:
    """The links of a block's main path; depthwise convolutions and gates carry a link on."""
    carriers: list[ConvSpec] = []
    readers: list[ConvSpec] = []
    for step in block.steps:
        if isinstance(step, GateSpec):
            squeeze, excite = step.convs
            yield Link((squeeze,), (excite,))
            if carriers:
                carriers.append(excite)
                readers.append(squeeze)
        elif isinstance(step, ConvSpec) and step.depthwise:
            if carriers:  # else, without an expanding convolution, its channels are the block's input
                carriers.append(step)
        elif isinstance(step, ConvSpec):
            if carriers:
                yield Link(tuple(carriers), (*readers, step))
            carriers, readers = [step], []


def _reorder(net: Supernet, link: Link, order: Tensor) -> None:
    """Put a link's channels in a new order, in all layers that yield or read them."""
    for conv in link.carriers:
        layer = net.layers[key_of(conv)]
        tensors = [layer.weight] + ([] if layer.bias is None else [layer.bias])
        tensors += [] if layer.bn is None else [getattr(layer.bn, name) for name in NORM_TENSORS]
        for tensor in tensors:
            tensor.copy_(tensor[order])
    for conv in link.readers:
        weight = net.layers[key_of(conv)].weight
        weight.copy_(weight[:, order])
