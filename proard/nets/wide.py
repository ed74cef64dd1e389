"""Wide ResNets with pre-activation blocks, with the parameter names of published checkpoints (TRADES)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proard.artifacts import ArtifactError, matched, read_state_dict
from proard.config import ConfigError, WideResNet
from proard.kernels import Conv2d

UNUSED = ("sub_block1.",)  # TRADES' class builds a block that its forward pass does not use


class Block(nn.Module):
    """Norm, ReLU and a 3x3 convolution, twice; where the width changes the first norm also feeds the shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
        self.conv1 = Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = Conv2d(out, out, 3, 1, 1, bias=False)
        self.convShortcut = None if channels == out else Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, h, w) to (batch, out, h', w')."""
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class Group(nn.Module):
    """Blocks at one resolution."""

    def __init__(self, channels: int, out: int, count: int, stride: int) -> None:
        super().__init__()
        blocks = [Block(channels if i == 0 else out, out, stride if i == 0 else 1) for i in range(count)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """The blocks in sequence."""
        return self.layer(x)


class WideNet(nn.Module):
    """A wide ResNet for normalised images, with global average pooling over maps of any size.

    References
    ----------
    Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016, arXiv:1605.07146.
    """

    def __init__(self, settings: WideResNet) -> None:
        super().__init__()
        count, widths = (settings.depth - 4) // 6, [16, *(16 * settings.widen * factor for factor in (1, 2, 4))]
        self.conv1 = Conv2d(settings.image_channels, 16, 3, 1, 1, bias=False)
        self.block1 = Group(widths[0], widths[1], count, 1)
        self.block2 = Group(widths[1], widths[2], count, 2)
        self.block3 = Group(widths[2], widths[3], count, 2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], settings.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015, fan-out
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (batch, classes)."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


def read_trades(path: str, *, image_size: int) -> tuple[WideResNet, dict[str, Tensor]]:
    """Settings and weights of a wide ResNet in a checkpoint of TRADES' layout.

    Parameters
    ----------
    path : str
        A `torch.save` of a state dict, such as the official `model_cifar_wrn.pt` (see `read_state_dict`).
    image_size : int
        Side of the run's images, which the file does not contain.

    Returns
    -------
    WideResNet
        Depth, width, channels and classes, from the shapes of the tensors.
    dict of Tensor
        float32, under the names of `WideNet`. The network takes images in [0, 1] without normalisation.

    Raises
    ------
    ArtifactError
        The file is missing, is no state dict of finite tensors, or has a missing, an unknown or a misshapen tensor.
    """
    tensors = read_state_dict(path)
    tensors = {name: value for name, value in tensors.items() if not name.startswith(UNUSED)}
    settings = _settings_of(path, tensors, image_size)
    with torch.device("meta"):
        wanted = WideNet(settings).state_dict()
    names = f"WideResNet-{settings.depth}-{settings.widen} as TRADES saves it"
    return settings, matched(path, tensors, wanted, names=names)


def _settings_of(path: str, tensors: Mapping[str, Tensor], image_size: int) -> WideResNet:
    """Depth and width from the tensors."""
    try:
        channels, (classes, _) = tensors["conv1.weight"].shape[1], tensors["fc.weight"].shape
        widen, rest = divmod(tensors["block1.layer.0.conv1.weight"].shape[0], 16)
    except (KeyError, ValueError, IndexError):
        raise ArtifactError(
            f"{path} is no WideResNet as TRADES saves it: expected conv1.weight, block1.layer.0.conv1.weight and "
            f"fc.weight among its names; the first are {', '.join(sorted(tensors)[:3]) or '(none)'}"
        ) from None
    blocks = len({name.split(".")[2] for name in tensors if name.startswith("block1.layer.")})
    try:
        if rest:
            raise ConfigError(f"block1 is {16 * widen + rest} channels wide, no multiple of 16")
        shape = {"image_channels": channels, "image_size": image_size, "classes": classes}
        return WideResNet(name=f"wide_resnet_{6 * blocks + 4}_{widen}", depth=6 * blocks + 4, widen=widen, **shape)
    except ValueError as error:
        raise ArtifactError(f"{path} is no WideResNet as TRADES saves it: {str(error).splitlines()[0]}") from None
