"""Attentive sampling: subnets of one cost, of which the one that does best or worst on the batch is trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from proard.space import Arch, SearchSpace

POOL = 256  # draws, half uniform, half with one scale for all genes: uniform draws hardly reach the ends of the range


def at_one_cost(space: SearchSpace, among: Sequence[np.ndarray], count: int, rng: np.random.Generator) -> list[Arch]:
    """Different archs whose MACs lie next to a drawn target.

    Parameters
    ----------
    space : SearchSpace
        The space.
    among : sequence of ndarray
        Per gene, the open choice indices.
    count : int
        Number of archs; fewer come where the pool of draws holds fewer.
    rng : numpy.random.Generator
        Source of the target, uniform in log-MACs between the smallest and the largest open subnet, and of the draws.

    Returns
    -------
    list of Arch
        The nearest first.
    """
    ends = np.asarray([[options[0] for options in among], [options[-1] for options in among]])
    scales = rng.random(POOL // 2)
    scaled = [options[rng.binomial(len(options) - 1, scales)] for options in among]
    pool = [space.sample(POOL // 2, rng, among=list(among)), space.canonical(np.stack(scaled, axis=1))]
    genotypes = np.unique(np.concatenate([space.canonical(ends), *pool]), axis=0)
    low, high = np.log(space.costs(ends)["macs"])
    distance = np.abs(np.log(space.costs(genotypes)["macs"]) - rng.uniform(low, high))
    return [space.arch(genotypes[index]) for index in np.argsort(distance, kind="stable")[:count]]
