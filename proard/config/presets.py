"""The named search spaces of the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proard.config.spaces import Activation, Final, Space, Stem, Unit

RESNET_UNITS = (
    Unit(channels=256, blocks=2, stride=1),
    Unit(channels=512, blocks=2, stride=2),
    Unit(channels=1024, blocks=4, stride=2),
    Unit(channels=2048, blocks=2, stride=2),
)
RESNET_CHOICES: dict[str, Any] = {"depth": (0, 1, 2), "expand": (0.2, 0.25, 0.35), "width": (0.65, 0.8, 1.0)}
MOBILE_CHOICES: dict[str, Any] = {"depth": (0, 1, 2), "expand": (3.0, 4.0, 6.0), "kernel": (3, 5, 7)}
FIXED: dict[str, Any] = {"depth": (0,), "expand": (1.0,), "kernel": (3,)}  # a MobileNet's first block is not elastic
PROXYLESS_WIDTHS = (24, 40, 80, 96, 192, 320)
MOBILENET_V2_WIDTHS = (24, 32, 64, 96, 160, 320)
STRIDES = {"cifar": (1, (1, 2, 2, 1, 2)), "imagenet": (2, (2, 2, 2, 1, 2))}
IMAGENET_SIZE = 224
IMAGES: dict[str, dict[str, Any]] = {"cifar": {}, "imagenet": {"image_size": IMAGENET_SIZE, "classes": 1000}}


def mobilenet_v3(name: str, images: str) -> Space:
    """The elastic MobileNetV3-Large of once-for-all (Cai et al. 2020, arXiv:1908.09791, released code)."""
    stem_stride, strides = STRIDES[images]
    activations: tuple[Activation, ...] = ("relu", "relu", "h_swish", "h_swish", "h_swish")
    units = [
        Unit(channels=channels, blocks=2, stride=stride, activation=activation, se=se)
        for channels, stride, activation, se in zip(
            (24, 40, 80, 112, 160), strides, activations, (False, True, False, True, True), strict=True
        )
    ]
    return Space(
        name=name,
        family="mobilenet",
        block="mbconv",
        stem=Stem(channels=16, stride=stem_stride, activation="h_swish"),
        units=(Unit(channels=16, **FIXED), *units),
        final=Final(channels=960, features=1280, activation="h_swish"),
        **MOBILE_CHOICES,
        **IMAGES[images],
    )


def mobilenet_v2(name: str, images: str, *, channels: Sequence[int]) -> Space:
    """MobileNetV2's layers without squeeze-excite, ReLU6 everywhere; the last unit has one block."""
    stem_stride, strides = STRIDES[images]
    units = [
        Unit(channels=out, blocks=2, stride=stride, activation="relu6")
        for out, stride in zip(channels, strides, strict=False)
    ]
    last = Unit(channels=channels[-1], activation="relu6", depth=(0,))
    return Space(
        name=name,
        family="mobilenet",
        block="mbconv",
        stem=Stem(channels=32, stride=stem_stride, activation="relu6"),
        units=(Unit(channels=16, activation="relu6", **FIXED), *units, last),
        final=Final(channels=1280, activation="relu6"),
        **MOBILE_CHOICES,
        **IMAGES[images],
    )


def with_activation(space: Space, activation: Activation) -> Space:
    """A space with another activation in all layers, and its name behind the space's."""
    put = {"activation": activation}
    return space.model_copy(
        update={
            "name": f"{space.name}_{activation}",
            "stem": space.stem.model_copy(update=put),
            "units": tuple(unit.model_copy(update=put) for unit in space.units),
            "final": space.final.model_copy(update=put),
        }
    )


PRESETS: dict[str, Space] = {
    # The published ProARD ResNet space for CIFAR (arXiv:2506.07666, released code): 46.08 M parameters, 2358 M MACs
    # at its largest, 5.22 M and 285.2 M at its smallest, 2.459e12 nominal choices.
    "resnet_cifar": Space(
        name="resnet_cifar",
        block="bottleneck",
        stem=Stem(kind="deep", channels=64, stride=1),
        units=RESNET_UNITS,
        **RESNET_CHOICES,
    ),
    # The same for 224-pixel images: strided stem with max-pooling, shortcuts behind mean pooling; 7491.6 M MACs.
    "resnet_imagenet": Space(
        name="resnet_imagenet",
        block="bottleneck",
        stem=Stem(kind="deep", channels=64, stride=2, pool=True),
        units=RESNET_UNITS,
        shortcut="pool_conv",
        **RESNET_CHOICES,
        **IMAGES["imagenet"],
    ),
    # Per 10 classes and 32x32 images, largest and smallest: 6.40 M parameters, 179.7 M MACs; 2.14 M, 35.3 M.
    "mobilenet_v3_cifar": mobilenet_v3("mobilenet_v3_cifar", "cifar"),
    "mobilenet_v3_imagenet": mobilenet_v3("mobilenet_v3_imagenet", "imagenet"),
    # 3.84 M parameters, 187.8 M MACs; 1.23 M, 42.5 M. Widths of ProxylessNAS (Cai et al. 2019, arXiv:1812.00332).
    "proxyless_cifar": mobilenet_v2("proxyless_cifar", "cifar", channels=PROXYLESS_WIDTHS),
    "proxyless_imagenet": mobilenet_v2("proxyless_imagenet", "imagenet", channels=PROXYLESS_WIDTHS),
    # 3.07 M parameters, 161.5 M MACs; 1.05 M, 36.7 M. Widths of MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381).
    "mobilenet_v2_cifar": mobilenet_v2("mobilenet_v2_cifar", "cifar", channels=MOBILENET_V2_WIDTHS),
    "mobilenet_v2_imagenet": mobilenet_v2("mobilenet_v2_imagenet", "imagenet", channels=MOBILENET_V2_WIDTHS),
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
    # MobileNetV3's layers for CIFAR-10 on two CPU cores: stride-2 stem, thin where maps are large; 0.9 M to 11 M MACs.
    "mobilenet_micro": Space(
        name="mobilenet_micro",
        family="mobilenet",
        block="mbconv",
        stem=Stem(channels=16, stride=2, activation="h_swish"),
        units=(
            Unit(channels=16, **FIXED),
            Unit(channels=24, stride=1),
            Unit(channels=40, stride=2, activation="h_swish", se=True),
            Unit(channels=80, stride=2, activation="h_swish", se=True),
        ),
        final=Final(channels=240, activation="h_swish"),
        depth=(0, 1, 2),
        expand=(2.0, 3.0, 4.0),
        width=(0.6, 0.8, 1.0),
        kernel=(3, 5),
        channel_multiple=4,
    ),
    # MobileNetV3's layers for the 8x8 digits.
    "mobilenet_digits": Space(
        name="mobilenet_digits",
        family="mobilenet",
        block="mbconv",
        stem=Stem(channels=16, stride=1, activation="h_swish"),
        units=(
            Unit(channels=16, activation="h_swish"),
            Unit(channels=32, stride=2, activation="h_swish", se=True),
        ),
        final=Final(channels=64, features=64, activation="h_swish"),
        depth=(0, 1),
        expand=(2.0, 4.0),
        width=(0.5, 1.0),
        kernel=(3, 5),
        channel_multiple=4,
        image_channels=1,
        image_size=8,
    ),
}
# With SiLU in place of ReLU (Gowal et al. 2020, arXiv:2010.03593): a smooth network, at one exponential per number.
PRESETS |= {f"{name}_silu": with_activation(PRESETS[name], "silu") for name in ("resnet_micro", "resnet_cifar")}
