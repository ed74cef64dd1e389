"""Networks outside the search spaces, with the same interface: a space of one arch with its costs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from proard.config import DeepMindPreActResNet, DeepMindWideResNet, Space, VisionTransformer, WideResNet
from proard.space.protocols import NetSpace
from proard.space.search_space import SearchSpace
from proard.space.spec import FixedSpec

FixedSettings = WideResNet | DeepMindWideResNet | DeepMindPreActResNet | VisionTransformer
FAMILIES: dict[str, type[FixedSettings]] = {
    "wide_resnet": WideResNet,
    "deepmind_wide_resnet": DeepMindWideResNet,
    "deepmind_preact_resnet": DeepMindPreActResNet,
    "vit": VisionTransformer,
}


@dataclass(frozen=True)
class FixedArch:
    """The one arch of a fixed network: its settings as canonical JSON."""

    text: str

    def to_json(self) -> str:
        """Canonical JSON; equal networks give equal text."""
        return self.text

    @property
    def arch_id(self) -> str:
        """Twelve hexadecimal digits that name this network in tables."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


class FixedSpace:
    """A wide ResNet, a vision transformer or another network of `FAMILIES` as a space with a single arch.

    Parameters
    ----------
    settings : WideResNet, DeepMindWideResNet, DeepMindPreActResNet or VisionTransformer
        The network.
    """

    def __init__(self, settings: FixedSettings) -> None:
        self.settings = settings
        self.options: dict[str, list[tuple[float, ...]]] = {}
        described = json.dumps(settings.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        self.largest = self.smallest = FixedArch(described)

    def spec(self, arch: FixedArch) -> FixedSpec:
        """Costs and shape of the network.

        Raises
        ------
        ValueError
            The arch belongs to another network.
        """
        self.genotype(arch)
        return self._spec

    def read_arch(self, text: str) -> FixedArch:
        """The arch described by this JSON."""
        return FixedArch(text)

    def genotype(self, arch: FixedArch) -> tuple[int, ...]:
        """An empty genotype; an arch of another network is a ValueError."""
        if arch != self.largest:
            raise ValueError(f"arch {arch.to_json()} is not network {self.settings.name}")
        return ()

    @cached_property
    def _spec(self) -> FixedSpec:
        """The network's costs, computed once."""
        s = self.settings
        if isinstance(s, VisionTransformer):
            macs, params = vit_cost(s)
        elif isinstance(s, DeepMindPreActResNet):
            macs, params = preact_resnet_cost(s)
        else:
            macs, params = wide_resnet_cost(s)
        return FixedSpec(macs, params, s.classes, s.image_channels, s.image_size)


def wide_resnet_cost(net: WideResNet | DeepMindWideResNet) -> tuple[int, int]:
    """Multiply-accumulates and trained parameters: convolutions, norms, linear layer."""
    size, channels = net.image_size, 16
    macs = params = net.image_channels * channels * 9
    macs *= size**2
    for group, width in enumerate(16 * net.widen * factor for factor in (1, 2, 4)):
        for block in range((net.depth - 4) // 6):
            stride = 2 if group and not block else 1
            size = -(-size // stride)
            weights = 9 * (channels * width + width**2) + (channels * width if channels != width else 0)
            macs += weights * size**2
            params += weights + 2 * (channels + width)
            channels = width
    return macs + channels * net.classes, params + 2 * channels + (channels + 1) * net.classes


def preact_resnet_cost(net: DeepMindPreActResNet) -> tuple[int, int]:
    """Multiply-accumulates and trained parameters: convolutions, norms, linear layer."""
    size, channels = net.image_size, net.widths[0]
    macs = params = net.image_channels * channels * 9
    macs *= size**2
    for group, (width, count) in enumerate(zip(net.widths, net.counts, strict=True)):
        for block in range(count):
            stride = 2 if group and not block else 1
            size = -(-size // stride)
            changes = stride > 1 or channels != width
            weights = 9 * (channels * width * (1 + changes) + width**2)
            macs += weights * size**2
            params += weights + 2 * (channels + width)
            channels = width
    return macs + channels * net.classes, params + 2 * channels + (channels + 1) * net.classes


def vit_cost(net: VisionTransformer) -> tuple[int, int]:
    """Multiply-accumulates and trained parameters: patches, attention with both of its products, MLP, head."""
    patches, hidden, mlp = (net.image_size // net.patch) ** 2, net.hidden, net.mlp
    tokens, pixels = patches + 1, net.image_channels * net.patch**2
    layer = 4 * hidden**2 + 2 * hidden * mlp
    macs = patches * pixels * hidden + net.layers * (tokens * layer + 2 * tokens**2 * hidden) + hidden * net.classes
    own = layer + 4 * hidden + mlp + hidden + 4 * hidden  # biases of attention and MLP, two norms
    params = (pixels + 1) * hidden + (1 + tokens) * hidden + net.layers * own + 2 * hidden
    return macs, params + (hidden + 1) * net.classes


def read_space(described: Mapping[str, Any]) -> NetSpace:
    """The space whose settings are in a file's header."""
    family = FAMILIES.get(described.get("family", ""), Space)
    return space_of(family.model_validate(described))


def space_of(net: Space | FixedSettings) -> NetSpace:
    """The space of a network's settings."""
    return SearchSpace(net) if isinstance(net, Space) else FixedSpace(net)
