"""Search spaces as data: stem, units and the choice lists of every elastic dim."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from proard.config.fields import Count, Int, Natural, Positive, Settings

Activation = Literal["relu", "relu6", "h_swish", "silu"]
Depths = Annotated[tuple[Natural, ...], Field(min_length=1)]
Factors = Annotated[tuple[Positive, ...], Field(min_length=1)]
Kernels = Annotated[tuple[Count, ...], Field(min_length=1)]


class Stem(Settings):
    """First convolutions. `conv`: one 3x3. `deep`: 3x3, an elastic residual 3x3, 3x3 (ResNet-D style).

    `pool` adds a 3x3 max-pooling of stride 2 after them.
    """

    kind: Literal["conv", "deep"] = "conv"
    channels: Count = 32
    stride: Annotated[Int, Field(ge=1, le=2)] = 1
    activation: Activation = "relu"
    pool: bool = False


class Unit(Settings):
    """Blocks at one resolution: full output width, minimum number of blocks, stride of the first block.

    `depth`, `expand` and `kernel` replace the space's choices in this unit. `se` adds squeeze-excite to its blocks.
    """

    channels: Count
    blocks: Count = 1
    stride: Annotated[Int, Field(ge=1, le=2)] = 1
    activation: Activation = "relu"
    se: bool = False
    depth: Depths | None = None
    expand: Factors | None = None
    kernel: Kernels | None = None


class Final(Settings):
    """1x1 convolutions around the global pooling: to `channels` before it, to `features` after it; 0: none."""

    channels: Natural = 0
    features: Natural = 0
    activation: Activation = "relu"


class Space(Settings):
    """A search space of one of two families.

    `resnet` has `basic` or `bottleneck` blocks; `mobilenet` has `mbconv` blocks: 1x1, depthwise, 1x1. `depth` lists
    possible numbers of blocks in addition to a unit's `blocks`. `expand` lists the inner width of a block relative to
    its output width (`mbconv`: input width). `kernel` lists the sides of depthwise convolutions. `width` lists
    multipliers of the channels of the stem and of each unit. Channels are rounded to multiples of `channel_multiple`,
    and at most 10 % down. `shortcut` is the shortcut of a ResNet unit's first block: a strided convolution (`conv`) or
    a convolution after mean pooling (`pool_conv`). With `where_needed` it is a strided convolution only if the block
    changes the image size or the width.
    """

    families: ClassVar[dict[str, tuple[str, ...]]] = {"resnet": ("basic", "bottleneck"), "mobilenet": ("mbconv",)}

    name: str = "custom"
    family: Literal["resnet", "mobilenet"] = "resnet"
    block: Literal["basic", "bottleneck", "mbconv"] = "basic"
    stem: Stem = Stem()
    units: Annotated[tuple[Unit, ...], Field(min_length=1)]
    final: Final = Final()
    shortcut: Literal["conv", "pool_conv", "where_needed"] = "conv"
    depth: Depths = (0,)
    expand: Factors = (1.0,)
    width: Factors = (1.0,)
    kernel: Kernels = (3,)
    channel_multiple: Count = 8
    image_channels: Count = 3
    image_size: Count = 32
    classes: Annotated[Int, Field(ge=2)] = 10

    @model_validator(mode="after")
    def choices_rise(self) -> Space:
        """Choice lists are strictly ascending, so the last entry belongs to the largest subnet; kernels are odd."""
        lists = {name: getattr(self, name) for name in ("depth", "expand", "width", "kernel")}
        for index, unit in enumerate(self.units):
            lists |= {f"units.{index}.{name}": getattr(unit, name) for name in ("depth", "expand", "kernel")}
        for name, choices in lists.items():
            if choices is not None and list(choices) != sorted(set(choices)):
                raise ValueError(f"{name} must list different choices, smallest first; it is {list(choices)}")
            if choices is not None and name.endswith("kernel") and any(side % 2 == 0 for side in choices):
                raise ValueError(f"{name} must list odd sides; it is {list(choices)}")
        return self

    @model_validator(mode="after")
    def blocks_are_the_familys(self) -> Space:
        """Kernels and squeeze-excite need family mobilenet, shortcuts family resnet; expand 1 is its only choice."""
        if self.block not in self.families[self.family]:
            blocks = " or ".join(self.families[self.family])
            raise ValueError(f"block is {self.block}; blocks of family {self.family} are {blocks}")
        if self.family == "resnet" and (self.kernel != (3,) or any(unit.kernel or unit.se for unit in self.units)):
            raise ValueError("kernel and se are settings of family mobilenet")
        if self.shortcut == "where_needed" and len(self.width) > 1:
            raise ValueError(f"shortcut where_needed allows a single width only; width is {list(self.width)}")
        if self.family == "mobilenet":
            if self.shortcut != "conv":
                raise ValueError("shortcut is a setting of family resnet")
            for choices in (self.expand, *(unit.expand for unit in self.units if unit.expand)):
                if 1 in choices and len(choices) > 1:
                    raise ValueError(
                        f"expand 1 (without 1x1 convolution) must be the only choice; it is {list(choices)}"
                    )
        return self
