"""ResNets as DeepMind's code on adversarial robustness has them, with the parameter names of published checkpoints.

Many teachers on the RobustBench leaderboard have this layout: Gowal 2020 and 2021, Rebuffi 2021, Pang 2022, Wang 2023,
Cui 2023. A convolution of stride 2 is padded on the right and below alone, as TensorFlow's `SAME` pads even maps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proard.artifacts import ArtifactError, matched, read_state_dict
from proard.config import DeepMindPreActResNet, DeepMindWideResNet
from proard.kernels import Conv2d

Settings = DeepMindWideResNet | DeepMindPreActResNet
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu}
PIXELS = {  # mean and standard deviation by number of classes, where a checkpoint does not contain them
    10: ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution; with stride 2 its zeros lie on the right and below alone."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__(channels, out, 3, stride, 1 if stride == 1 else 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, h, w) to (batch, out, h', w')."""
        return super().forward(x if self.padding == (1, 1) else F.pad(x, (0, 1, 0, 1)))


class WideBlock(nn.Module):
    """Norm, activation and a 3x3 convolution, twice; where the width changes the first norm also feeds the shortcut."""

    def __init__(self, channels: int, out: int, stride: int, activation: str) -> None:
        super().__init__()
        self.activate = ACTIVATIONS[activation]
        self.batchnorm_0, self.batchnorm_1 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
        self.conv_0, self.conv_1 = Conv3x3(channels, out, stride), Conv3x3(out, out)
        self.shortcut = None if channels == out else Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, h, w) to (batch, out, h', w')."""
        active = self.activate(self.batchnorm_0(x))
        out = self.conv_0(active)
        out = self.conv_1(self.activate(self.batchnorm_1(out)))
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideGroup(nn.Module):
    """Blocks at one resolution."""

    def __init__(self, channels: int, out: int, count: int, stride: int, activation: str) -> None:
        super().__init__()
        shapes = [(channels if i == 0 else out, out, stride if i == 0 else 1) for i in range(count)]
        self.block = nn.Sequential(*(WideBlock(*shape, activation) for shape in shapes))

    def forward(self, x: Tensor) -> Tensor:
        """The blocks in sequence."""
        return self.block(x)


class WideNet(nn.Module):
    """A wide ResNet for normalised images, with global average pooling over maps of any size.

    References
    ----------
    Gowal et al., Uncovering the Limits of Adversarial Training against Norm-Bounded Adversarial Examples, 2020,
    arXiv:2010.03593.
    """

    def __init__(self, settings: DeepMindWideResNet) -> None:
        super().__init__()
        count, widths = (settings.depth - 4) // 6, [16, *(16 * settings.widen * factor for factor in (1, 2, 4))]
        self.activate = ACTIVATIONS[settings.activation]
        self.init_conv = Conv3x3(settings.image_channels, 16)
        groups = zip(widths, widths[1:], (1, 2, 2), strict=False)
        self.layer = nn.Sequential(
            *(WideGroup(channels, out, count, stride, settings.activation) for channels, out, stride in groups)
        )
        self.batchnorm = nn.BatchNorm2d(widths[3])
        self.logits = nn.Linear(widths[3], settings.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (batch, classes)."""
        x = self.layer(self.init_conv(x))
        return self.logits(self.activate(self.batchnorm(x)).mean((2, 3)))


class PreActBlock(nn.Module):
    """Norm, activation and a 3x3 convolution, twice; where the shape changes the shortcut is a 3x3 convolution."""

    def __init__(self, channels: int, out: int, stride: int, activation: str) -> None:
        super().__init__()
        self.activate = ACTIVATIONS[activation]
        self.batchnorm_0, self.batchnorm_1 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
        self.conv_2d_1, self.conv_2d_2 = Conv3x3(channels, out, stride), Conv3x3(out, out)
        self.shortcut = Conv3x3(channels, out, stride) if stride > 1 or channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, h, w) to (batch, out, h', w')."""
        out = self.conv_2d_1(self.activate(self.batchnorm_0(x)))
        out = self.conv_2d_2(self.activate(self.batchnorm_1(out)))
        return out + (x if self.shortcut is None else self.shortcut(x))


class PreActNet(nn.Module):
    """A pre-activation ResNet for normalised images, with global average pooling over maps of any size.

    References
    ----------
    Rebuffi et al., Fixing Data Augmentation to Improve Adversarial Robustness, 2021, arXiv:2103.01946.
    """

    def __init__(self, settings: DeepMindPreActResNet) -> None:
        super().__init__()
        self.activate = ACTIVATIONS[settings.activation]
        self.conv_2d = Conv3x3(settings.image_channels, settings.widths[0])
        channels = settings.widths[0]
        for number, (out, count) in enumerate(zip(settings.widths, settings.counts, strict=True)):
            strides = [2 if number and index == 0 else 1 for index in range(count)]
            shapes = [(channels if index == 0 else out, out, stride) for index, stride in enumerate(strides)]
            blocks = nn.Sequential(*(PreActBlock(*shape, settings.activation) for shape in shapes))
            self.add_module(f"layer_{number}", blocks)
            channels = out
        self.batchnorm = nn.BatchNorm2d(channels)
        self.logits = nn.Linear(channels, settings.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (batch, classes)."""
        x = self.conv_2d(x)
        for number in range(4):
            x = self.get_submodule(f"layer_{number}")(x)
        return self.logits(self.activate(self.batchnorm(x)).mean((2, 3)))


def build(settings: Settings) -> nn.Module:
    """The network of these settings."""
    return WideNet(settings) if isinstance(settings, DeepMindWideResNet) else PreActNet(settings)


def read_deepmind(path: str, *, image_size: int, activation: str) -> tuple[Settings, dict[str, Tensor], list[Tensor]]:
    """Settings, weights and pixel statistics of a ResNet in a checkpoint of DeepMind's layout.

    Parameters
    ----------
    path : str
        A `torch.save` of a state dict, such as RobustBench's `Wang2023Better_WRN-28-10.pt` (see `read_state_dict`).
    image_size : int
        Side of the run's images, which the file does not contain.
    activation : str
        `relu` or `silu`, which the file does not contain either.

    Returns
    -------
    Settings
        The rest of them from names and shapes of the tensors.
    dict of Tensor
        float32, under the names of the network.
    list of Tensor
        Mean and standard deviation of pixels in [0, 1], each of shape (channels,).

    Raises
    ------
    ArtifactError
        The file is missing, is no state dict of finite tensors, or has a missing, an unknown or a misshapen tensor.
    """
    tensors = read_state_dict(path)
    settings = _settings_of(path, tensors, image_size, activation)
    pixels = [tensors.pop(name, None) for name in ("mean", "std")]
    with torch.device("meta"):
        wanted = build(settings).state_dict()
    weights = matched(path, tensors, wanted, names=f"{settings.name} as DeepMind's code saves it")
    if any(value is None for value in pixels):
        if settings.classes not in PIXELS or settings.image_channels != 3:
            raise ArtifactError(f"{path} lacks mean and std, which are known only for CIFAR-10 and CIFAR-100")
        pixels = [torch.tensor(values) for values in PIXELS[settings.classes]]
    return settings, weights, [value.float().reshape(-1) for value in pixels if value is not None]


def _settings_of(path: str, tensors: Mapping[str, Tensor], image_size: int, activation: str) -> Settings:
    """Kind, depth and width from the tensors."""
    try:
        shape = {"image_size": image_size, "classes": len(tensors["logits.bias"]), "activation": activation}
        if "init_conv.weight" in tensors:
            blocks = _count(tensors, r"layer\.0\.block\.(\d+)\.")
            widen, rest = divmod(len(tensors["layer.0.block.0.conv_0.weight"]), 16)
            if rest:
                raise ArtifactError(f"{path}: layer.0 is {16 * widen + rest} channels wide, no multiple of 16")
            name = f"deepmind_wide_resnet_{6 * blocks + 4}_{widen}"
            shape |= {"image_channels": tensors["init_conv.weight"].shape[1], "depth": 6 * blocks + 4, "widen": widen}
            return DeepMindWideResNet(name=name, **shape)
        counts = tuple(_count(tensors, rf"layer_{number}\.(\d+)\.") for number in range(4))
        widths = tuple(len(tensors[f"layer_{number}.0.conv_2d_1.weight"]) for number in range(4))
        shape |= {"image_channels": tensors["conv_2d.weight"].shape[1], "counts": counts, "widths": widths}
        return DeepMindPreActResNet(name=f"deepmind_preact_resnet_{2 * sum(counts) + 2}", **shape)
    except (KeyError, ValueError) as error:
        raise ArtifactError(
            f"{path} is no ResNet as DeepMind's code saves it: expected logits.bias and init_conv.weight, or "
            f"conv_2d.weight, among its names ({str(error).splitlines()[0]}); the first are "
            f"{', '.join(sorted(tensors)[:3]) or '(none)'}"
        ) from None


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """Number of blocks whose names begin so."""
    return len({found[1] for name in tensors if (found := re.match(pattern, name))})
