"""Sort channels by importance without changing the function of any trained subnet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from proard.nets.elastic import Supernet
from proard.nets.subnet import NORM_TENSORS
from proard.space import ConvSpec, GateSpec, NetSpec, Step, key_of


@dataclass
class Link:
    """Layers whose channels must have one common order: inside a block, or along the residual path of a unit.

    Attributes
    ----------
    carriers : list of ConvSpec
        Convolutions that produce the channels, or map each to itself: depthwise ones and the last one of each gate.
    readers, gates : list of ConvSpec
        Convolutions that mix the channels; first convolutions of gates, which read only the channels' means.
    head : bool
        Whether the linear layer reads them.
    """

    carriers: list[ConvSpec] = field(default_factory=list)
    readers: list[ConvSpec] = field(default_factory=list)
    gates: list[ConvSpec] = field(default_factory=list)
    head: bool = False

    def join(self, other: Link) -> None:
        """Merge with a link whose channels are added to these, one by one."""
        self.carriers += other.carriers
        self.readers += other.readers
        self.gates += other.gates


@torch.no_grad()
def sort_channels(net: Supernet, trained: Mapping[str, set[int]]) -> None:
    """Sort all channels, most important first, within each range between two widths trained so far.

    Narrow subnets use leading channels, so these should be the important ones before narrower widths are trained. The
    order changes only among channels of which every trained subnet has all or none. All trained subnets then keep
    their function, batch-norm statistics included; only the order of their sums differs. A depthwise kernel moves with
    its channel; kernel sizes are nested by cropping, which needs no order.

    Parameters
    ----------
    net : Supernet
        Changed in place.
    trained : mapping of str to set of int
        Per convolution, every number of output channels that trained subnets use (`SearchSpace.layer_widths`); the
        full number counts as trained.

    Notes
    -----
    A channel's importance is the L1 norm of the weights that its link's readers and the head apply to it, as in
    once-for-all inside blocks. The released ProARD code sorts across the trained widths too, which scrambles narrow
    subnets, and never sorts the channels between blocks, which its width phase cuts.

    References
    ----------
    Cai et al., Once-for-All, ICLR 2020, arXiv:1908.09791, section 3.2.
    """
    for link in links(net.space.spec(net.space.largest)):
        weights = [net.layers[key_of(conv)].weight.abs().sum((0, 2, 3)) for conv in link.readers]
        weights += [net.head.weight.abs().sum(0)] if link.head else []
        importance = torch.stack(weights).sum(0)
        widths = set().union(*(trained.get(conv.name, set()) for conv in link.carriers))
        edges = sorted(widths | {0, len(importance)})
        parts = [importance[a:b].argsort(descending=True, stable=True) + a for a, b in pairwise(edges)]
        _reorder(net, link, torch.cat(parts))


def links(spec: NetSpec) -> list[Link]:
    """All links of a network, except that of the image channels, whose order is fixed."""
    found: list[Link] = []

    def opened(carrier: ConvSpec) -> Link:
        found.append(Link([carrier]))
        return found[-1]

    def through(steps: tuple[Step, ...], link: Link) -> Link:
        for step in steps:
            if isinstance(step, GateSpec):
                squeeze, excite = step.convs
                link.gates.append(squeeze)
                opened(squeeze).readers.append(excite)
                link.carriers.append(excite)
            elif isinstance(step, ConvSpec) and step.depthwise:
                link.carriers.append(step)
            elif isinstance(step, ConvSpec):
                link.readers.append(step)
                link = opened(step)
        return link

    path = Link()  # of the images
    for block in spec.blocks:
        entered, path = path, through(block.steps, path)
        if block.shortcut is not None:
            beside = through(block.shortcut, entered)
            beside.join(path)
            found.remove(path)
            path = beside
    path = through(spec.mixer, path)
    path.head = True
    return found


def _reorder(net: Supernet, link: Link, order: Tensor) -> None:
    """Put a link's channels in a new order, in all layers that produce or read them."""
    for conv in link.carriers:
        layer = net.layers[key_of(conv)]
        tensors = [layer.weight] + ([] if layer.bias is None else [layer.bias])
        tensors += [] if layer.bn is None else [getattr(layer.bn, name) for name in NORM_TENSORS]
        for tensor in tensors:
            tensor.copy_(tensor[order])
    reading = [net.layers[key_of(conv)].weight for conv in (*link.readers, *link.gates)]
    for weight in [*reading, net.head.weight] if link.head else reading:
        weight.copy_(weight[:, order])
