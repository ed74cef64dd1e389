"""NSGA-II over genotypes, with operators that treat a gene as a choice and not as a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.mutation import Mutation
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.operators.crossover.ux import UniformCrossover

from proard.search.evaluations import Archive, Canonical, Cost, Evaluations, Predict


def nsga2(
    predict: Predict,
    cost: Cost,
    choices: Sequence[int],
    canonical: Canonical,
    *,
    population: int,
    generations: int,
    max_cost: float | None = None,
    seed: int = 0,
) -> Archive:
    """Search for archs that are accurate, robust and cheap.

    Parameters
    ----------
    predict : callable
        Genotypes of shape (n, genes) to predicted clean and robust accuracy of shape (n, 2).
    cost : callable
        Genotypes to cost of shape (n,); cost must not fall where a gene rises.
    choices : sequence of int
        Number of choices of every gene.
    canonical : callable
        Genotypes to canonical genotypes: equal for equal archs.
    population, generations : int
        Archs per generation, and number of generations, the random first one included.
    max_cost : float, optional
        Constraint cost <= max_cost, kept by every arch that is evaluated.
    seed : int
        Seed; one seed, one archive.

    Returns
    -------
    Archive
        Everything evaluated, each arch once. Fewer than population * generations only where hardly any new
        arch is left.

    Raises
    ------
    UserError
        No arch is within `max_cost`.

    Notes
    -----
    Parents keep the genes of blocks that depth leaves out, so that a block switched on by mutation brings an evolved
    choice along; canonical genotypes decide what is a duplicate. An arch is never evaluated twice, also not after it
    has left the population, unlike in pymoo's default.

    References
    ----------
    Deb et al., A fast and elitist multiobjective genetic algorithm: NSGA-II, IEEE TEC 6(2), 2002.
    """
    evaluations = Evaluations(predict, cost, choices, canonical, max_cost=max_cost)
    first = evaluations.draw(population, np.random.default_rng(seed))
    algorithm = NSGA2(
        pop_size=population,
        sampling=first,
        crossover=UniformCrossover(),
        mutation=ChoiceMutation(choices),
        eliminate_duplicates=FreshOnly(evaluations),
    )
    algorithm.setup(ArchProblem(evaluations), termination=("n_gen", generations), seed=seed, verbose=False)
    while algorithm.has_next():
        algorithm.next()
    return evaluations.archive()


class ArchProblem(Problem):
    """Three objectives of a whole population per call."""

    def __init__(self, evaluations: Evaluations) -> None:
        super().__init__(n_var=len(evaluations.choices), n_obj=3, xl=0, xu=evaluations.choices - 1, vtype=int)
        self.evaluations = evaluations

    def _evaluate(self, x: np.ndarray, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Pymoo's hook."""
        out["F"] = self.evaluations.evaluate(x)


class ChoiceMutation(Mutation):
    """Set each gene, with probability 1 / genes, to another of its choices, all equally likely."""

    def __init__(self, choices: Sequence[int]) -> None:
        super().__init__()
        self.choices = np.asarray(choices)

    def _do(self, problem: Problem, X: np.ndarray, *args: Any, random_state: Any, **kwargs: Any) -> np.ndarray:
        """Pymoo's hook."""
        changed = random_state.random(X.shape) < 1 / X.shape[1]
        others = np.maximum(self.choices - 1, 1)
        shift = 1 + np.floor(random_state.random(X.shape) * others).astype(np.int64)
        return np.where(changed, (X + shift) % self.choices, X)


class FreshOnly(DuplicateElimination):
    """Keep offspring that no generation has evaluated and that the cost limit allows."""

    def __init__(self, evaluations: Evaluations) -> None:
        super().__init__()
        self.evaluations = evaluations

    def do(self, pop: Population, *args: Population, **kwargs: Any) -> Population:
        """Pymoo's hook; `args` are the population and the offspring accepted so far."""
        if not len(pop):
            return pop
        accepted = [key for other in args if len(other) for key in self.evaluations.keys(other.get("X"))]
        return pop[self.evaluations.fresh(pop.get("X"), besides=accepted)]
