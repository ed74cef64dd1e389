"""Costs of all genotypes at once, from one table per block of a space."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from proard.space.blocks import shrunk, stem_blocks, tail, unit_block, unit_width
from proard.space.latency import LatencyTable
from proard.space.parts import Part

if TYPE_CHECKING:
    from proard.space.search_space import SearchSpace

# The cheapest beginning of a network that ends in one width: cost, genes of depth, of width, of every block.
Reached = tuple[float, tuple[int, ...], tuple[int, ...], tuple[tuple[int, ...], ...]]


class CostTables:
    """Parts and costs of every stem, block and tail of a space, indexed by genes.

    Parameters
    ----------
    space : SearchSpace
    device : LatencyTable, optional
        Adds the column `latency`.

    Attributes
    ----------
    columns : tuple of str
        The costs in the last axis of the tables. The cost of a network is the sum over its parts; of the last column,
        `sram`, it is the maximum.
    stems : ndarray
        By the stem's depth gene (deep stems alone) and its width genes.
    units : list of (ndarray, ndarray)
        Of every unit, the first block by the width genes before and of the unit, expand (and kernel); any later block
        by the unit's width gene, expand (and kernel).
    tails : ndarray
        What follows the last unit, by its width gene.
    """

    def __init__(self, space: SearchSpace, device: LatencyTable | None = None) -> None:
        self.space, self.device = space, device
        self.columns = ("macs", "params", "flash", *(["latency"] if device else []), "sram")
        self.stems = self._values(_stem_parts(space))
        self.units = [(self._values(first), self._values(others)) for first, others in _unit_parts(space)]
        self.tails = self._values(_tail_parts(space))

    def costs(self, genotypes: np.ndarray, active: np.ndarray) -> dict[str, np.ndarray]:
        """Every column of genotypes (n, genes), each of shape (n,): int64; `latency` in milliseconds, float64.

        `active` of shape (n, blocks): whether depth keeps each block.
        """
        space = self.space
        depths, widths, expands, *kernels = (genotypes[:, part] for part in space.sections)
        stem_genes = tuple(depths[:, :1].T) if space.deep_stem else ()
        first_unit = widths.shape[1] - len(self.units)
        total = self.stems[(*stem_genes, *widths[:, :first_unit].T)].copy()  # (n, columns)
        slot = 0
        for unit, (first, others) in enumerate(self.units):
            own, before = widths[:, first_unit + unit], widths[:, first_unit + unit - 1]
            entry = first[(before, own, *(genes[:, slot] for genes in (expands, *kernels)))] * active[:, slot, None]
            self._add(total, entry[:, None])
            inner = slice(slot + 1, slot + space.slots[unit])
            inside = (genes[:, inner] for genes in (expands, *kernels))
            self._add(total, others[(own[:, None], *inside)] * active[:, inner, None])
            slot += space.slots[unit]
        self._add(total, self.tails[widths[:, -1]][:, None])
        costs = dict(zip(self.columns, total.T, strict=True))
        latency = {"latency": costs.pop("latency") + self.device.base_ms} if self.device else {}
        return {**{name: values.astype(np.int64) for name, values in costs.items()}, **latency}

    def _add(self, total: np.ndarray, blocks: np.ndarray) -> None:
        """Add the costs of blocks (n, blocks, columns) to those of networks (n, columns), in place."""
        if blocks.shape[1]:
            total[:, :-1] += blocks[:, :, :-1].sum(axis=1)
            np.maximum(total[:, -1], blocks[:, :, -1].max(axis=1), out=total[:, -1])

    def cheapest(self, column: str) -> np.ndarray:
        """The genotype of least cost, of shape (genes,); measured latency may fall where a gene rises.

        Unit by unit, the best of all beginnings that end in the same width is kept: exact, as costs add up.
        """
        space, index = self.space, self.columns.index(column)

        def joined(*costs: float) -> float:
            return max(costs) if column == "sram" else sum(costs)

        deep = int(space.deep_stem)
        best: dict[int, Reached] = {}
        stems = self.stems[..., index]
        for genes in sorted(np.ndindex(stems.shape), key=lambda genes: -stems[genes]):  # the cheapest comes last
            best[genes[-1]] = (float(stems[genes]), genes[:deep], genes[deep:], ())
        for unit, (first, others) in enumerate(self.units):
            reached: dict[int, Reached] = {}
            counts = [space.settings.units[unit].blocks + extra for extra in space.depths[deep + unit]]
            for own, (before, (cost, depths, widths, blocks)) in product(range(len(others)), best.items()):
                entry, later = first[before, own, ..., index], others[own, ..., index]
                head, more = (tuple(map(int, np.unravel_index(t.argmin(), t.shape))) for t in (entry, later))
                for gene, count in enumerate(counts):
                    total = joined(cost, float(entry[head]), *[float(later[more])] * (count - 1))
                    if own not in reached or total < reached[own][0]:
                        inside = (*blocks, head, *[more] * (space.slots[unit] - 1))
                        reached[own] = (total, (*depths, gene), (*widths, own), inside)
            best = reached
        end = min(best, key=lambda own: joined(best[own][0], float(self.tails[own, index])))
        _, depths, widths, blocks = best[end]
        genotype = [*depths, *widths, *(gene for dim in zip(*blocks, strict=True) for gene in dim)]
        return space.canonical(np.asarray([genotype]))[0]

    def _values(self, parts: np.ndarray) -> np.ndarray:
        """The costs of an array of parts, float64, exact below 9e15; in a new last axis."""
        rows = [
            [
                self.device.of_part(part) if self.device and name == "latency" else getattr(part, name)
                for name in self.columns
            ]
            for part in parts.flat
        ]
        return np.asarray(rows, dtype=np.float64).reshape(*parts.shape, len(self.columns))


def parts_of(space: SearchSpace) -> Iterator[Part]:
    """All parts of which the networks of a space consist; several may have the same key."""
    for array in (_stem_parts(space), *(array for pair in _unit_parts(space) for array in pair), _tail_parts(space)):
        yield from array.flat


def _array(parts: Sequence[Part], *shape: int) -> np.ndarray:
    """An array of objects."""
    array = np.empty(len(parts), dtype=object)
    array[:] = parts
    return array.reshape(shape)


def _stem_parts(space: SearchSpace) -> np.ndarray:
    """The stems, by genes as in `CostTables.stems`."""
    s, widths = space.settings, space.settings.width
    kept = [value == s.depth[-1] for value in space.options["depth"][0]] if space.deep_stem else [False]
    parts = [
        Part(tuple(stem_blocks(s, genes, residual=residual)), s.image_channels, s.image_size, of_images=True)
        for residual in kept
        for genes in product(widths, repeat=1 + space.deep_stem)
    ]
    return _array(parts, *([len(kept)] if space.deep_stem else []), *[len(widths)] * (1 + space.deep_stem))


def _unit_parts(space: SearchSpace) -> list[tuple[np.ndarray, np.ndarray]]:
    """First and later blocks of every unit, by genes as in `CostTables.units`."""
    s, widths = space.settings, space.settings.width
    size, units, slot = _stem_size(space), [], 0
    for unit, settings in enumerate(s.units):
        expands = space.options["expand"][slot]
        kernels = space.kernels[slot] if "kernel" in space.options else (3,)
        inside = (len(expands), *([len(kernels)] if "kernel" in space.options else []))

        def blocks(index: int, entries: Sequence[tuple[int, float]], side: int) -> list[Part]:
            return [
                Part(
                    (unit_block(s, unit, index, channels, width=own, expand=e, kernel=k, size=side),),  # noqa: B023
                    channels,
                    side,
                )
                for channels, own in entries
                for e, k in product(expands, kernels)  # noqa: B023
            ]

        after = shrunk(size, settings.stride)
        first = blocks(0, [(unit_width(s, unit - 1, before), own) for before in widths for own in widths], size)
        others = blocks(1, [(unit_width(s, unit, own), own) for own in widths], after)
        units.append((_array(first, len(widths), len(widths), *inside), _array(others, len(widths), *inside)))
        size, slot = after, slot + space.slots[unit]
    return units


def _tail_parts(space: SearchSpace) -> np.ndarray:
    """What follows the last unit, by its width gene."""
    s, size = space.settings, _stem_size(space)
    for unit in s.units:
        size = shrunk(size, unit.stride)
    parts = []
    for width in s.width:
        channels = unit_width(s, len(s.units) - 1, width)
        blocks, mixer, features = tail(s, channels, size)
        parts.append(Part(tuple(blocks), channels, size, classes=s.classes, features=features, mixer=tuple(mixer)))
    return _array(parts, len(s.width))


def _stem_size(space: SearchSpace) -> int:
    """Side of the maps that leave the stem."""
    return stem_blocks(space.settings, space.settings.width[-1:] * 2, residual=False)[-1].out_size
