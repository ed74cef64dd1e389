"""Elastic search spaces: genotypes, canonical form, features and costs of whole populations at once.

A genotype is a vector of choice indices: depth genes, width genes, one expand gene per block slot and, if kernels are
elastic, one kernel gene per block slot. In canonical form the genes of blocks removed by depth are 0, so that equal
subnets have equal genotypes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import product
from math import prod
from typing import TypeVar

import numpy as np

from proard.config import Space
from proard.space.arch import DIMS, Arch
from proard.space.blocks import stem_blocks, tail, unit_block, unit_width
from proard.space.latency import LatencyTable
from proard.space.spec import NetSpec
from proard.space.tables import CostTables

Choices = TypeVar("Choices", bound=tuple[float, ...])


class SearchSpace:
    """All archs that the settings of a space allow.

    Parameters
    ----------
    settings : Space
        Stem, units and choice lists, for images of the given size and number of classes.
    device : LatencyTable, optional
        The device whose latency is among the costs.

    Attributes
    ----------
    options : dict of str to list of tuple
        Per elastic dim, the choices of each of its genes.
    """

    def __init__(self, settings: Space, device: LatencyTable | None = None) -> None:
        self.settings, self.device = settings, device
        self.deep_stem = settings.stem.kind == "deep"
        units = settings.units
        depths = [unit.depth or settings.depth for unit in units]
        self.slots = [unit.blocks + extra[-1] for unit, extra in zip(units, depths, strict=True)]
        if self.deep_stem:  # its residual block exists only at the largest depth of the stem
            depths.insert(0, tuple(sorted({settings.depth[0], settings.depth[-1]})))
        self.depths = depths
        self.kernels = self._per_slot([unit.kernel or settings.kernel for unit in units])
        self.options: dict[str, Sequence[tuple[float, ...]]] = {
            "depth": depths,
            "width": [settings.width] * (len(units) + (2 if self.deep_stem else 1)),
            "expand": self._per_slot([unit.expand or settings.expand for unit in units]),
        }
        if settings.block == "mbconv":
            self.options["kernel"] = self.kernels

    def _per_slot(self, per_unit: Sequence[Choices]) -> list[Choices]:
        """The choices of every block slot from those of every unit."""
        return [options for options, slots in zip(per_unit, self.slots, strict=True) for _ in range(slots)]

    @cached_property
    def choices(self) -> list[int]:
        """Number of choices of every gene."""
        return [len(options) for genes in self.options.values() for options in genes]

    @cached_property
    def sections(self) -> tuple[slice, ...]:
        """The range of each dim's genes in a genotype, in the order of `options`."""
        ends = np.cumsum([len(genes) for genes in self.options.values()]).tolist()
        return tuple(slice(start, end) for start, end in zip([0, *ends], ends, strict=False))

    @property
    def size(self) -> int:
        """Number of different canonical genotypes."""
        count, first = 1, 0
        for unit, extra, slots in zip(self.settings.units, self._unit_depths, self.slots, strict=True):
            variants = prod(len(self.options[dim][first]) for dim in self.options if dim not in ("depth", "width"))
            count *= sum(variants ** (unit.blocks + more) for more in extra)
            first += slots
        stem = len(self.options["depth"][0]) if self.deep_stem else 1
        return stem * len(self.settings.width) ** len(self.options["width"]) * count

    @property
    def _unit_depths(self) -> list[tuple[int, ...]]:
        """The depth choices of every unit, without those of the stem."""
        return self.depths[int(self.deep_stem) :]

    @cached_property
    def elastic_kernels(self) -> dict[str, tuple[int, ...]]:
        """By name, the kernels of every convolution with several choices, smallest first."""
        slots = [(unit, index) for unit, count in enumerate(self.slots) for index in range(count)]
        return {
            f"unit{unit + 1}.block{index + 1}.depthwise": kernels
            for (unit, index), kernels in zip(slots, self.kernels, strict=True)
            if len(kernels) > 1 and "kernel" in self.options
        }

    # --- archs and genotypes -----------------------------------------------------------------------------------

    def arch(self, genotype: Sequence[int]) -> Arch:
        """The arch that a genotype encodes, in canonical form."""
        genes = self.canonical(np.asarray(genotype)[None])[0]
        active, dims = self._active(genes[None])[0], {}
        for (dim, options), part in zip(self.options.items(), self.sections, strict=True):
            kept = active if dim in ("expand", "kernel") else [True] * len(options)
            number = DIMS[dim]
            dims[dim] = tuple(
                number(choices[gene]) if on else number(0)
                for choices, gene, on in zip(options, genes[part], kept, strict=True)
            )
        return Arch(**dims)

    def read_arch(self, text: str) -> Arch:
        """The arch described by this JSON."""
        return Arch.from_json(text)

    def genotype(self, arch: Arch) -> tuple[int, ...]:
        """The canonical genotype of an arch.

        Raises
        ------
        ValueError
            The arch does not belong to this space.
        """
        try:
            if arch.kernel and "kernel" not in self.options:
                raise ValueError("kernel")
            genes = [
                0 if dim in ("expand", "kernel") and not value else choices.index(value)
                for dim, options in self.options.items()
                for choices, value in zip(options, getattr(arch, dim), strict=True)
            ]
        except ValueError:
            raise ValueError(f"arch {arch.to_json()} is not of space {self.settings.name}") from None
        return tuple(int(gene) for gene in self.canonical(np.asarray(genes)[None])[0])

    def canonical(self, genotypes: np.ndarray) -> np.ndarray:
        """Genotypes of shape (n, genes) with 0 in the genes of removed blocks."""
        canonical = np.array(genotypes, dtype=np.int64)
        active = self._active(canonical)
        for part in self.sections[2:]:
            canonical[:, part] *= active
        return canonical

    def _active(self, genotypes: np.ndarray) -> np.ndarray:
        """Whether depth keeps each block slot, of shape (n, blocks)."""
        number, unit, extra = self._slots_by_unit
        genes = genotypes[:, self.sections[0]][:, int(self.deep_stem) :]  # (n, units)
        beyond = extra[np.arange(len(self.slots)), genes]
        return number < beyond[:, unit]

    @cached_property
    def _slots_by_unit(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per block slot: number beyond the unit's minimum, and unit; per unit: blocks added by each depth gene."""
        number = [np.arange(slots) - unit.blocks for unit, slots in zip(self.settings.units, self.slots, strict=True)]
        extra = np.zeros((len(self.slots), max(map(len, self._unit_depths))), dtype=np.int64)
        for row, choices in zip(extra, self._unit_depths, strict=True):
            row[: len(choices)] = choices
        return np.concatenate(number), np.repeat(np.arange(len(self.slots)), self.slots), extra

    @property
    def largest(self) -> Arch:
        """The last choice of every gene: the dynamic teacher's arch."""
        return self.arch([count - 1 for count in self.choices])

    @property
    def smallest(self) -> Arch:
        """The first choice of every gene."""
        return self.arch([0] * len(self.choices))

    def diagonal(self) -> list[Arch]:
        """Uniform scaling: all genes at the same relative position, from smallest to largest."""
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
        kernel: Sequence[int] | None = None,
    ) -> list[np.ndarray]:
        """Per gene, the indices of the open choices of a phase; with None all choices of a dim are open.

        Raises
        ------
        ValueError
            A value is not one of the space's choices.
        """
        genes = []
        for name, values in (("depth", depth), ("width", width), ("expand", expand), ("kernel", kernel)):
            options = self.options.get(name, [])
            strange = set(values or ()) - set().union(*options)
            if strange:
                raise ValueError(
                    f"{name} {sorted(strange)} is not in space {self.settings.name}; "
                    f"choices are {sorted(set().union(*options))}"
                )
            for choices in options:
                kept = [i for i, value in enumerate(choices) if values is None or value in values]
                genes.append(np.asarray(kept or [len(choices) - 1]))
        return genes

    def layer_widths(self, among: list[np.ndarray]) -> dict[str, set[int]]:
        """Per convolution of stem and units, all its numbers of output channels under the open choices."""
        s, found = self.settings, defaultdict(set)
        widths, expands = (
            [[choices[i] for i in kept] for choices, kept in zip(self.options[dim], among[part], strict=True)]
            for dim, part in zip(("width", "expand"), self.sections[1:3], strict=True)
        )
        for stem in product(*widths[: 1 + self.deep_stem]):
            for conv in (conv for block in stem_blocks(s, stem, residual=self.deep_stem) for conv in block.convs):
                found[conv.name].add(conv.out_channels)
        del widths[: int(self.deep_stem)]  # the widths of the units follow that of the stem's output
        slots = [(unit, index) for unit, count in enumerate(self.slots) for index in range(count)]
        for (unit, index), inner in zip(slots, expands, strict=True):
            entered = unit if index == 0 else unit + 1
            for own, before, expand in product(widths[unit + 1], widths[entered], inner):
                if index == 0 or before == own:
                    channels = unit_width(s, entered - 1, before)
                    block = unit_block(s, unit, index, channels, width=own, expand=expand, kernel=3, size=1)
                    for conv in block.convs:
                        found[conv.name].add(conv.out_channels)
        return dict(found)

    def sample(self, count: int, rng: np.random.Generator, *, among: list[np.ndarray] | None = None) -> np.ndarray:
        """Draw `count` canonical genotypes of shape (count, genes); each gene is uniform and independent."""
        among = among or self.open_choices()
        return self.canonical(np.stack([rng.choice(options, size=count) for options in among], axis=1))

    # --- features and costs ------------------------------------------------------------------------------------

    def features(self, genotypes: np.ndarray) -> np.ndarray:
        """One-hot code of every gene, zero for removed blocks; of shape (n, sum of choices), float64."""
        genotypes = np.asarray(genotypes)
        active = np.ones(genotypes.shape, dtype=bool)
        kept = self._active(genotypes)
        for part in self.sections[2:]:
            active[:, part] = kept
        features = np.zeros((len(genotypes), sum(self.choices)))
        starts = np.cumsum([0, *self.choices[:-1]])
        features[np.arange(len(genotypes))[:, None], starts + genotypes] = active
        return features

    def costs(self, genotypes: np.ndarray) -> dict[str, np.ndarray]:
        """`macs`, `params`, `flash`, `sram` of every genotype, each of shape (n,), int64, exact; `latency` of a device.

        `flash`: bytes of the exported weights. `sram`: peak bytes of the activations of one image by liveness, which
        `arena` of a part seldom keeps within. `latency`: predicted milliseconds, float64.
        """
        genotypes = np.asarray(genotypes)
        return self.tables.costs(genotypes, self._active(genotypes))

    @cached_property
    def tables(self) -> CostTables:
        """The costs of every block."""
        return CostTables(self, self.device)

    # --- the layers of a network -------------------------------------------------------------------------------

    @lru_cache(maxsize=4096)  # noqa: B019 - a space exists until the process ends
    def spec(self, arch: Arch) -> NetSpec:
        """The layers of an arch, each with its channels and feature map.

        Raises
        ------
        ValueError
            The arch does not belong to this space.
        """
        self.genotype(arch)
        s, first_unit = self.settings, 1 + self.deep_stem
        residual = self.deep_stem and arch.depth[0] == s.depth[-1]
        blocks = stem_blocks(s, arch.width[:first_unit], residual=residual)
        channels, size, slot = unit_width(s, -1, arch.width[first_unit - 1]), blocks[-1].out_size, 0
        for unit, settings in enumerate(s.units):
            width = arch.width[first_unit + unit]
            for index in range(settings.blocks + arch.depth[int(self.deep_stem) + unit]):
                kernel = arch.kernel[slot + index] if arch.kernel else 3
                expand = arch.expand[slot + index]
                blocks.append(
                    unit_block(s, unit, index, channels, size=size, width=width, expand=expand, kernel=kernel)
                )
                channels, size = unit_width(s, unit, width), blocks[-1].out_size
            slot += self.slots[unit]
        after, mixer, features = tail(s, channels, size)
        return NetSpec((*blocks, *after), features, s.classes, s.image_channels, s.image_size, mixer)
