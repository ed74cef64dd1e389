"""NSGA-II over genotypes: pymoo's algorithm on arrays, and operators that treat a gene as a choice, not as a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.evaluator import Evaluator
from pymoo.core.problem import Problem
from pymoo.util.misc import random_permutations
from pymoo.util.randomized_argsort import randomized_argsort

from proard.search.evaluations import Archive, Canonical, Cost, Evaluations, Predict

CROSSOVER = 0.9  # share of couples whose genes are mixed, pymoo's default
MATINGS = 100  # largest number of rounds of mating for one generation, pymoo's default


def nsga2(
    predict: Predict,
    cost: Cost,
    choices: Sequence[int],
    canonical: Canonical,
    *,
    population: int,
    generations: int,
    max_cost: Sequence[float] | None = None,
    seed: int = 0,
) -> Archive:
    """Search for archs that are accurate, robust and cheap.

    Parameters
    ----------
    predict : callable
        Genotypes of shape (n, genes) to predicted clean and robust accuracy of shape (n, 2).
    cost : callable
        Genotypes to costs of shape (n, costs), each an objective. A limited cost must not decrease when a gene
        increases.
    choices : sequence of int
        Number of choices of every gene.
    canonical : callable
        Genotypes to canonical genotypes: equal for equal archs.
    population, generations : int
        Archs per generation, and number of generations, the random first one included.
    max_cost : sequence of float, optional
        A limit of each cost, infinity for none, kept by every arch that is evaluated.
    seed : int
        Equal seeds give equal archives.

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
    Parents keep the genes of blocks that depth leaves out, so that a block added by mutation has inherited
    choices; duplicates are found by canonical genotypes. Unlike in pymoo's default, an arch is never evaluated twice,
    even after it has left the population.

    pymoo keeps an object per arch; here a population is three arrays. Draws, operators and order are those of pymoo's
    tournament (dominance, then crowding), uniform crossover and survival: the archive is the same, arch by arch.

    References
    ----------
    Deb et al., A fast and elitist multiobjective genetic algorithm: NSGA-II, IEEE TEC 6(2), 2002.
    """
    return evolve(
        Evaluations(predict, cost, choices, canonical, max_cost=max_cost),
        population=population,
        generations=generations,
        seed=seed,
    )[0].archive()


@dataclass
class Members:
    """A population.

    Attributes
    ----------
    genotypes : ndarray of shape (n, genes)
    objectives : ndarray of shape (n, 2 + costs)
        As of `Archive`; empty before the evaluation.
    crowding : ndarray of shape (n,)
        Crowding distance within the own front; empty before the first selection.
    """

    genotypes: np.ndarray
    objectives: np.ndarray
    crowding: np.ndarray

    @classmethod
    def new(cls, genotypes: np.ndarray) -> Members:
        """Archs that are not evaluated yet."""
        return cls(genotypes, np.zeros((0, 0)), np.zeros(0))

    def __len__(self) -> int:
        """Archs."""
        return len(self.genotypes)

    def set(self, *args: Any) -> None:
        """Ignore the number of the generation, with which pymoo labels what it evaluates."""


def evolve(evaluations: Evaluations, *, population: int, generations: int, seed: int) -> tuple[Evaluations, Members]:
    """Run NSGA-II; return all evaluations and the last population."""
    first = evaluations.draw(population, np.random.default_rng(seed))
    algorithm = ArrayNSGA2(evaluations, first, pop_size=population)
    problem = Problem(n_var=first.shape[1], n_obj=evaluations.num_objectives)
    algorithm.setup(problem, termination=("n_gen", generations), seed=seed, verbose=False)
    while algorithm.has_next():
        algorithm.next()
    return evaluations, algorithm.pop


class PopulationEvaluator(Evaluator):
    """Evaluates a whole population per call."""

    def __init__(self, evaluations: Evaluations) -> None:
        super().__init__()
        self.evaluations = evaluations

    def eval(self, problem: Problem, pop: Members, **kwargs: Any) -> Members:
        """Pymoo's hook."""
        pop.objectives = self.evaluations.evaluate(pop.genotypes)
        self.n_eval += len(pop)
        return pop


class ArrayNSGA2(NSGA2):
    """pymoo's NSGA-II with `Members` for populations: its loop, sorting and crowding, and the same random draws."""

    def __init__(self, evaluations: Evaluations, first: np.ndarray, **kwargs: Any) -> None:
        super().__init__(evaluator=PopulationEvaluator(evaluations), **kwargs)
        self.evaluations, self.first = evaluations, first

    def _initialize_infill(self) -> Members:
        """Pymoo's hook: the first generation."""
        return Members.new(self.first)

    def _initialize_advance(self, infills: Members, **kwargs: Any) -> None:
        """Pymoo's hook: rank the first generation."""
        self.pop = self._survivors(infills, len(infills))

    def _infill(self) -> Members | None:
        """Pymoo's hook: archs that no generation has evaluated and that the cost limits allow."""
        found = self.first[:0]
        for _ in range(MATINGS):
            children = self._children(self.n_offsprings - len(found))
            children = children[self.evaluations.fresh(children, besides=self.evaluations.keys(found))]
            found = np.concatenate([found, children])[: self.n_offsprings]
            if len(found) == self.n_offsprings:
                break
        if not len(found):
            self.termination.force_termination = True
            return None
        return Members.new(found)

    def _advance(self, infills: Members | None = None, **kwargs: Any) -> None:
        """Pymoo's hook: the best of parents and offspring stay."""
        if infills is None:
            return
        parents = self.pop
        merged = Members.new(np.concatenate([parents.genotypes, infills.genotypes]))
        merged.objectives = np.concatenate([parents.objectives, infills.objectives])
        self.pop = self._survivors(merged, self.pop_size)

    def _set_optimum(self) -> None:
        """Pymoo's hook: nothing to do, the archive holds the front."""
        self.opt = None

    def _survivors(self, members: Members, number: int) -> Members:
        """Whole fronts in order, then the least crowded members of the first front that does not fit."""
        number = min(number, len(members))
        kept, crowding = np.zeros(0, dtype=np.int64), np.empty(len(members))
        for front in self.survival.nds.do(members.objectives, n_stop_if_ranked=number):
            surplus = max(len(kept) + len(front) - number, 0)
            crowding[front] = self.survival.crowding_func.do(members.objectives[front], n_remove=surplus)
            if surplus:
                order = randomized_argsort(
                    crowding[front], order="descending", method="numpy", random_state=self.random_state
                )
                front = front[order[:-surplus]]
            kept = np.concatenate([kept, front])
        return Members(members.genotypes[kept], members.objectives[kept], crowding[kept])

    def _children(self, count: int) -> np.ndarray:
        """At least `count` genotypes: binary tournaments, uniform crossover, mutation; of shape (even, genes)."""
        rng, couples = self.random_state, math.ceil(count / 2)
        parents = self.pop.genotypes[self._tournaments(2 * couples).reshape(couples, 2)]  # (couples, 2, genes)
        mixed = rng.random(couples) < CROSSOVER
        if mixed.any():
            swapped = (rng.random((couples, parents.shape[2])) < 0.5) & mixed[:, None]
            parents = np.where(swapped[:, None], parents[:, ::-1], parents)
        children = parents.swapaxes(0, 1).reshape(2 * couples, -1)
        children = mutate(children, self.evaluations.choices, rng)
        rng.random(len(children))  # pymoo draws here whether to mutate; its probability is 1
        return children

    def _tournaments(self, number: int) -> np.ndarray:
        """Winners of binary tournaments, as rows (number,): by dominance, else by crowding distance, else at random."""
        pop, rng = self.pop, self.random_state
        draws = random_permutations(math.ceil(2 * number / len(pop)), len(pop), random_state=rng)
        draws = draws[: 2 * number].reshape(number, 2)
        first, second = pop.objectives[draws[:, 0]], pop.objectives[draws[:, 1]]
        better, worse = (first < second).any(axis=1), (first > second).any(axis=1)
        less_crowded, more_crowded = (compare(*pop.crowding[draws.T]) for compare in (np.greater, np.less))
        undecided = better == worse
        first_wins = np.where(undecided, less_crowded, better)
        tied = np.flatnonzero(undecided & ~less_crowded & ~more_crowded)
        first_wins[tied] = rng.integers(0, 2, len(tied)) == 0
        return np.where(first_wins, draws[:, 0], draws[:, 1])


def mutate(genotypes: np.ndarray, choices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Set each gene, with probability 1 / genes, to another of its choices, all equally likely."""
    changed = rng.random(genotypes.shape) < 1 / genotypes.shape[1]
    shift = 1 + np.floor(rng.random(genotypes.shape) * np.maximum(choices - 1, 1)).astype(np.int64)
    return np.where(changed, (genotypes + shift) % choices, genotypes)
