"""A generation of NSGA-II, from one architecture at a time to this package's, and the quality of its fronts.

S0 and S1 loop over architectures in Python, S2 has tables and gathers but pymoo's object per architecture, S3 and S4
are the package. Costs, encodings, predictions and archives must agree first. Then a space of about 10^6 architectures
is searched with a synthetic predictor, and every hypervolume is given relative to the exact front's.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from common import Call, Options, Row, Timing, given, ladder, machine, require_close, show, write_rows
from plain_search import count_macs, encode, loop_nsga2, object_nsga2
from torch import nn

from proard import search
from proard.config import PRESETS
from proard.predictor import Predictor
from proard.search.evaluations import Evaluations
from proard.search.nsga2 import evolve
from proard.space import SearchSpace

LEVERS = {
    "S0": "one architecture at a time",
    "S1": "released form: one predictor call per population",
    "S2": "integer genes, cost table, gathered encoding; pymoo's objects",
    "S3": "populations as arrays, the same draws",
    "S4": "predictor as matrix products: the package",
}
TOLERANCES = {"macs": 0.0, "encodings": 0.0, "predictions": 1e-5, "archives": 0.0}
BUDGETS = ((50, 20), (100, 100), (200, 50), (400, 50), (400, 100))  # population, generations
COLUMNS = {"ratio_total": "over S0:.1f", "ratio_released": "over S1:.1f", "ratio_previous": "over previous:.2f"}
COLUMNS |= {"ms_per_generation": "ms/generation:.2f", "archs_per_second": "archs/s:.0f"}
FOUND = ("last_population", "archive", "random")
QUALITY = {name: f"{name}:.4f" for name in (*FOUND, "archive_lowest")} | {"evaluations": "evaluations:d"}
Predict = Callable[[np.ndarray], np.ndarray]  # features (n, columns) -> accuracies (n, 2)


@dataclass(frozen=True)
class Problem:
    """A space with a predictor as its library computes it, and in the package's form if it has one."""

    space: SearchSpace
    plain: Predict
    fast: Predict | None

    def cost(self, genotypes: np.ndarray) -> np.ndarray:
        """MACs, of shape (n, 1)."""
        return self.space.costs(genotypes)["macs"][:, None]

    def evaluations(self, *, fast: bool = True, max_cost: float | None = None) -> Evaluations:
        """Objectives of genotypes, with nothing evaluated yet."""
        model, space = self.fast if fast and self.fast is not None else self.plain, self.space
        given = (lambda genotypes: model(space.features(genotypes)), self.cost, space.choices, space.canonical)
        return Evaluations(*given, max_cost=None if max_cost is None else [max_cost])


def make_problem(space: SearchSpace, predictor: str, *, seed: int) -> Problem:
    """A predictor with fitted (`package`: scikit-learn's bagged networks) or random (`published`: 6 x 400) weights."""
    if predictor == "published":
        torch.manual_seed(seed)
        widths = [sum(space.choices)] + [400] * 6
        layers = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
        net = nn.Sequential(*layers, nn.Linear(400, 2, bias=False))
        plain = torch.no_grad()(lambda features: net(torch.from_numpy(features).float()).double().numpy())
        return Problem(space, plain, None)
    genotypes = space.sample(300, np.random.default_rng(seed))
    fitted = Predictor("mlp", space, space.features(genotypes), synthetic(space, seed)(genotypes), seed=seed)
    return Problem(space, fitted.pipeline.predict, fitted.dense)


def synthetic(space: SearchSpace, seed: int) -> Predict:
    """Accuracies of genotypes that rise with most choices, with an interaction of every pair of genes."""
    rng = np.random.default_rng(seed)
    genes = len(space.choices)
    linear = rng.normal(1.0, 1.0, (2, genes)) / genes**0.5
    pairs = rng.normal(0.0, 1.0, (2, genes, genes)) / genes
    scale = np.maximum(np.asarray(space.choices) - 1, 1)

    def predict(genotypes: np.ndarray) -> np.ndarray:
        levels = space.canonical(genotypes) / scale
        scores = [levels @ w + ((levels @ q) * levels).sum(axis=1) for w, q in zip(linear, pairs, strict=True)]
        return np.array([0.85, 0.5]) + np.array([0.08, 0.06]) * np.tanh(np.stack(scores, axis=1) - 1)

    return predict


def equality(problem: Problem, *, count: int = 200, seed: int = 0, again: int = 0) -> dict[str, float]:
    """Largest differences between loops and tables; for archives the number of different rows.

    The seed of the package's search is `again` above that of pymoo's.
    """
    space = problem.space
    genotypes = space.sample(count, np.random.default_rng(seed))
    archs = [space.arch(genotype) for genotype in genotypes]
    codes = np.asarray([encode(space, arch) for arch in archs])
    one_by_one = np.concatenate([problem.plain(code[None]) for code in codes])
    features, fast, differing = space.features(genotypes), problem.fast or problem.plain, 0
    budget = {"population": 30, "generations": 6}
    for max_cost in (None, float(np.median(problem.cost(genotypes)))):
        objects = object_nsga2(problem.evaluations(max_cost=max_cost), **budget, seed=seed)
        arrays = evolve(problem.evaluations(max_cost=max_cost), **budget, seed=seed + again)[0].archive()
        rows = min(len(objects), len(arrays))
        differing += abs(len(objects) - len(arrays))
        differing += int((objects.genotypes[:rows] != arrays.genotypes[:rows]).any(axis=1).sum())
    pairs = {"macs": (np.asarray([count_macs(space, arch) for arch in archs]), problem.cost(genotypes)[:, 0])}
    pairs |= {"encodings": (codes, features), "predictions": (one_by_one, fast(features))}
    found = {name: float(np.abs(first - second).max()) for name, (first, second) in pairs.items()}
    return found | {"archives": float(differing)}


def require_equal(differences: dict[str, float]) -> None:
    """Exit if a difference exceeds its tolerance."""
    require_close(differences, TOLERANCES, "loops and tables differ")


def timed_calls(problem: Problem, *, population: int, generations: int) -> dict[str, Call]:
    """Per row, a call that runs one search, seeded by the number of the round."""
    budget = {"population": population, "generations": generations}

    def loop(one_at_a_time: bool, number: int) -> object:
        how = {"one_at_a_time": one_at_a_time, "seed": number + 1, **budget}
        return loop_nsga2(problem.space, problem.plain, **how)

    calls = {
        "S0": partial(loop, True),
        "S1": partial(loop, False),
        "S2": lambda number: object_nsga2(problem.evaluations(fast=False), seed=number + 1, **budget),
        "S3": lambda number: evolve(problem.evaluations(fast=False), seed=number + 1, **budget),
        "S4": lambda number: evolve(problem.evaluations(), seed=number + 1, **budget),
    }
    return {row: call for row, call in calls.items() if row != "S4" or problem.fast is not None}


def million() -> SearchSpace:
    """839,808 archs: the published space cut to three units of 2 or 3 blocks and two expand ratios."""
    published = PRESETS["resnet_cifar"]
    units = tuple(unit.model_copy(update={"blocks": 2}) for unit in published.units[:3])
    changes = {"name": "million", "units": units, "depth": (0, 1), "expand": (0.2, 0.35)}
    return SearchSpace(published.model_copy(update=changes))


def quality(space: SearchSpace, budgets: Sequence[tuple[int, int]], *, seeds: int) -> list[Row]:
    """Hypervolume divided by the exact one: last population, archive, random search; means over seeds, by budget."""
    problems, wholes, seconds = [], [], 0.0
    for seed in range(seeds):
        costs = (lambda genotypes: space.costs(genotypes)["macs"][:, None], space.choices, space.canonical)
        problems.append((synthetic(space, seed), *costs))
        started = time.perf_counter()
        wholes.append(search.exhaustive(*problems[-1], up_to=space.size))
        seconds += (time.perf_counter() - started) / seeds
    rows = []
    for population, generations in budgets:
        shares = []
        for seed, (problem, whole) in enumerate(zip(problems, wholes, strict=True)):
            budget = {"population": population, "generations": generations, "seed": seed}
            evaluations, last = evolve(Evaluations(*problem, max_cost=None), **budget)
            archive = evaluations.archive()
            per_generation = np.bincount(archive.generations)[1:].tolist()
            random = search.random(*problem, generations=per_generation, seed=seed)
            exact = search.hypervolume(whole.front.objectives, whole.scale)
            found = (last.objectives, archive.objectives, random.objectives)
            fronts = [objectives[search.non_dominated(objectives)] for objectives in found]
            shares.append([search.hypervolume(front, whole.scale) / exact for front in fronts])
        row = {"bench": "search_quality", "population": population, "generations": generations}
        row |= {"evaluations": population * generations, "archs": space.size, "seeds": seeds}
        row |= dict(zip(FOUND, np.round(np.mean(shares, axis=0), 5).tolist(), strict=True))
        row |= {"archive_lowest": round(float(np.min(shares, axis=0)[1]), 5), "exhaustive_seconds": round(seconds, 3)}
        rows.append(row | {"exhaustive_archs_per_second": round(space.size / seconds)})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Check, time, print, and write one JSON line per row with `--json`."""
    args = parse(argv)
    space, rows, facts = SearchSpace(PRESETS[args.space]), [], machine()
    for predictor in args.predictors:
        problem = make_problem(space, predictor, seed=args.seed)
        differences = equality(problem, seed=args.seed)
        require_equal(differences)
        print(f"{predictor}: costs, encodings, archives equal; predictions to {differences['predictions']:.1e}")
        run = {"space": args.space, "predictor": predictor, **given(args, "generations", "seed")}
        run |= {"differences": differences, "machine": facts}
        for population in args.populations:
            calls = timed_calls(problem, population=population, generations=args.generations)
            own = partial(own_facts, population=population, generations=args.generations)
            title = f"{args.space}, {predictor} predictor, population {population}, {args.generations} generations"
            how = {"rounds": args.rounds, "plain": "S1", "second": "ratio_released", "baseline": "one arch at a time"}
            rows += ladder("search", calls, LEVERS, COLUMNS, title=title, facts=run, own=own, **how)
    if args.seeds:
        shares = [row | {"machine": facts} for row in quality(million(), args.budgets, seeds=args.seeds)]
        first = shares[0]
        title = f"hypervolume over the exact front's, {first['archs']:,} archs, {args.seeds} seeds; all archs in "
        title += f"{first['exhaustive_seconds']:.2f} s, {first['exhaustive_archs_per_second']:,} archs/s"
        show(title, [row | {"row": f"{row['population']} x {row['generations']}"} for row in shares], QUALITY)
        rows += shares
    write_rows(args.json, rows)


def own_facts(row: str, timing: Timing, *, population: int, generations: int) -> Row:
    """Facts of one row."""
    seconds, used = timing.seconds / generations, timing.cpu_seconds / generations
    times = {"ms_per_generation": round(1e3 * seconds, 4), "cpu_ms_per_generation": round(1e3 * used, 4)}
    return times | {"archs_per_second": round(population / seconds, 1), "population": population}


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    predictors = ["package", "published"]
    options = Options(
        __doc__,
        "search",
        quick={"populations": [20], "generations": 2, "rounds": 2, "seeds": 1},
        threads=(1, "of torch"),
        zero=["seeds"],
        space=("resnet_cifar", "search space", sorted(PRESETS)),
        predictors=(predictors, "both by default", predictors),
        populations=([100, 400], "at least 4 archs each"),
        generations=(10, "of a timed search, the random first one included"),
        seeds=(3, "of the comparison with exact enumeration; 0 leaves it out"),
    )
    args = options.read(argv)
    args.budgets = BUDGETS[:1] if args.quick else BUDGETS
    if min(args.populations) < 4:
        options.error(f"--populations is {min(args.populations)}; expected at least 4")
    return args


if __name__ == "__main__":
    main()
