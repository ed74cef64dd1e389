"""Baseline searches, written from descriptions: architectures in Python loops, and pymoo with objects.

`count_macs` and `encode` compute for one architecture at a time the same as `SearchSpace.costs` and
`SearchSpace.features` compute from tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.mutation import Mutation
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.sampling import Sampling
from pymoo.core.variable import Choice
from pymoo.operators.crossover.ux import UniformCrossover
from pymoo.operators.mutation.rm import ChoiceRandomMutation

from proard.search import Archive
from proard.search.evaluations import Evaluations
from proard.space import Arch, SearchSpace
from proard.space.blocks import make_divisible

PredictFeatures = Callable[[np.ndarray], np.ndarray]  # one-hot (n, columns) -> clean and robust accuracy (n, 2)


def count_macs(space: SearchSpace, arch: Arch) -> int:
    """Multiply-accumulates of one image, layer by layer."""
    s, widths = space.settings, list(arch.width)
    size = -(-s.image_size // s.stem.stride)
    channels = make_divisible(s.stem.channels * widths[1 if space.deep_stem else 0], s.channel_multiple)
    if space.deep_stem:
        middle = make_divisible(s.stem.channels // 2 * widths[0], s.channel_multiple)
        macs = s.image_channels * middle * 9 * size**2 + middle * channels * 9 * size**2
        if arch.depth[0] == s.depth[-1]:
            macs += middle * middle * 9 * size**2
        extra, widths = arch.depth[1:], widths[2:]
    else:
        macs = s.image_channels * channels * 9 * size**2
        extra, widths = arch.depth, widths[1:]
    slot = 0
    for unit, more, width, slots in zip(s.units, extra, widths, space.slots, strict=True):
        out = make_divisible(unit.channels * width, s.channel_multiple)
        for block in range(unit.blocks + more):
            middle = make_divisible(out * arch.expand[slot + block], s.channel_multiple)
            before, stride = size, unit.stride if block == 0 else 1
            size = -(-size // stride)
            if s.block == "bottleneck":
                macs += channels * middle * before**2 + middle * middle * 9 * size**2 + middle * out * size**2
            else:
                macs += channels * middle * 9 * size**2 + middle * out * 9 * size**2
            macs += channels * out * size**2 if block == 0 else 0
            channels = out
        slot += slots
    return macs + channels * s.classes


def encode(space: SearchSpace, arch: Arch) -> list[float]:
    """One-hot features, gene by gene; zeros for blocks that depth leaves out."""
    code: list[float] = []
    choices = [options for genes in space.options.values() for options in genes]
    for options, value in zip(choices, [*arch.depth, *arch.width, *arch.expand], strict=True):
        code += [1.0 if option == value and not (value == 0 and 0 not in options) else 0.0 for option in options]
    return code


class LoopProblem(Problem):
    """Objectives from Python loops over architectures; one predictor call per architecture, or per population."""

    def __init__(self, space: SearchSpace, predict: PredictFeatures, *, one_at_a_time: bool) -> None:
        options = [choices for genes in space.options.values() for choices in genes]
        super().__init__(vars={f"gene{i}": Choice(options=list(range(len(o)))) for i, o in enumerate(options)}, n_obj=3)
        self.space, self.predict, self.one_at_a_time = space, predict, one_at_a_time

    def _evaluate(self, x: np.ndarray, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Pymoo's hook."""
        macs, features = [], []
        for genotype in x:
            arch = self.space.arch([int(gene) for gene in genotype])
            macs.append(count_macs(self.space, arch))
            features.append(encode(self.space, arch))
        calls = [[row] for row in features] if self.one_at_a_time else [features]
        out["F"] = np.column_stack([-np.concatenate([self.predict(np.asarray(rows)) for rows in calls]), macs])


class ChoiceSampling(Sampling):
    """Every variable drawn from its options."""

    def _do(self, problem: Problem, n_samples: int, *args: Any, random_state: Any, **kwargs: Any) -> np.ndarray:
        """Pymoo's hook."""
        columns = [variable.sample(n_samples, random_state=random_state) for variable in problem.vars.values()]
        return np.column_stack(columns).astype(object)


def loop_nsga2(
    space: SearchSpace, predict: PredictFeatures, *, one_at_a_time: bool, population: int, generations: int, seed: int
) -> np.ndarray:
    """The released search's operators on `Choice` variables, history kept; objectives of the last population (n, 3)."""
    operators = {"crossover": UniformCrossover(prob=1.0), "mutation": ChoiceRandomMutation(prob=1.0, prob_var=0.1)}
    algorithm = NSGA2(pop_size=population, sampling=ChoiceSampling(), **operators, save_history=True)
    problem = LoopProblem(space, predict, one_at_a_time=one_at_a_time)
    return _run(algorithm, problem, generations=generations, seed=seed).pop.get("F")


def object_nsga2(evaluations: Evaluations, *, population: int, generations: int, seed: int) -> Archive:
    """`proard.search.nsga2` in pymoo's own terms: integer genes and whole populations, but an object per arch."""
    algorithm = NSGA2(
        pop_size=population,
        sampling=evaluations.draw(population, np.random.default_rng(seed)),
        crossover=UniformCrossover(),
        mutation=ChoiceMutation(evaluations.choices),
        eliminate_duplicates=FreshOnly(evaluations),
    )
    _run(algorithm, ArrayProblem(evaluations), generations=generations, seed=seed)
    return evaluations.archive()


class ArrayProblem(Problem):
    """All objectives of a whole population per call."""

    def __init__(self, evaluations: Evaluations) -> None:
        super().__init__(
            n_var=len(evaluations.choices),
            n_obj=evaluations.num_objectives,
            xl=0,
            xu=evaluations.choices - 1,
            vtype=int,
        )
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


def _run(algorithm: NSGA2, problem: Problem, *, generations: int, seed: int) -> NSGA2:
    """Run all generations."""
    algorithm.setup(problem, termination=("n_gen", generations), seed=seed, verbose=False)
    while algorithm.has_next():
        algorithm.next()
    return algorithm
