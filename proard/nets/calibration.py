"""Batch-norm recalibration: every subnet gets statistics of its own before it is measured or exported."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.nets.elastic import BN_EPS
from proard.nets.fixed import FixedNet, recalibrate_fixed
from proard.nets.forward import run_network
from proard.nets.modules import statistics_of
from proard.nets.subnet import StaticNet
from proard.space import ConvSpec, key_of


@torch.no_grad()
def recalibrate(net: StaticNet | FixedNet, images: Tensor, *, batch_size: int) -> StaticNet | FixedNet:
    """Set the running statistics to the mean, over batches, of the batch statistics on `images`.

    Parameters
    ----------
    net : StaticNet or FixedNet
        Changed in place and returned, in evaluation mode.
    images : Tensor of shape (n, channels, height, width)
        Clean, unaugmented training images in [0, 1]. A last batch smaller than `batch_size` is left out unless it
        is the only one, so that every batch weighs the same.
    batch_size : int
        Images per batch.

    References
    ----------
    Yu and Huang, Universally Slimmable Networks, ICCV 2019, arXiv:1903.05134, section 3.2.
    """
    if isinstance(net, FixedNet):
        return recalibrate_fixed(net, images, batch_size=batch_size)
    totals = {key: [torch.zeros_like(values) for values in statistics_of(norm)] for key, norm in net.norms.items()}
    batches = [batch for batch in images.split(batch_size) if len(batch) == min(batch_size, len(images))]
    for batch in batches:

        def conv(layer: ConvSpec, x: Tensor) -> Tensor:
            key = key_of(layer)
            out = net.convs[key](x)
            if not layer.norm:
                return out
            norm = net.norms[key]
            mean, var = (torch.zeros_like(values) for values in statistics_of(norm))
            out = F.batch_norm(out, mean, var, norm.weight, norm.bias, training=True, momentum=1.0, eps=BN_EPS)
            totals[key][0] += mean
            totals[key][1] += var
            return out

        run_network(net.spec, (batch - net.mean[:, None, None]) / net.std[:, None, None], conv, net.head)
    for key, sums in totals.items():
        for values, total in zip(statistics_of(net.norms[key]), sums, strict=True):
            values.copy_(total / len(batches))
    return net.eval()
