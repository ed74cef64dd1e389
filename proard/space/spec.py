"""A subnet spelled out: its convolutions with their channels and feature maps, from which costs are counted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class ConvSpec:
    """A convolution followed by batch norm, and by ReLU where `relu`; `name` is its prefix among the weights."""

    name: str
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    out_size: int
    relu: bool

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return self.in_channels * self.out_channels * self.kernel**2 * self.out_size**2

    @property
    def params(self) -> int:
        """Convolution weights, and batch norm's scale and shift."""
        return self.in_channels * self.out_channels * self.kernel**2 + 2 * self.out_channels


@dataclass(frozen=True)
class BlockSpec:
    """Convolutions in sequence; `shortcut` is None, `identity` or the name of a 1x1 convolution beside them."""

    convs: tuple[ConvSpec, ...]
    shortcut: ConvSpec | str | None
    final_relu: bool

    @property
    def all_convs(self) -> tuple[ConvSpec, ...]:
        """The block's convolutions, the shortcut's included."""
        return (*self.convs, self.shortcut) if isinstance(self.shortcut, ConvSpec) else self.convs


@dataclass(frozen=True)
class NetSpec:
    """A whole static network: blocks, global average pooling, one linear layer named `head`."""

    blocks: tuple[BlockSpec, ...]
    features: int
    classes: int
    image_channels: int
    image_size: int

    @cached_property
    def convs(self) -> tuple[ConvSpec, ...]:
        """Every convolution in the order of `blocks`."""
        return tuple(conv for block in self.blocks for conv in block.all_convs)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image: convolutions and the linear layer."""
        return sum(conv.macs for conv in self.convs) + self.features * self.classes

    @property
    def params(self) -> int:
        """Trained numbers: convolutions, batch norm's scale and shift, linear layer with bias."""
        return sum(conv.params for conv in self.convs) + (self.features + 1) * self.classes
