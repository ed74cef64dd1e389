"""Networks that are trained whole: named spaces of a single arch, and networks outside the spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import model_validator

from proard.config.fields import Count, Settings
from proard.config.presets import PRESETS
from proard.config.spaces import Final, Space, Stem, Unit

BASIC: dict[str, Any] = {"family": "resnet", "block": "basic", "shortcut": "where_needed"}


class Fixed(Settings):
    """Common settings of networks outside the spaces: the shape of their images."""

    image_channels: Count = 3
    image_size: Count = 32
    classes: Count = 10


class Wide(Fixed):
    """Common settings of wide ResNets: `depth` 6n + 4 layers; 16 `widen`, 32 `widen` and 64 `widen` channels."""

    depth: Count = 34
    widen: Count = 10

    @model_validator(mode="after")
    def blocks_are_whole(self) -> Wide:
        """Require whole blocks: three groups of two-layer blocks and four other layers."""
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"depth is {self.depth}; expected: 6n + 4, such as 10, 16, 28 or 34")
        return self


class WideResNet(Wide):
    """Pre-activation ResNet: Zagoruyko and Komodakis, 2016, arXiv:1605.07146; as in robust training without dropout."""

    family: Literal["wide_resnet"] = "wide_resnet"
    name: str = "wide_resnet"


class DeepMindWideResNet(Wide):
    """The same as DeepMind's code has it (arXiv:2010.03593): a teacher from a checkpoint, with its `activation`."""

    family: Literal["deepmind_wide_resnet"] = "deepmind_wide_resnet"
    name: str = "deepmind_wide_resnet"
    activation: Literal["relu", "silu"] = "silu"


class DeepMindPreActResNet(Fixed):
    """Pre-activation ResNet as DeepMind's code has it (arXiv:2103.01946): a teacher from a checkpoint.

    `counts` and `widths`: blocks and channels of the four groups.
    """

    family: Literal["deepmind_preact_resnet"] = "deepmind_preact_resnet"
    name: str = "deepmind_preact_resnet"
    counts: tuple[Count, Count, Count, Count] = (2, 2, 2, 2)
    widths: tuple[Count, Count, Count, Count] = (64, 128, 256, 512)
    activation: Literal["relu", "silu"] = "silu"


class VisionTransformer(Fixed):
    """Torchvision's vision transformer: patches of side `patch`, `layers` of `heads` heads, widths `hidden` and `mlp`.

    Dosovitskiy et al., ICLR 2021, arXiv:2010.11929.
    """

    family: Literal["vit"] = "vit"
    name: str = "vit"
    patch: Count = 4
    layers: Count = 6
    heads: Count = 4
    hidden: Count = 256
    mlp: Count = 512

    @model_validator(mode="after")
    def parts_are_whole(self) -> VisionTransformer:
        """Require that `patch` divides `image_size` and `heads` divides `hidden`."""
        if self.image_size % self.patch:
            raise ValueError(f"patch is {self.patch}; expected: a divisor of image_size, {self.image_size}")
        if self.hidden % self.heads:
            raise ValueError(f"hidden is {self.hidden}; expected: a multiple of heads, {self.heads}")
        return self


def resnet(name: str, channels: Sequence[int], blocks: Sequence[int], *, stem_stride: int = 1) -> Space:
    """A ResNet of basic blocks for small images; 1x1 shortcuts where shapes change (He et al., arXiv:1512.03385)."""
    units = [
        Unit(channels=out, blocks=count, stride=1 if index == 0 else 2)
        for index, (out, count) in enumerate(zip(channels, blocks, strict=True))
    ]
    stem = Stem(channels=channels[0], stride=stem_stride)
    return Space(name=name, stem=stem, units=tuple(units), channel_multiple=4, **BASIC)


def mobilenet_v2(name: str, rows: Sequence[tuple[int, int, int, int]], *, stem: Stem, final: int) -> Space:
    """A MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) from rows of expansion, channels, blocks and stride."""
    units = [
        Unit(channels=out, blocks=count, stride=stride, activation="relu6", expand=(float(expand),))
        for expand, out, count, stride in rows
    ]
    last = Final(channels=final, activation="relu6")
    return Space(name=name, family="mobilenet", block="mbconv", stem=stem, units=tuple(units), final=last)


SHALLOW = ((1, 16, 1, 1), (6, 24, 2, 1))  # MobileNetV2 for 32x32: stride 1 in the stem and in the second row
DEEP = ((6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
MICRO = ((1, 8, 1, 1), (4, 16, 2, 1), (4, 24, 2, 2), (4, 48, 2, 2))
Named = Space | WideResNet | VisionTransformer

NETS: dict[str, Named] = {
    # 11.17 M parameters, 555 M MACs.
    "resnet18": resnet("resnet18", (64, 128, 256, 512), (2, 2, 2, 2)),
    # 0.27, 0.47 and 0.86 M parameters; 41, 69 and 126 M MACs.
    "resnet20": resnet("resnet20", (16, 32, 64), (3, 3, 3)),
    "resnet32": resnet("resnet32", (16, 32, 64), (5, 5, 5)),
    "resnet56": resnet("resnet56", (16, 32, 64), (9, 9, 9)),
    # 2.24 M parameters, 88 M MACs.
    "mobilenet_v2": mobilenet_v2(
        "mobilenet_v2", (*SHALLOW, *DEEP), stem=Stem(channels=32, activation="relu6"), final=1280
    ),
    "wide_resnet_34_10": WideResNet(name="wide_resnet_34_10"),  # 46.16 M parameters, 6.66 G MACs
    # 3.2 M parameters, 0.22 G MACs for 32x32; 86.6 M, 17.6 G for 224x224 and 1,000 classes (torchvision's vit_b_16).
    "vit_small": VisionTransformer(name="vit_small"),
    "vit_b_16": VisionTransformer(
        name="vit_b_16", patch=16, layers=12, heads=12, hidden=768, mlp=3072, image_size=224, classes=1000
    ),
    # For CIFAR-10 on two CPU cores: 0.15, 0.06 and 0.07 M parameters; 5.8, 2.6 and 4.9 M MACs.
    "resnet20_micro": resnet("resnet20_micro", (12, 24, 48), (3, 3, 3), stem_stride=2),
    "mobilenet_v2_micro": mobilenet_v2(
        "mobilenet_v2_micro", MICRO, stem=Stem(channels=16, stride=2, activation="relu6"), final=192
    ),
    "vit_micro": VisionTransformer(name="vit_micro", patch=4, layers=3, heads=3, hidden=48, mlp=96),
}


def named_nets() -> dict[str, Named]:
    """All networks that have a name: the presets of the search spaces and the networks above."""
    return {**PRESETS, **NETS}
