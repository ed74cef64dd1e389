"""The elastic ResNet space: genotypes, canonical form, features and costs of whole populations at once.

A genotype is a vector of choice indices: depth genes, then width genes, then one expand gene per block slot. Genes of
blocks that depth leaves out are 0 in canonical form, so that equal subnets have equal genotypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from math import prod

import numpy as np

from proard.config import Space
from proard.space.arch import Arch
from proard.space.spec import BlockSpec, ConvSpec, NetSpec


def make_divisible(value: float, multiple: int) -> int:
    """Nearest multiple of `multiple`, at least one of it and not more than 10 % below `value`."""
    rounded = max(multiple, int(value + multiple / 2) // multiple * multiple)
    return rounded + multiple if rounded < 0.9 * value else rounded


class SearchSpace:
    """All archs of a space's settings.

    Parameters
    ----------
    settings : Space
        Stem, units and choice lists, for images of the given size and number of classes.
    """

    def __init__(self, settings: Space) -> None:
        self.settings = settings
        self.deep_stem = settings.stem.kind == "deep"
        self.slots = [unit.blocks + settings.depth[-1] for unit in settings.units]
        self.depth_choices: list[tuple[int, ...]] = [settings.depth] * len(settings.units)
        if self.deep_stem:  # its residual block is kept exactly when the stem's depth is the largest
            self.depth_choices.insert(0, tuple(sorted({settings.depth[0], settings.depth[-1]})))
        self.width_choices = [settings.width] * (len(settings.units) + (2 if self.deep_stem else 1))
        self.expand_choices = [settings.expand] * sum(self.slots)

    @cached_property
    def choices(self) -> list[int]:
        """Number of choices of every gene."""
        return [len(options) for options in (*self.depth_choices, *self.width_choices, *self.expand_choices)]

    @cached_property
    def sections(self) -> tuple[slice, slice, slice]:
        """Where depth, width and expand genes stand in a genotype."""
        depth, width = len(self.depth_choices), len(self.width_choices)
        return slice(0, depth), slice(depth, depth + width), slice(depth + width, len(self.choices))

    @property
    def size(self) -> int:
        """Number of different genotypes in canonical form."""
        expand = len(self.settings.expand)
        per_unit = [
            sum(expand ** (unit.blocks + extra) for extra in self.settings.depth) for unit in self.settings.units
        ]
        stem = len(self.depth_choices[0]) if self.deep_stem else 1
        return stem * len(self.settings.width) ** len(self.width_choices) * prod(per_unit)

    # --- archs and genotypes -----------------------------------------------------------------------------------

    def arch(self, genotype: Sequence[int]) -> Arch:
        """The arch that a genotype encodes, in canonical form."""
        genes = self.canonical(np.asarray(genotype)[None])[0]
        depth, width, expand = self.sections
        active = self._active(genes[None])[0]
        return Arch(
            tuple(options[gene] for options, gene in zip(self.depth_choices, genes[depth], strict=True)),
            tuple(float(options[gene]) for options, gene in zip(self.width_choices, genes[width], strict=True)),
            tuple(
                float(options[gene]) if on else 0.0
                for options, gene, on in zip(self.expand_choices, genes[expand], active, strict=True)
            ),
        )

    def genotype(self, arch: Arch) -> tuple[int, ...]:
        """Canonical genotype of an arch.

        Raises
        ------
        ValueError
            The arch does not belong to this space.
        """
        try:
            genes = [
                *(options.index(value) for options, value in zip(self.depth_choices, arch.depth, strict=True)),
                *(options.index(value) for options, value in zip(self.width_choices, arch.width, strict=True)),
                *(
                    options.index(value) if value else 0
                    for options, value in zip(self.expand_choices, arch.expand, strict=True)
                ),
            ]
        except ValueError:
            raise ValueError(f"arch {arch.to_json()} is not of space {self.settings.name}") from None
        return tuple(int(gene) for gene in self.canonical(np.asarray(genes)[None])[0])

    def canonical(self, genotypes: np.ndarray) -> np.ndarray:
        """Genotypes of shape (n, genes) with 0 in the genes of blocks that are left out."""
        canonical = np.array(genotypes, dtype=np.int64)
        canonical[:, self.sections[2]] *= self._active(canonical)
        return canonical

    def _active(self, genotypes: np.ndarray) -> np.ndarray:
        """Which block slots depth keeps, of shape (n, blocks)."""
        beyond, unit = self._slots_by_unit
        depth = np.asarray(self.settings.depth)[genotypes[:, self.sections[0]][:, int(self.deep_stem) :]]  # (n, units)
        return beyond < depth[:, unit]

    @cached_property
    def _slots_by_unit(self) -> tuple[np.ndarray, np.ndarray]:
        """Of every block slot: its number beyond the unit's least number of blocks, and its unit; (blocks,) each."""
        beyond = [np.arange(slots) - unit.blocks for unit, slots in zip(self.settings.units, self.slots, strict=True)]
        return np.concatenate(beyond), np.repeat(np.arange(len(self.slots)), self.slots)

    @property
    def largest(self) -> Arch:
        """The last choice everywhere: the dynamic teacher's arch."""
        return self.arch([count - 1 for count in self.choices])

    @property
    def smallest(self) -> Arch:
        """The first choice everywhere."""
        return self.arch([0] * len(self.choices))

    def diagonal(self) -> list[Arch]:
        """Uniform scaling: every gene at the same relative position, smallest to largest."""
        steps = max(self.choices)
        archs = [
            self.arch([round(step / (steps - 1) * (count - 1)) if steps > 1 else 0 for count in self.choices])
            for step in range(steps)
        ]
        return list(dict.fromkeys(archs))

    # --- drawing -----------------------------------------------------------------------------------------------

    def open_choices(
        self,
        *,
        width: Sequence[float] | None = None,
        depth: Sequence[int] | None = None,
        expand: Sequence[float] | None = None,
    ) -> list[np.ndarray]:
        """Per gene, the choice indices that a phase leaves open; None opens a dim fully.

        Raises
        ------
        ValueError
            A value is not among the space's choices.
        """
        wanted = [("depth", depth, self.depth_choices), ("width", width, self.width_choices)]
        wanted.append(("expand", expand, self.expand_choices))
        genes = []
        for name, values, choices in wanted:
            strange = set(values or ()) - set(getattr(self.settings, name))
            if strange:
                raise ValueError(
                    f"{name} {sorted(strange)} is not in space {self.settings.name}; "
                    f"choices are {list(getattr(self.settings, name))}"
                )
            for options in choices:
                kept = [i for i, value in enumerate(options) if values is None or value in values]
                genes.append(np.asarray(kept or [len(options) - 1]))
        return genes

    def sample(self, count: int, rng: np.random.Generator, *, among: list[np.ndarray] | None = None) -> np.ndarray:
        """Draw `count` canonical genotypes, each gene uniform and independent; of shape (count, genes)."""
        among = among or self.open_choices()
        return self.canonical(np.stack([rng.choice(options, size=count) for options in among], axis=1))

    # --- features and costs ------------------------------------------------------------------------------------

    def features(self, genotypes: np.ndarray) -> np.ndarray:
        """One-hot code of every gene, all zeros for blocks left out; of shape (n, sum of choices), float64."""
        genotypes = np.asarray(genotypes)
        active = np.ones(genotypes.shape, dtype=bool)
        active[:, self.sections[2]] = self._active(genotypes)
        features = np.zeros((len(genotypes), sum(self.choices)))
        starts = np.cumsum([0, *self.choices[:-1]])
        features[np.arange(len(genotypes))[:, None], starts + genotypes] = active
        return features

    def costs(self, genotypes: np.ndarray) -> dict[str, np.ndarray]:
        """`macs` and `params` of every genotype, each of shape (n,), int64; exact, from a table per block."""
        genotypes = np.asarray(genotypes)
        depth, width, expand = self.sections
        active = self._active(genotypes)
        stems, units = self._cost_tables
        widths, expands = genotypes[:, width], genotypes[:, expand]
        stem_genes = tuple(genotypes[:, depth][:, :1].T) if self.deep_stem else ()
        first_unit = widths.shape[1] - len(units)
        total = stems[(*stem_genes, *widths[:, :first_unit].T)].copy()  # (n, 2)
        slot = 0
        for unit, (first, others) in enumerate(units):
            own, before = widths[:, first_unit + unit], widths[:, first_unit + unit - 1]
            total += first[before, own, expands[:, slot]]
            inner = slice(slot + 1, slot + self.slots[unit])
            total += (others[own[:, None], expands[:, inner]] * active[:, inner, None]).sum(axis=1)
            slot += self.slots[unit]
        last = np.asarray([self._unit_width(len(units) - 1, i) for i in range(len(self.settings.width))])[widths[:, -1]]
        total[:, 0] += last * self.settings.classes
        total[:, 1] += (last + 1) * self.settings.classes
        return {"macs": total[:, 0], "params": total[:, 1]}

    @cached_property
    def _cost_tables(self) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """(macs, params) of every stem, and per unit of every first and every later block."""
        widths, expands = range(len(self.settings.width)), range(len(self.settings.expand))
        if self.deep_stem:
            stems = np.asarray(
                [
                    [[_cost(self._stem_blocks(kept, middle, out)) for out in widths] for middle in widths]
                    for kept in self.depth_choices[0]
                ]
            )
        else:
            stems = np.asarray([_cost(self._stem_blocks(0, 0, out)) for out in widths])
        units, size = [], -(-self.settings.image_size // self.settings.stem.stride)
        for unit, settings in enumerate(self.settings.units):
            first = [
                [
                    [_cost([self._block(unit, 0, self._unit_width(unit - 1, before), own, e, size)]) for e in expands]
                    for own in widths
                ]
                for before in widths
            ]
            size = -(-size // settings.stride)
            others = [
                [_cost([self._block(unit, 1, self._unit_width(unit, own), own, e, size)]) for e in expands]
                for own in widths
            ]
            units.append((np.asarray(first), np.asarray(others)))
        return stems, units

    # --- the network spelled out -------------------------------------------------------------------------------

    @lru_cache(maxsize=4096)  # noqa: B019 - a space lives as long as the process
    def spec(self, arch: Arch) -> NetSpec:
        """The static network of an arch: every convolution with its channels and feature map."""
        genes = np.asarray(self.genotype(arch))
        _, width, expand = (list(genes[part]) for part in self.sections)
        if self.deep_stem:
            blocks = self._stem_blocks(arch.depth[0], width[0], width[1])
            extra, unit_widths, channels = arch.depth[1:], width[2:], self._stem_width(width[1])
        else:
            blocks = self._stem_blocks(0, 0, width[0])
            extra, unit_widths, channels = arch.depth, width[1:], self._stem_width(width[0])
        slot, size = 0, blocks[-1].convs[-1].out_size
        for unit, settings in enumerate(self.settings.units):
            for index in range(settings.blocks + extra[unit]):
                blocks.append(self._block(unit, index, channels, unit_widths[unit], expand[slot + index], size))
                channels, size = self._unit_width(unit, unit_widths[unit]), blocks[-1].convs[-1].out_size
            slot += self.slots[unit]
        s = self.settings
        return NetSpec(tuple(blocks), channels, s.classes, s.image_channels, s.image_size)

    def _stem_width(self, choice: int) -> int:
        """Channels that leave the stem."""
        return make_divisible(self.settings.stem.channels * self.settings.width[choice], self.settings.channel_multiple)

    def _unit_width(self, unit: int, choice: int) -> int:
        """Channels that leave a unit; unit -1 is the stem."""
        if unit < 0:
            return self._stem_width(choice)
        channels = self.settings.units[unit].channels * self.settings.width[choice]
        return make_divisible(channels, self.settings.channel_multiple)

    def _stem_blocks(self, extra: int, middle: int, out: int) -> list[BlockSpec]:
        """The stem; `extra` keeps the residual convolution of a deep stem when it is the largest depth."""
        s = self.settings
        size = -(-s.image_size // s.stem.stride)
        if not self.deep_stem:
            conv = ConvSpec("stem.out", s.image_channels, self._stem_width(out), 3, s.stem.stride, size, True)
            return [BlockSpec((conv,), None, False)]
        inner = make_divisible(s.stem.channels // 2 * s.width[middle], s.channel_multiple)
        first = ConvSpec("stem.in", s.image_channels, inner, 3, s.stem.stride, size, True)
        blocks = [BlockSpec((first,), None, False)]
        if extra == s.depth[-1]:
            residual = ConvSpec("stem.residual", inner, inner, 3, 1, size, True)
            blocks.append(BlockSpec((residual,), "identity", False))
        last = ConvSpec("stem.out", inner, self._stem_width(out), 3, 1, size, True)
        return [*blocks, BlockSpec((last,), None, False)]

    def _block(self, unit: int, index: int, channels: int, width: int, expand: int, before: int) -> BlockSpec:
        """Block `index` of a unit, entered at side `before`; only the first strides, with a convolution as shortcut."""
        s = self.settings
        out = self._unit_width(unit, width)
        middle = make_divisible(out * s.expand[expand], s.channel_multiple)
        stride = s.units[unit].stride if index == 0 else 1
        size = -(-before // stride)
        name = f"unit{unit + 1}.block{index + 1}"
        if s.block == "bottleneck":
            convs = (
                ConvSpec(f"{name}.conv1", channels, middle, 1, 1, before, True),
                ConvSpec(f"{name}.conv2", middle, middle, 3, stride, size, True),
                ConvSpec(f"{name}.conv3", middle, out, 1, 1, size, False),
            )
        else:
            convs = (
                ConvSpec(f"{name}.conv1", channels, middle, 3, stride, size, True),
                ConvSpec(f"{name}.conv2", middle, out, 3, 1, size, False),
            )
        shortcut = ConvSpec(f"{name}.shortcut", channels, out, 1, stride, size, False) if index == 0 else "identity"
        return BlockSpec(convs, shortcut, True)


def _cost(blocks: Sequence[BlockSpec]) -> tuple[int, int]:
    """(macs, params) of some blocks."""
    convs = [conv for block in blocks for conv in block.all_convs]
    return sum(conv.macs for conv in convs), sum(conv.params for conv in convs)
