"""Archs to measure: a sample stratified over MACs, the enumeration of a small space, identity columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from proard.config import UserError
from proard.space.search_space import SearchSpace

POOL = 100_000  # draws of each kind; independent of num_archs, so that a larger sample contains a smaller one
POOL_OF_SPREAD = 500  # draws of each kind; a few milliseconds at every start of the workflow
BLOCK = 32_768  # genotypes per enumerated block


def stratified_sample(space: SearchSpace, num_archs: int, *, strata: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw different archs, equally many from each stratum of log-MACs.

    The range from the smallest to the largest subnet is divided into `strata` equal parts of log-MACs. The smallest,
    the largest and the uniform-scaling diagonal are always in the sample. Every further arch is taken from the stratum
    with the fewest archs so far that still has candidates. In a stratum, uniform draws come first. Draws with a common
    scale per dim follow, because uniform draws concentrate in the middle and rarely reach the ends.

    Parameters
    ----------
    num_archs : int
        Number of archs. A larger number at the same seed contains the smaller sample (up to 5,000 archs).
    strata : int
        Number of strata.
    seed : int
        Seed of draws and of the order.

    Returns
    -------
    genotypes : ndarray of shape (num_archs, genes), int64
        Canonical, in random order, so that any range of rows is a random sample.
    strata : ndarray of shape (num_archs,), int64
        Stratum of each arch, 0 for the cheapest.

    Raises
    ------
    UserError
        The space has fewer archs than `num_archs`, or `num_archs` is below the number of archs that are always
        included.
    """
    anchors = np.asarray([space.genotype(arch) for arch in anchor_archs(space)])
    if num_archs < len(anchors):
        raise UserError(
            f"sample_archs.num_archs is {num_archs}; expected at least {len(anchors)}: the smallest, the largest and "
            f"the diagonal of space {space.settings.name} are always measured"
        )
    if num_archs > space.size:
        raise UserError(
            f"sample_archs.num_archs is {num_archs}; space {space.settings.name} has only {space.size} archs; "
            "lower it, or add choices to the space"
        )
    rng = np.random.default_rng(seed)
    pool = _first_occurrences(np.concatenate([anchors, _draw(space, max(POOL, 20 * num_archs), rng)]))
    if len(pool) < num_archs:  # nearly the whole space is needed
        everything = rng.permutation(enumerate_genotypes(space.choices, space.canonical))
        pool = _first_occurrences(np.concatenate([pool, everything]))
    stratum = _strata(space, pool, strata)
    kept = _level_strata(stratum, num_archs, strata, given=len(anchors))
    kept = np.random.default_rng([seed, num_archs]).permutation(kept)
    return pool[kept], stratum[kept]


def shard_names(total: int, size: int) -> list[str]:
    """Names of the ranges of rows that one job measures, from first to last row: 0000-0049, 0050-0099, ..."""
    return [f"{first:04d}-{min(first + size, total) - 1:04d}" for first in range(0, total, size)]


def anchor_archs(space: SearchSpace) -> list[Any]:
    """The smallest, the largest and the diagonal archs, without repetitions."""
    return list(dict.fromkeys([space.smallest, space.largest, *space.diagonal()]))


def enumerate_genotypes(choices: Sequence[int], canonical: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """All canonical genotypes, of shape (size, genes), in lexicographic order."""
    return np.concatenate(list(genotype_blocks(choices, canonical)))


def genotype_blocks(
    choices: Sequence[int],
    canonical: Callable[[np.ndarray], np.ndarray],
    *,
    keep: Callable[[np.ndarray], np.ndarray] | None = None,
    rows: int = BLOCK,
) -> Iterator[np.ndarray]:
    """Yield all canonical genotypes in lexicographic order, at most `rows` at a time.

    Parameters
    ----------
    choices : sequence of int
        Number of choices of every gene.
    canonical : callable
        Maps genotypes of shape (n, genes) to canonical ones.
    keep : callable, optional
        Maps genotypes to bool of shape (n,). If it refuses a genotype, it must also refuse all with a larger choice in
        any gene, as a cost limit does: whole branches are then skipped.
    rows : int
        Largest block; memory depends on it and not on the size of the space.

    Notes
    -----
    Genes are enumerated from left to right, with later genes at 0. After each gene, genotypes that are not canonical
    are removed, so that few more are built than yielded. Genes that switch others off (depth) must therefore come
    before those (expand).
    """
    branches = [(0, np.zeros((1, len(choices)), dtype=np.int64))]
    if keep is not None and not keep(branches[0][1])[0]:
        return
    while branches:
        gene, genotypes = branches.pop()
        while gene < len(choices) and (len(genotypes) == 1 or len(genotypes) * choices[gene] <= rows):
            genotypes = _open_gene(genotypes, gene, choices[gene], canonical)
            if keep is not None:
                genotypes = genotypes[keep(genotypes)]
            gene += 1
        if gene == len(choices):
            yield genotypes
        else:
            middle = len(genotypes) // 2
            branches += [(gene, genotypes[middle:]), (gene, genotypes[:middle])]


def _open_gene(
    genotypes: np.ndarray, gene: int, count: int, canonical: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Every genotype with each choice of one gene, if the result is canonical."""
    if count == 1:
        return genotypes
    opened = np.repeat(genotypes, count, axis=0)
    opened[:, gene] = np.tile(np.arange(count), len(genotypes))
    return opened[(canonical(opened) == opened).all(axis=1)]


def spread_archs(space: SearchSpace, number: int, *, seed: int) -> np.ndarray:
    """One genotype from each of `number` equal parts of the range of log-MACs, cheapest first, without the two ends.

    Raises
    ------
    UserError
        A part of the range has no arch.
    """
    ends = [space.smallest, space.largest]
    drawn = _first_occurrences(_draw(space, POOL_OF_SPREAD, np.random.default_rng(seed)))
    inner = drawn[[space.arch(genotype) not in ends for genotype in drawn]]
    stratum = _strata(space, inner, number)
    empty = set(range(number)) - set(stratum.tolist())
    if empty:
        raise UserError(
            f"archs is {number} for twins; space {space.settings.name} has no arch in {len(empty)} of that many "
            "equal parts of its range of MACs; lower archs"
        )
    return np.stack([inner[np.flatnonzero(stratum == index)[0]] for index in range(number)])


def identity_columns(space: SearchSpace, genotypes: np.ndarray) -> dict[str, list[Any]]:
    """Columns that identify archs in every table: `arch_id`, `genotype`, `arch`, `macs`, `params`."""
    genotypes = space.canonical(genotypes)
    archs = [space.arch(genotype) for genotype in genotypes]
    costs = space.costs(genotypes)
    return {
        "arch_id": [arch.arch_id for arch in archs],
        "genotype": genotypes.tolist(),
        "arch": [arch.to_json() for arch in archs],
        "macs": costs["macs"].tolist(),
        "params": costs["params"].tolist(),
    }


def footprint_columns(space: SearchSpace, genotypes: np.ndarray) -> dict[str, list[Any]]:
    """Columns of the other costs: `flash`, `sram`, and `latency`, which is None without a device."""
    costs = space.costs(space.canonical(genotypes))
    unknown = [None] * len(genotypes)
    return {name: costs[name].tolist() if name in costs else unknown for name in ("flash", "sram", "latency")}


def _draw(space: SearchSpace, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` uniform genotypes, then `count` genotypes with a common random scale per dim."""
    uniform = space.sample(count, rng)
    scales = [np.repeat(rng.random((count, 1)), part.stop - part.start, axis=1) for part in space.sections]
    scaled = rng.binomial(np.asarray(space.choices) - 1, np.concatenate(scales, axis=1))
    return np.concatenate([uniform, space.canonical(scaled)])


def _first_occurrences(genotypes: np.ndarray) -> np.ndarray:
    """Distinct rows in their order of first occurrence."""
    _, first = np.unique(genotypes, axis=0, return_index=True)
    return genotypes[np.sort(first)]


def _strata(space: SearchSpace, genotypes: np.ndarray, strata: int) -> np.ndarray:
    """Stratum of every genotype by its log-MACs."""
    ends = np.asarray([space.genotype(space.smallest), space.genotype(space.largest)])
    low, high = np.log(space.costs(ends)["macs"])
    position = (np.log(space.costs(genotypes)["macs"]) - low) / max(high - low, 1e-12)
    return np.clip((position * strata).astype(np.int64), 0, strata - 1)


def _level_strata(stratum: np.ndarray, num_archs: int, strata: int, *, given: int) -> np.ndarray:
    """Rows of the first `given` archs and of further ones, each from the stratum with the fewest that has any left."""
    members = [list(np.flatnonzero(stratum[given:] == index)[::-1] + given) for index in range(strata)]
    filled = np.bincount(stratum[:given], minlength=strata)
    kept = list(range(given))
    while len(kept) < num_archs:
        index = min((s for s in range(strata) if members[s]), key=lambda s: filled[s])
        kept.append(members[index].pop())
        filled[index] += 1
    return np.asarray(kept)
