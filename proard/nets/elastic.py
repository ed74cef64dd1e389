"""The supernet: one set of weights, of which every subnet uses the leading channels, first blocks and kernels' centres.

The arch is an argument of every call and never stored. The forward here slices the weights anew in each call: it is the
plain form that the faster `SubnetView` is tested against.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proard.kernels import convolution
from proard.nets.forward import run_network
from proard.nets.modules import ModulesOf, statistics_of
from proard.nets.norm import Total
from proard.space import Arch, ConvSpec, SearchSpace, key_of

if TYPE_CHECKING:
    from proard.nets.view import SubnetView

BN_EPS = 1e-5
BN_MOMENTUM = 0.1


class ElasticConvNorm(nn.Module):
    """Convolution and batch norm whose leading channels form every narrower pair.

    Parameters
    ----------
    in_channels, out_channels : int
        Full numbers of channels.
    kernel, stride : int
        Largest side and step of the convolution; padding keeps the size at stride 1.
    depthwise : bool
        One filter per channel; `in_channels` equals `out_channels`.
    norm, bias : bool
        Whether batch norm or a bias follows.
    kernels : tuple of int
        All kernel sizes, smallest first, if there are several. A smaller kernel is the centre of the next larger one
        times a learned matrix, which is initialised as the identity.

    References
    ----------
    Cai et al., Once-for-All, ICLR 2020, arXiv:1908.09791, section 3.2: the kernel transformation matrices.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int,
        stride: int,
        depthwise: bool = False,
        norm: bool = True,
        bias: bool = False,
        kernels: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.groups = kernel, stride, in_channels if depthwise else 1
        self.smaller = kernels[-2::-1]  # largest first
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // self.groups, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.bn = nn.BatchNorm2d(out_channels, eps=BN_EPS, momentum=BN_MOMENTUM) if norm else None
        self.transforms = nn.ParameterDict({f"to{side}": torch.empty(side**2, side**2) for side in self.smaller})

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw fresh weights (He et al. 2015, fan-out; a depthwise filter feeds one channel)."""
        if self.groups == 1:
            nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        else:
            nn.init.normal_(self.weight, std=2**0.5 / self.kernel, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.bn is not None:
            nn.init.ones_(self.bn.weight)
            nn.init.zeros_(self.bn.bias)
            self.bn.reset_running_stats()
        for transform in self.transforms.values():
            nn.init.eye_(transform)

    def filters(self, out_channels: int, in_channels: int, kernel: int | None = None) -> Tensor:
        """Weights of shape (out_channels, in_channels per group, kernel, kernel); gradients flow to the stored ones."""
        weight = self.weight[:out_channels, : 1 if self.groups > 1 else in_channels]
        for side in self.smaller:
            if kernel is None or side < kernel:
                break
            cut = (weight.shape[-1] - side) // 2
            centre = weight[..., cut : cut + side, cut : cut + side]
            weight = F.linear(centre.flatten(2), self.transforms[f"to{side}"]).reshape(centre.shape)
        return weight

    def forward(self, x: Tensor, out_channels: int, kernel: int | None = None) -> Tensor:
        """Map (batch, in, h, w) to (batch, out_channels, h', w') with the leading channels of both sides."""
        weight = self.filters(out_channels, x.shape[1], kernel)
        bias = None if self.bias is None else self.bias[:out_channels]
        groups = 1 if self.groups == 1 else out_channels
        out = convolution(x, weight, bias, stride=self.stride, groups=groups)
        if self.bn is None:
            return out
        mean, var = statistics_of(self.bn)
        return F.batch_norm(
            out,
            mean[:out_channels],
            var[:out_channels],
            self.bn.weight[:out_channels],
            self.bn.bias[:out_channels],
            training=self.training,
            momentum=BN_MOMENTUM,
            eps=BN_EPS,
        )


class ElasticLinear(nn.Linear):
    """Linear layer that reads as many leading features as its input has."""

    def forward(self, features: Tensor) -> Tensor:
        """Map (batch, features) to (batch, classes)."""
        return F.linear(features, self.weight[:, : features.shape[1]], self.bias)


class Supernet(nn.Module):
    """All subnets of a space in one set of weights.

    Parameters
    ----------
    space : SearchSpace
        The allowed archs.
    mean, std : sequence of float
        Per channel, of pixels in [0, 1]; images are normalised inside.
    generator : torch.Generator, optional
        Source of the initial weights; without it they are uninitialised and must be loaded.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        space: SearchSpace,
        *,
        mean: Tensor | list[float],
        std: Tensor | list[float],
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.space = space
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).reshape(-1))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).reshape(-1))
        full = space.spec(space.largest)
        self.layers = ModulesOf[ElasticConvNorm]()
        for conv in full.convs:
            self.layers[key_of(conv)] = ElasticConvNorm(
                conv.in_channels,
                conv.out_channels,
                kernel=conv.kernel,
                stride=conv.stride,
                depthwise=conv.depthwise,
                norm=conv.norm,
                bias=conv.bias,
                kernels=space.elastic_kernels.get(conv.name, ()),
            )
        self.head = ElasticLinear(full.features, full.classes)
        if generator is not None:
            self.reset_parameters(generator)
        self.to(memory_format=torch.channels_last)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw fresh weights."""
        for layer in self.layers.values():
            layer.reset_parameters(generator)
        bound = self.head.in_features**-0.5
        nn.init.uniform_(self.head.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.head.bias)

    def normalise(self, images: Tensor) -> Tensor:
        """Images in [0, 1], minus the mean and divided by the standard deviation of their channel."""
        return (images - self.mean[:, None, None]) / self.std[:, None, None]

    def view(self, arch: Arch, *, total: Total | None = None) -> SubnetView:
        """A subnet with leaf weights of its own, for one training step; arguments as in `SubnetView`."""
        from proard.nets.view import SubnetView  # it imports this module

        return SubnetView(self, arch, total=total)

    def forward(self, images: Tensor, arch: Arch) -> Tensor:
        """Logits of shape (batch, classes) for images in [0, 1] of shape (batch, channels, height, width)."""

        def conv(layer: ConvSpec, x: Tensor) -> Tensor:
            return self.layers[key_of(layer)](x, layer.out_channels, layer.kernel)

        return run_network(self.space.spec(arch), self.normalise(images), conv, self.head)
