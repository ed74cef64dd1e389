"""Parts of a network as a graph of operators: what is exported, timed on a device, and held in memory.

A part is the stem, one block, what follows the last unit, or a whole network. Its graph is that of the exported ONNX
file: folded convolutions with biases, activations, the normalisation of pixels before the first of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from proard.space.memory import IMAGES, arena, peak
from proard.space.spec import Activation, BlockSpec, ConvSpec, GateSpec, NetSpec, PoolSpec, Step

BYTES = 4  # of a number, float32
Map = tuple[str, tuple[int, ...]]  # name and shape of one image's map

ACTIVATIONS: dict[Activation, tuple[str, dict[str, Any]]] = {
    "relu": ("Relu", {}),
    "relu6": ("Clip", {}),
    "h_swish": ("HardSwish", {}),
    "h_sigmoid": ("HardSigmoid", {"alpha": 1 / 6}),
}


@dataclass(frozen=True)
class Node:
    """One operator of a graph.

    Attributes
    ----------
    kind : str
        The operator's name in ONNX.
    reads : tuple of str
        Names of the maps that it reads.
    output : str
        Name of the map that it writes.
    shape : tuple of int
        Of one image's output, without the batch.
    attributes : dict
        As in ONNX.
    layer : ConvSpec, optional
        Of a convolution.
    """

    kind: str
    reads: tuple[str, ...]
    output: str
    shape: tuple[int, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    layer: ConvSpec | None = None

    @property
    def bytes(self) -> int:
        """Size of the output of one image."""
        size = BYTES
        for side in self.shape:
            size *= side
        return size


@dataclass(frozen=True)
class Part:
    """Some blocks in sequence and, of a network's end, pooling, mixer and linear layer.

    Attributes
    ----------
    blocks : tuple of BlockSpec
    channels, size : int
        Of the maps that enter.
    of_images : bool
        The maps that enter are images, which are normalised first.
    classes : int
        Outputs of the linear layer; 0 where the part is not a network's end.
    features : int
        Inputs of the linear layer.
    mixer : tuple of ConvSpec
        Convolutions between pooling and linear layer.
    """

    blocks: tuple[BlockSpec, ...]
    channels: int
    size: int
    of_images: bool = False
    classes: int = 0
    features: int = 0
    mixer: tuple[ConvSpec, ...] = ()

    @classmethod
    def whole(cls, spec: NetSpec) -> Part:
        """A whole network."""
        return cls(
            spec.blocks, spec.image_channels, spec.image_size, True, spec.classes, spec.features, tuple(spec.mixer)
        )

    @cached_property
    def convs(self) -> tuple[ConvSpec, ...]:
        """All convolutions."""
        return (*(conv for block in self.blocks for conv in block.convs), *self.mixer)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return sum(conv.macs for conv in self.convs) + self.features * self.classes

    @property
    def params(self) -> int:
        """Trained parameters, as of `NetSpec`."""
        return sum(conv.params for conv in self.convs) + (self.features + 1) * self.classes * (self.classes > 0)

    @property
    def flash(self) -> int:
        """Bytes of the exported weights in float32: batch norm is folded into one bias per output channel."""
        folded = sum(conv.weights + conv.out_channels for conv in self.convs)
        ends = (self.features + 1) * self.classes + 2 * self.channels * self.of_images
        return BYTES * (folded + ends)

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that are equal for parts of equal layers, whatever the layers are named."""
        described = json.dumps(_without_names(asdict(self)), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(described.encode()).hexdigest()[:16]

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The graph in order of execution; the map that enters is named `images`."""
        return tuple(_Graph(self).nodes)

    @property
    def sram(self) -> int:
        """Peak bytes of the activations of one image, from when the input is there to the output; see `peak`."""
        return peak(self.nodes, BYTES * self.channels * self.size**2)

    @property
    def arena(self) -> int:
        """Bytes of the block in which onnxruntime places the activations of one image; see `arena`."""
        return arena(self.nodes)


class _Graph:
    """Builder of a part's nodes."""

    def __init__(self, part: Part) -> None:
        self.nodes: list[Node] = []
        maps: Map = (IMAGES, (part.channels, part.size, part.size))
        if part.of_images:
            maps = self.add("Add", [self.add("Mul", [maps], maps[1])], maps[1])
        for block in part.blocks:
            out = self.steps(block.steps, maps)
            if block.shortcut is not None:
                out = self.add("Add", [out, self.steps(block.shortcut, maps)], out[1])
            maps = self.activation(block.activation, out)
        if part.classes:
            maps = self.add("ReduceMean", [maps], maps[1][:1], keepdims=False)
            if part.mixer:
                maps = self.add("Unsqueeze", [maps], (*maps[1], 1, 1))
                maps = self.steps(part.mixer, maps)
                maps = self.add("Flatten", [maps], maps[1][:1])
            self.add("Gemm", [maps], (part.classes,))

    def add(
        self,
        kind: str,
        reads: Sequence[Map],
        shape: tuple[int, ...],
        layer: ConvSpec | None = None,
        **attributes: Any,
    ) -> Map:
        """Append an operator; its output's name and shape."""
        name = f"map{len(self.nodes)}"
        self.nodes.append(Node(kind, tuple(entry[0] for entry in reads), name, shape, attributes, layer))
        return name, shape

    def steps(self, steps: Sequence[Step], maps: Map) -> Map:
        """Some steps in sequence."""
        for step in steps:
            if isinstance(step, ConvSpec):
                shape = (step.out_channels, step.out_size, step.out_size)
                maps = self.activation(step.activation, self.add("Conv", [maps], shape, step))
            elif isinstance(step, GateSpec):
                mean = self.add("ReduceMean", [maps], (maps[1][0], 1, 1), keepdims=True)
                maps = self.add("Mul", [maps, self.steps(step.convs, mean)], maps[1])
            else:
                maps = self.pool(step, maps)
        return maps

    def activation(self, name: Activation, maps: Map) -> Map:
        """An activation, or nothing."""
        if name == "none":
            return maps
        if name == "silu":
            return self.add("Mul", [maps, self.add("Sigmoid", [maps], maps[1])], maps[1])
        kind, attributes = ACTIVATIONS[name]
        return self.add(kind, [maps], maps[1], **attributes)

    def pool(self, step: PoolSpec, maps: Map) -> Map:
        """A pooling."""
        shape = (maps[1][0], step.out_size, step.out_size)
        if step.kind == "max":
            return self.add("MaxPool", [maps], shape, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        side, partial = [step.stride] * 2, int(maps[1][-1] % step.stride > 0)
        return self.add("AveragePool", [maps], shape, kernel_shape=side, strides=side, ceil_mode=partial)


def _without_names(value: Any) -> Any:
    """Nested settings without the names of layers."""
    if isinstance(value, dict):
        return {key: _without_names(entry) for key, entry in value.items() if key != "name"}
    return [_without_names(entry) for entry in value] if isinstance(value, (list, tuple)) else value
