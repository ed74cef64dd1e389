"""The layers of a space: stem, blocks and tail for given multipliers, expansions and kernels.

`basic` and `bottleneck` blocks are those of ResNets, expanded relative to their output. `mbconv` blocks are the
inverted bottlenecks of MobileNets, expanded relative to their input, with a depthwise convolution of elastic kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

from proard.config import Space
from proard.space.spec import BlockSpec, ConvSpec, GateSpec, PoolSpec, Step

GATE_REDUCTION, GATE_MULTIPLE = 4, 8


def make_divisible(value: float, multiple: int) -> int:
    """Nearest multiple of `multiple`, at least `multiple` and at most 10 % below `value`."""
    rounded = max(multiple, int(value + multiple / 2) // multiple * multiple)
    return rounded + multiple if rounded < 0.9 * value else rounded


def shrunk(size: int, stride: int) -> int:
    """Side of a feature map after a stride."""
    return -(-size // stride)


def unit_width(space: Space, unit: int, multiplier: float) -> int:
    """Output channels of a unit; unit -1 is the stem."""
    full = space.stem.channels if unit < 0 else space.units[unit].channels
    return make_divisible(full * multiplier, space.channel_multiple)


def middle_width(space: Space, channels: int, out: int, expand: float) -> int:
    """Channels inside a block that maps `channels` to `out`."""
    return make_divisible((channels if space.block == "mbconv" else out) * expand, space.channel_multiple)


def stem_blocks(space: Space, widths: Sequence[float], *, residual: bool) -> list[BlockSpec]:
    """The stem at its width multipliers: one for its output; a deep stem has one for its middle before that.

    `residual` keeps the residual convolution of a deep stem.
    """
    stem, act = space.stem, space.stem.activation
    size, out = shrunk(space.image_size, stem.stride), unit_width(space, -1, widths[-1])
    if stem.kind == "deep":
        inner = make_divisible(stem.channels // 2 * widths[0], space.channel_multiple)
        blocks = [BlockSpec((ConvSpec("stem.in", space.image_channels, inner, 3, stem.stride, size, act),))]
        if residual:
            blocks.append(BlockSpec((ConvSpec("stem.residual", inner, inner, 3, 1, size, act),), ()))
        blocks.append(BlockSpec((ConvSpec("stem.out", inner, out, 3, 1, size, act),)))
    else:
        blocks = [BlockSpec((ConvSpec("stem.out", space.image_channels, out, 3, stem.stride, size, act),))]
    if stem.pool:
        blocks.append(BlockSpec((PoolSpec("max", 2, shrunk(size, 2)),)))
    return blocks


def unit_block(
    space: Space, unit: int, index: int, channels: int, *, width: float, expand: float, kernel: int, size: int
) -> BlockSpec:
    """Block `index` of a unit, for `channels` input maps of side `size`; only the first block is strided."""
    settings, name = space.units[unit], f"unit{unit + 1}.block{index + 1}"
    out, stride = unit_width(space, unit, width), settings.stride if index == 0 else 1
    middle, after = middle_width(space, channels, out, expand), shrunk(size, stride)
    act = settings.activation
    if space.block == "mbconv":
        steps: list[Step] = []
        if expand != 1:
            steps.append(ConvSpec(f"{name}.expand", channels, middle, 1, 1, size, act))
        steps.append(ConvSpec(f"{name}.depthwise", middle, middle, kernel, stride, after, act, depthwise=True))
        if settings.se:
            steps.append(_gate(name, middle))
        steps.append(ConvSpec(f"{name}.project", middle, out, 1, 1, after))
        before = space.stem.channels if unit == 0 else space.units[unit - 1].channels
        same = stride == 1 and channels == out and (index > 0 or before == settings.channels)
        return BlockSpec(tuple(steps), () if same else None)
    if space.block == "bottleneck":
        steps = [
            ConvSpec(f"{name}.conv1", channels, middle, 1, 1, size, act),
            ConvSpec(f"{name}.conv2", middle, middle, 3, stride, after, act),
            ConvSpec(f"{name}.conv3", middle, out, 1, 1, after),
        ]
    else:
        steps = [
            ConvSpec(f"{name}.conv1", channels, middle, 3, stride, after, act),
            ConvSpec(f"{name}.conv2", middle, out, 3, 1, after),
        ]
    return BlockSpec(tuple(steps), _shortcut(space, name, channels, out, stride, after) if index == 0 else (), act)


def tail(space: Space, channels: int, size: int) -> tuple[list[BlockSpec], tuple[ConvSpec, ...], int]:
    """Layers after the last unit: blocks before the pooling, convolutions after it, features of the linear layer."""
    final = space.final
    blocks: list[BlockSpec] = []
    mixer: tuple[ConvSpec, ...] = ()
    if final.channels:
        conv = ConvSpec("final.out", channels, final.channels, 1, 1, size, final.activation)
        blocks, channels = [BlockSpec((conv,))], final.channels
    if final.features:
        mixer = (ConvSpec("final.mix", channels, final.features, 1, 1, 1, final.activation, norm=False),)
        channels = final.features
    return blocks, mixer, channels


def _gate(name: str, channels: int) -> GateSpec:
    """Squeeze to a quarter of the channels, then excite all of them."""
    squeezed = make_divisible(channels // GATE_REDUCTION, GATE_MULTIPLE)
    reduce = ConvSpec(f"{name}.squeeze", channels, squeezed, 1, 1, 1, "relu", norm=False, bias=True)
    excite = ConvSpec(f"{name}.excite", squeezed, channels, 1, 1, 1, "h_sigmoid", norm=False, bias=True)
    return GateSpec((reduce, excite))


def _shortcut(space: Space, name: str, channels: int, out: int, stride: int, after: int) -> tuple[Step, ...]:
    """The 1x1 shortcut of a ResNet unit's first block, strided or after mean pooling, or nothing."""
    if space.shortcut == "where_needed" and channels == out and stride == 1:
        return ()
    if space.shortcut != "pool_conv":
        return (ConvSpec(f"{name}.shortcut", channels, out, 1, stride, after),)
    conv = ConvSpec(f"{name}.shortcut", channels, out, 1, 1, after)
    return (PoolSpec("mean", stride, after), conv) if stride > 1 else (conv,)
