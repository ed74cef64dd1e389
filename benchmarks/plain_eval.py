"""A subnet's label in plain form, written from the description of the released evaluation.

A deep copy of the supernet whose every forward slices the active weights anew, NCHW memory, batch-norm statistics by
chained means, then PGD on every image for every step, norms unfolded. Departures from that description, so that outputs
can be compared: the stored variance is the unbiased one, and all batches weigh the same, as in
`proard.nets.recalibrate`; the start noise is the package's; `any_iterate` accounting is there too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.config import Attack
from proard.data import keyed_generator
from proard.kernels import convolution
from proard.nets import Supernet, run_network
from proard.nets.elastic import BN_EPS, key_of
from proard.space import Arch, ConvSpec


@torch.no_grad()
def plain_recalibrate(supernet: Supernet, arch: Arch, images: Tensor, *, batch_size: int) -> Supernet:
    """A copy of the supernet with the arch's batch-norm statistics on `images`, (n, channels, h, w) in [0, 1]."""
    net = copy.deepcopy(supernet).to(memory_format=torch.contiguous_format).eval()
    spec, sums, batches = net.space.spec(arch), {}, list(full_batches(images, batch_size))
    for batch in batches:

        def conv(layer: ConvSpec, x: Tensor) -> Tensor:
            elastic, out = net.layers[key_of(layer)], layer.out_channels
            weight = elastic.filters(out, layer.in_channels, layer.kernel)
            bias = None if elastic.bias is None else elastic.bias[:out]
            x = convolution(x, weight, bias, stride=layer.stride, groups=layer.groups)
            if not layer.norm:
                return x
            mean = x.mean(0, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
            var = ((x - mean) ** 2).mean(0, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
            mean, var, values = mean.flatten(), var.flatten(), x.numel() / out
            total = sums.setdefault(layer.name, [torch.zeros_like(mean), torch.zeros_like(var)])
            total[0] += mean
            total[1] += var * values / (values - 1)
            bn = elastic.bn
            return F.batch_norm(x, mean, var, bn.weight[:out], bn.bias[:out], training=False, eps=BN_EPS)

        run_network(spec, net.normalise(batch), conv, net.head)
    for layer in spec.convs:
        if not layer.norm:
            continue
        bn, (mean, var) = net.layers[key_of(layer)].bn, sums[layer.name]
        bn.running_mean[: layer.out_channels] = mean / len(batches)
        bn.running_var[: layer.out_channels] = var / len(batches)
    return net


def full_batches(images: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Batches in order, a smaller last one left out unless it is the only one."""
    for batch in images.split(batch_size):
        if len(batch) == min(batch_size, len(images)):
            yield batch


@torch.no_grad()
def plain_clean(net: Supernet, arch: Arch, images: Tensor, labels: Tensor, *, batch_size: int) -> Tensor:
    """Which clean images are classified correctly; bool of shape (n,)."""
    parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return torch.cat([net(batch, arch).argmax(1) == truth for batch, truth in parts])


def plain_robust(
    net: Supernet,
    arch: Arch,
    images: Tensor,
    labels: Tensor,
    *,
    attack: Attack,
    eps: float,
    seed: int,
    batch_size: int,
    accounting: str = "last_iterate",
) -> Tensor:
    """Which images, attacked by PGD with all its steps, are classified correctly; bool of shape (n,)."""
    noise = torch.empty(images.shape).uniform_(-eps, eps, generator=keyed_generator(seed, 0)).to(images.device)
    parts = zip(images.split(batch_size), labels.split(batch_size), noise.split(batch_size), strict=True)
    robust = []
    for clean, truth, start in parts:
        stands = torch.ones_like(truth, dtype=torch.bool)
        adv = torch.clamp(clean + start, 0, 1)
        for _ in range(attack.num_steps):
            adv.requires_grad_()
            logits = net(adv, arch)
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, truth, reduction="sum"), adv)
            stands &= logits.argmax(1) == truth
            adv = adv.detach() + attack.step_size * gradient.sign()
            adv = torch.min(torch.max(adv, clean - eps), clean + eps)
            adv = torch.clamp(adv, 0, 1)
        with torch.no_grad():
            last = net(adv, arch).argmax(1) == truth
        robust.append(last if accounting == "last_iterate" else stands & last)
    return torch.cat(robust)
