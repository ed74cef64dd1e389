"""The layers of a subnet with their channels and feature maps; costs are computed from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal

Activation = Literal["none", "relu", "relu6", "h_swish", "silu", "h_sigmoid"]


@dataclass(frozen=True)
class ConvSpec:
    """A convolution with optional batch norm (`norm`) and an activation; `name` is the prefix of its weights.

    A `depthwise` convolution has one filter per channel. It has a `bias` only if it has no norm.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    out_size: int
    activation: Activation = "none"
    depthwise: bool = False
    norm: bool = True
    bias: bool = False

    @property
    def groups(self) -> int:
        """Number of groups of channels, as in `torch.nn.Conv2d`."""
        return self.in_channels if self.depthwise else 1

    @property
    def weights(self) -> int:
        """Number of filter weights."""
        return self.in_channels // self.groups * self.out_channels * self.kernel**2

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return self.weights * self.out_size**2

    @property
    def params(self) -> int:
        """Number of filter weights, plus batch norm's scale and shift or the bias."""
        return self.weights + (2 * self.norm + self.bias) * self.out_channels


@dataclass(frozen=True)
class GateSpec:
    """Squeeze-and-excitation: the convolutions map the channels' means to one factor per channel."""

    convs: tuple[ConvSpec, ConvSpec]


@dataclass(frozen=True)
class PoolSpec:
    """`max`: 3x3 windows at stride 2, padded by 1. `mean`: windows of side `stride`, no partial ones at the border."""

    kind: Literal["max", "mean"]
    stride: int
    out_size: int


Step = ConvSpec | GateSpec | PoolSpec


@dataclass(frozen=True)
class BlockSpec:
    """A sequence of steps beside a `shortcut` (None, or steps; no step is the identity), then an activation."""

    steps: tuple[Step, ...]
    shortcut: tuple[Step, ...] | None = None
    activation: Activation = "none"

    @property
    def convs(self) -> tuple[ConvSpec, ...]:
        """The block's convolutions, those of the shortcut last."""
        return tuple(convs_of((*self.steps, *(self.shortcut or ()))))

    @property
    def out_size(self) -> int:
        """Side of the block's output map."""
        last = self.steps[-1]
        assert not isinstance(last, GateSpec)
        return last.out_size


@dataclass(frozen=True)
class NetSpec:
    """A whole network: blocks, global average pooling, the `mixer`'s convolutions, a linear layer `head`."""

    blocks: tuple[BlockSpec, ...]
    features: int
    classes: int
    image_channels: int
    image_size: int
    mixer: tuple[ConvSpec, ...] = ()

    @cached_property
    def convs(self) -> tuple[ConvSpec, ...]:
        """All convolutions in the order of `blocks`, then those of the mixer."""
        return (*chain.from_iterable(block.convs for block in self.blocks), *self.mixer)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image: convolutions and the linear layer."""
        return sum(conv.macs for conv in self.convs) + self.features * self.classes

    @property
    def params(self) -> int:
        """Trained parameters: convolutions, batch norm's scale and shift, linear layer with bias."""
        return sum(conv.params for conv in self.convs) + (self.features + 1) * self.classes


def convs_of(steps: tuple[Step, ...]) -> Iterator[ConvSpec]:
    """The convolutions of some steps, including those of gates."""
    for step in steps:
        if isinstance(step, ConvSpec):
            yield step
        elif isinstance(step, GateSpec):
            yield from step.convs


@dataclass(frozen=True)
class FixedSpec:
    """Costs and shape of a fixed network, with the attributes of `NetSpec`."""

    macs: int
    params: int
    classes: int
    image_channels: int
    image_size: int
    convs: tuple[ConvSpec, ...] = ()


def key_of(conv: ConvSpec) -> str:
    """A layer's name as a key of modules and tensors, which may not contain dots."""
    return conv.name.replace(".", "_")
