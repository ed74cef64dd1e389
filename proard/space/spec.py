"""A subnet spelled out: its layers with their channels and feature maps, from which costs are counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal

Activation = Literal["none", "relu", "relu6", "h_swish", "h_sigmoid"]


@dataclass(frozen=True)
class ConvSpec:
    """A convolution, followed by batch norm where `norm`, then by its activation; `name` is its prefix among weights.

    `depthwise` convolutions have one filter per channel; `bias` stands only where there is no norm.
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
        """Groups of channels that do not see each other."""
        return self.in_channels if self.depthwise else 1

    @property
    def weights(self) -> int:
        """Numbers in the filters."""
        return self.in_channels // self.groups * self.out_channels * self.kernel**2

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return self.weights * self.out_size**2

    @property
    def params(self) -> int:
        """Convolution weights, batch norm's scale and shift or the bias."""
        return self.weights + (2 * self.norm + self.bias) * self.out_channels


@dataclass(frozen=True)
class GateSpec:
    """Squeeze-and-excitation: the convolutions read the channels' means and yield a factor for every channel."""

    convs: tuple[ConvSpec, ConvSpec]


@dataclass(frozen=True)
class PoolSpec:
    """`max`: 3x3 windows at stride 2, padded by 1. `mean`: windows of side `stride`, cut off at the border."""

    kind: Literal["max", "mean"]
    stride: int
    out_size: int


Step = ConvSpec | GateSpec | PoolSpec


@dataclass(frozen=True)
class BlockSpec:
    """Steps in sequence; `shortcut` is None or the steps beside them (none of them: identity), then an activation."""

    steps: tuple[Step, ...]
    shortcut: tuple[Step, ...] | None = None
    activation: Activation = "none"

    @property
    def convs(self) -> tuple[ConvSpec, ...]:
        """The block's convolutions, the shortcut's last."""
        return tuple(convs_of((*self.steps, *(self.shortcut or ()))))

    @property
    def out_size(self) -> int:
        """Side of the map that leaves the block."""
        last = self.steps[-1]
        assert not isinstance(last, GateSpec)
        return last.out_size


@dataclass(frozen=True)
class NetSpec:
    """A whole static network: blocks, global average pooling, the `mixer`'s convolutions, a linear layer `head`."""

    blocks: tuple[BlockSpec, ...]
    features: int
    classes: int
    image_channels: int
    image_size: int
    mixer: tuple[ConvSpec, ...] = ()

    @cached_property
    def convs(self) -> tuple[ConvSpec, ...]:
        """Every convolution in the order of `blocks`, then the mixer's."""
        return (*chain.from_iterable(block.convs for block in self.blocks), *self.mixer)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image: convolutions and the linear layer."""
        return sum(conv.macs for conv in self.convs) + self.features * self.classes

    @property
    def params(self) -> int:
        """Trained numbers: convolutions, batch norm's scale and shift, linear layer with bias."""
        return sum(conv.params for conv in self.convs) + (self.features + 1) * self.classes


def convs_of(steps: tuple[Step, ...]) -> Iterator[ConvSpec]:
    """Convolutions of some steps, those inside gates included."""
    for step in steps:
        if isinstance(step, ConvSpec):
            yield step
        elif isinstance(step, GateSpec):
            yield from step.convs


@dataclass(frozen=True)
class FixedSpec:
    """Costs and shape of a fixed network, as `NetSpec` has them."""

    macs: int
    params: int
    classes: int
    image_channels: int
    image_size: int
    convs: tuple[ConvSpec, ...] = ()
