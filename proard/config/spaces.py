"""Search spaces as data: stem, units and the choice lists of every elastic dim, with the presets of the package."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from proard.config.fields import Count, Int, Natural, Positive, Settings


class Stem(Settings):
    """First convolutions. `conv`: one 3x3. `deep`: 3x3, an elastic residual 3x3, 3x3 (ResNet-D style)."""

    kind: Literal["conv", "deep"] = "conv"
    channels: Count = 32
    stride: Annotated[Int, Field(ge=1, le=2)] = 1


class Unit(Settings):
    """Blocks at one resolution: full output width, least number of blocks, stride of the first block."""

    channels: Count
    blocks: Count = 1
    stride: Annotated[Int, Field(ge=1, le=2)] = 1


class Space(Settings):
    """A ResNet search space.

    `depth` lists how many blocks may stand beyond a unit's `blocks`; `expand` lists the inner width of a block
    relative to its output width; `width` lists multipliers of the stem's and of each unit's channels. Channels
    are rounded to multiples of `channel_multiple`, never down by more than 10 %.
    """

    name: str = "custom"
    family: Literal["resnet"] = "resnet"
    block: Literal["basic", "bottleneck"] = "basic"
    stem: Stem = Stem()
    units: Annotated[tuple[Unit, ...], Field(min_length=1)]
    depth: Annotated[tuple[Natural, ...], Field(min_length=1)] = (0,)
    expand: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)
    width: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)
    channel_multiple: Count = 8
    image_channels: Count = 3
    image_size: Count = 32
    classes: Annotated[Int, Field(ge=2)] = 10

    @model_validator(mode="after")
    def choices_rise(self) -> Space:
        """Choice lists are strictly rising, so that the last entry is the largest subnet's."""
        for name in ("depth", "expand", "width"):
            choices = getattr(self, name)
            if list(choices) != sorted(set(choices)):
                raise ValueError(f"{name} lists its choices once each, smallest first; it is {list(choices)}")
        return self


PRESETS: dict[str, Space] = {
    # The published ProARD ResNet space for CIFAR (arXiv:2506.07666, released code): 46.08 M parameters, 2358 M MACs
    # at its largest, 5.22 M and 285.2 M at its smallest, 2.459e12 nominal choices.
    "resnet_cifar": Space(
        name="resnet_cifar",
        block="bottleneck",
        stem=Stem(kind="deep", channels=64, stride=1),
        units=(
            Unit(channels=256, blocks=2, stride=1),
            Unit(channels=512, blocks=2, stride=2),
            Unit(channels=1024, blocks=4, stride=2),
            Unit(channels=2048, blocks=2, stride=2),
        ),
        depth=(0, 1, 2),
        expand=(0.2, 0.25, 0.35),
        width=(0.65, 0.8, 1.0),
    ),
    # CIFAR-10 on two CPU cores: stride-2 stem, 3x3 blocks, thin where maps are large; 2.3 M to 18.7 M MACs.
    "resnet_micro": Space(
        name="resnet_micro",
        stem=Stem(channels=16, stride=2),
        units=(
            Unit(channels=16, stride=1),
            Unit(channels=64, stride=2),
            Unit(channels=128, stride=2),
        ),
        depth=(0, 1),
        expand=(0.75, 1.0),
        width=(0.6, 0.8, 1.0),
        channel_multiple=2,
    ),
    # The 8x8 digits, for the quick start and the tests.
    "resnet_digits": Space(
        name="resnet_digits",
        stem=Stem(channels=16, stride=1),
        units=(Unit(channels=16, stride=1), Unit(channels=32, stride=2)),
        depth=(0, 1, 2),
        expand=(0.5, 1.0),
        width=(0.25, 0.5, 1.0),
        channel_multiple=4,
        image_channels=1,
        image_size=8,
    ),
}
