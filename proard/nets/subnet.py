"""Subnets as separate networks: with batch norm (`StaticNet`), or folded for attack and export (`FoldedNet`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proard.kernels import Conv2d
from proard.kernels.dispatch import fused_for
from proard.kernels.switch import in_use
from proard.kernels.winograd import LANES, multiplies_eight
from proard.nets.elastic import BN_EPS, Supernet
from proard.nets.fixed import FixedNet
from proard.nets.forward import convolve, run_network, widened
from proard.nets.gradient import InputGradient, by_winograd
from proard.nets.modules import ModulesOf, present, statistics_of
from proard.space import ConvSpec, NetSpec, key_of

HALF = (torch.bfloat16, torch.float16)
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


class StaticNet(nn.Module):
    """An ordinary network with the layers of a `NetSpec`: convolutions, batch norms, a linear head."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("mean", torch.zeros(spec.image_channels))
        self.register_buffer("std", torch.ones(spec.image_channels))
        self.convs, self.norms = ModulesOf[Conv2d](), ModulesOf[nn.BatchNorm2d]()
        for conv in spec.convs:
            self.convs[key_of(conv)] = Conv2d(
                conv.in_channels,
                conv.out_channels,
                conv.kernel,
                conv.stride,
                conv.kernel // 2,
                groups=conv.groups,
                bias=conv.bias,
            )
            if conv.norm:
                self.norms[key_of(conv)] = nn.BatchNorm2d(conv.out_channels, eps=BN_EPS)
        self.head = nn.Linear(spec.features, spec.classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes) for images in [0, 1] of shape (batch, channels, height, width)."""

        def conv(layer: ConvSpec, x: Tensor) -> Tensor:
            out = self.convs[key_of(layer)](x)
            return self.norms[key_of(layer)](out) if layer.norm else out

        normalised = (images - self.mean[:, None, None]) / self.std[:, None, None]
        return run_network(self.spec, normalised, conv, self.head)


class FoldedNet(nn.Module):
    """A network of biased convolutions: batch norm is folded in; it is not trained.

    Parameters
    ----------
    layers : mapping of name to (weight, bias)
        One entry per convolution of `spec`.
    head : (weight, bias)
        The linear layer.
    mean, std : Tensor of shape (channels,)
        Pixel normalisation.
    dtype : torch.dtype
        Type of the convolutions; images, normalisation and the head keep theirs.

    Notes
    -----
    Weights may have more channels than `spec` says, with zeros for all filters, biases and features that are added:
    the logits are the same.
    """

    head_weight: Tensor
    head_bias: Tensor
    scale: Tensor
    shift: Tensor
    _buffers: dict[str, Any]  # those of the convolutions by name

    def __init__(
        self,
        spec: NetSpec,
        layers: Mapping[str, tuple[Tensor, Tensor]],
        head: tuple[Tensor, Tensor],
        *,
        mean: Tensor,
        std: Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype
        for name, (weight, bias) in layers.items():
            key = name.replace(".", "_")
            self.register_buffer(f"{key}_weight", weight.to(dtype))
            self.register_buffer(f"{key}_bias", bias.to(dtype))
        self.register_buffer("head_weight", head[0])
        self.register_buffer("head_bias", head[1])
        self.register_buffer("scale", (1 / std)[:, None, None])
        self.register_buffer("shift", (-mean / std)[:, None, None])

    @classmethod
    def from_state(cls, spec: NetSpec, state: Mapping[str, Tensor]) -> FoldedNet:
        """The network whose `state_dict` this is, in the memory layout that `fold` gives it."""
        layers = {conv.name: (state[f"{key_of(conv)}_weight"], state[f"{key_of(conv)}_bias"]) for conv in spec.convs}
        head = (state["head_weight"], state["head_bias"])
        channels = torch.ones(spec.image_channels)
        dtype = state[f"{key_of(spec.convs[0])}_weight"].dtype
        net = cls(spec, layers, head, mean=torch.zeros_like(channels), std=channels, dtype=dtype)
        net.load_state_dict(state)
        return net.to(memory_format=torch.channels_last)

    @property
    def first(self) -> str:
        """Name of the first convolution's weights among the buffers."""
        return f"{key_of(self.spec.convs[0])}_weight"

    def rounded(self, dtype: torch.dtype) -> FoldedNet:
        """A copy whose convolutions compute in another type; in half precision on a GPU its channels are padded."""
        channels = torch.ones_like(self.scale[:, 0, 0])
        layers, head = self.layers, (self.head_weight, self.head_bias)
        net = FoldedNet(self.spec, layers, head, mean=channels, std=channels, dtype=dtype)
        net.scale, net.shift = self.scale, self.shift
        return net.padded(8) if dtype in HALF and self.head_weight.is_cuda and in_use("padding") else net

    def padded(self, multiple: int) -> FoldedNet:
        """The same network with zeros added up to a multiple of so many channels, as a GPU's matrix units need them."""
        layers = {}
        for conv in self.spec.convs:
            weight, bias = self.layers[conv.name]
            inputs = 0 if conv.depthwise else -weight.shape[1] % multiple
            outputs = -len(weight) % multiple
            weight = F.pad(weight, (0, 0, 0, 0, 0, inputs, 0, outputs)).contiguous(memory_format=torch.channels_last)
            layers[conv.name] = (weight, F.pad(bias, (0, outputs)))
        head = (F.pad(self.head_weight, (0, -self.head_weight.shape[1] % multiple)), self.head_bias)
        channels = torch.ones_like(self.scale[:, 0, 0])
        net = FoldedNet(self.spec, layers, head, mean=channels, std=channels, dtype=self.dtype)
        net.scale, net.shift = self.scale, self.shift
        return net

    @property
    def layers(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Weight and bias of every convolution, by name."""
        return {
            conv.name: (self._buffers[f"{key_of(conv)}_weight"], self._buffers[f"{key_of(conv)}_bias"])
            for conv in self.spec.convs
        }

    @property
    def approximate(self) -> bool:
        """Whether the logits of `input_gradient` have larger rounding errors than those of `forward`."""
        return self._widened().winograd_layers > 0

    @property
    def winograd_layers(self) -> int:
        """Number of convolutions that attacks compute by Winograd's method."""
        layers = self.layers
        return sum(by_winograd(conv, layers[conv.name][0]) for conv in self.spec.convs)

    def _widened(self) -> FoldedNet:
        """The network with padded channels, if attacks then compute more convolutions by Winograd's method."""
        if not multiplies_eight() or self.dtype is not torch.float32 or self.head_weight.device.type != "cpu":
            return self
        dense = (conv for conv in self.spec.convs if conv.stride == 1 and conv.kernel > 1 and not conv.depthwise)
        sizes = ((conv.in_channels, conv.out_channels) for conv in dense)
        if not any(min(pair) > LANES and any(size % LANES for size in pair) for pair in sizes):
            return self
        padded = self.padded(LANES)
        return padded if padded.winograd_layers > self.winograd_layers else self

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes), in the head's type (float32), for images in [0, 1]."""
        buffers = self._buffers

        def conv(layer: ConvSpec, x: Tensor) -> Tensor:
            key = key_of(layer)
            weight, bias = buffers[f"{key}_weight"], buffers[f"{key}_bias"]
            return convolve(layer, x, weight, bias)

        def head(features: Tensor) -> Tensor:
            return F.linear(features.to(self.head_weight.dtype), self.head_weight, self.head_bias)

        own = self.input_gradient() if images.is_cuda and not torch.is_grad_enabled() else None
        if own is not None:
            return own.logits(images)
        x = widened((images * self.scale + self.shift).to(self.dtype), buffers[self.first].shape[1])
        return run_network(self.spec, x, conv, head)

    def input_gradient(self) -> InputGradient | None:
        """Logits and input gradient without autograd, for the present weights.

        None on a GPU without the fused kernels, where autograd is faster.
        """
        device = self.head_weight.device
        if device.type != "cpu" and not (in_use("gradients") and fused_for(device)):
            return None
        net = self._widened()
        head = (net.head_weight, net.head_bias)
        return InputGradient(self.spec, net.layers, head, scale=self.scale, shift=self.shift)


def folded_layer(weight: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals convolution plus batch norm with fixed statistics."""
    factor = scale * torch.rsqrt(var + BN_EPS)
    return weight * factor[:, None, None, None], shift - mean * factor


def unfolded_layer(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution without batch norm, as copies; zeros where it has no bias."""
    weight = weight.detach().clone()
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().clone()


@torch.no_grad()
def extract(supernet: Supernet | FixedNet, arch: Any) -> StaticNet | FixedNet:
    """The subnet as a network of its own, weights copied; its logits equal the supernet's at `arch` exactly."""
    if isinstance(supernet, FixedNet):
        return supernet.frozen().train(supernet.training)
    spec = supernet.space.spec(arch)
    net = StaticNet(spec).to(supernet.mean)  # its device and type
    net.mean.copy_(supernet.mean)
    net.std.copy_(supernet.std)
    for conv in spec.convs:
        key, out = key_of(conv), conv.out_channels
        layer = supernet.layers[key]
        net.convs[key].weight.copy_(layer.filters(out, conv.in_channels, conv.kernel))
        if conv.bias:
            present(net.convs[key].bias).copy_(present(layer.bias)[:out])
        if conv.norm:
            for name in NORM_TENSORS:
                getattr(net.norms[key], name).copy_(getattr(layer.bn, name)[:out])
    net.head.weight.copy_(supernet.head.weight[:, : spec.features])
    net.head.bias.copy_(supernet.head.bias)
    return net.train(supernet.training)


@torch.no_grad()
def implant(supernet: Supernet, net: StaticNet) -> None:
    """Copy a network whose layers are those of the largest subnet into the supernet; kernel transforms stay."""
    for conv in net.spec.convs:
        key = key_of(conv)
        layer = supernet.layers[key]
        layer.weight.copy_(net.convs[key].weight)
        if conv.bias:
            present(layer.bias).copy_(present(net.convs[key].bias))
        if conv.norm:
            present(layer.bn).load_state_dict(net.norms[key].state_dict())
    supernet.head.load_state_dict(net.head.state_dict())


@torch.no_grad()
def fold(net: StaticNet | FixedNet, *, dtype: torch.dtype = torch.float32) -> FoldedNet | FixedNet:
    """Fold the batch norms, at their running statistics, into the convolutions; a fixed network keeps them, frozen."""
    if isinstance(net, FixedNet):
        return net.frozen()
    layers = {}
    for conv in net.spec.convs:
        layer = net.convs[key_of(conv)]
        if not conv.norm:
            layers[conv.name] = unfolded_layer(layer.weight, layer.bias)
            continue
        norm = net.norms[key_of(conv)]
        layers[conv.name] = folded_layer(layer.weight, norm.weight, norm.bias, *statistics_of(norm))
    head = (net.head.weight.detach().clone(), net.head.bias.detach().clone())
    return FoldedNet(net.spec, layers, head, mean=net.mean, std=net.std, dtype=dtype)
