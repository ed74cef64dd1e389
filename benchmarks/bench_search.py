"""A generation of NSGA-II, from one architecture at a time to this package's, and how near searches come to exact.

Rows S0 and S1 (`plain_search.py`) loop over architectures in Python, S2 has tables and gathers but pymoo's object per
architecture, S3 and S4 are the package. Before anything is timed, costs, encodings and predictions of loops and tables
must agree, and S2 and S4 must find the same archive. Then a space of about 10^6 architectures is searched with a
synthetic predictor, and every hypervolume is given relative to the exact front's.

    python benchmarks/bench_search.py --help
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import NOISY, Timing, machine, require_positive, table, time_interleaved, write_rows
from plain_search import count_macs, encode, loop_nsga2, object_nsga2
from torch import nn

from proard import search
from proard.config import PRESETS
from proard.predictor import Predictor
from proard.search.evaluations import Evaluations
from proard.search.nsga2 import evolve
from proard.space import SearchSpace

RESULTS = Path(__file__).parent / "results" / "bench_search.json"
LEVERS = {
    "S0": "one architecture at a time",
    "S1": "released form: one predictor call per population",
    "S2": "integer genes, cost table, gathered encoding; pymoo's objects",
    "S3": "populations as arrays, the same draws",
    "S4": "predictor as matrix products: the package",
}
TOLERANCES = {"macs": 0.0, "encodings": 0.0, "predictions": 1e-5, "archives": 0.0}
BUDGETS = ((50, 20), (100, 100), (200, 50), (400, 50), (400, 100))  # population, generations


@dataclass(frozen=True)
class Problem:
    """A space with a predictor in its plain and in its fast form.

    Attributes
    ----------
    plain : callable
        Features of shape (n, columns) to accuracies (n, 2), as the predictor's library computes it.
    fast : callable
        The same in the package's form; None where there is no other.
    """

    space: SearchSpace
    plain: Callable[[np.ndarray], np.ndarray]
    fast: Callable[[np.ndarray], np.ndarray] | None

    def cost(self, genotypes: np.ndarray) -> np.ndarray:
        """MACs."""
        return self.space.costs(genotypes)["macs"]

    def evaluations(self, *, fast: bool = True, max_cost: float | None = None) -> Evaluations:
        """Objectives of genotypes, with nothing evaluated yet."""
        model = self.fast if fast and self.fast is not None else self.plain
        space = self.space
        return Evaluations(
            lambda genotypes: model(space.features(genotypes)),
            self.cost,
            space.choices,
            space.canonical,
            max_cost=max_cost,
        )


def make_problem(space: SearchSpace, predictor: str, *, seed: int) -> Problem:
    """A predictor with fitted (`package`: scikit-learn's bagged networks) or random (`published`: 6 x 400) weights."""
    if predictor == "published":
        torch.manual_seed(seed)
        widths = [sum(space.choices)] + [400] * 6
        layers = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
        net = nn.Sequential(*layers, nn.Linear(400, 2, bias=False))

        @torch.no_grad()
        def plain(features: np.ndarray) -> np.ndarray:
            return net(torch.from_numpy(features).float()).double().numpy()

        return Problem(space, plain, None)
    genotypes = space.sample(300, np.random.default_rng(seed))
    fitted = Predictor("mlp", space, space.features(genotypes), synthetic(space, seed)(genotypes), seed=seed)
    return Problem(space, fitted.pipeline.predict, fitted.dense)


def synthetic(space: SearchSpace, seed: int) -> Callable[[np.ndarray], np.ndarray]:
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


def equality(problem: Problem, *, count: int = 200, seed: int = 0) -> dict[str, float]:
    """Largest differences between loops and tables; for archives the number of rows where two searches differ."""
    space = problem.space
    genotypes = space.sample(count, np.random.default_rng(seed))
    archs = [space.arch(genotype) for genotype in genotypes]
    codes = np.asarray([encode(space, arch) for arch in archs])
    one_by_one = np.concatenate([problem.plain(code[None]) for code in codes])
    fast = problem.fast or problem.plain
    differing = 0
    limit = float(np.median(problem.cost(genotypes)))
    for max_cost in (None, limit):
        budget = {"population": 30, "generations": 6, "seed": seed}
        objects = object_nsga2(problem.evaluations(max_cost=max_cost), **budget)
        arrays = evolve(problem.evaluations(max_cost=max_cost), **budget)[0].archive()
        rows = min(len(objects), len(arrays))
        differing += abs(len(objects) - len(arrays))
        differing += int((objects.genotypes[:rows] != arrays.genotypes[:rows]).any(axis=1).sum())
    return {
        "macs": float(np.abs(np.asarray([count_macs(space, arch) for arch in archs]) - problem.cost(genotypes)).max()),
        "encodings": float(np.abs(codes - space.features(genotypes)).max()),
        "predictions": float(np.abs(one_by_one - fast(space.features(genotypes))).max()),
        "archives": float(differing),
    }


def require_equal(differences: dict[str, float]) -> None:
    """Stop where a difference exceeds its tolerance.

    Raises
    ------
    SystemExit
        The text names the quantities.
    """
    wrong = [f"{name}: {value:.2g}" for name, value in differences.items() if not value <= TOLERANCES[name]]
    if wrong:
        raise SystemExit(f"loops and tables differ, nothing is timed: {', '.join(wrong)}")


def timed_calls(problem: Problem, *, population: int, generations: int) -> dict[str, Callable[[int], None]]:
    """Per row, a call that runs one search, seeded by the number of the round."""
    budget = {"population": population, "generations": generations}

    def loop(one_at_a_time: bool) -> Callable[[int], None]:
        return lambda number: loop_nsga2(
            problem.space, problem.plain, one_at_a_time=one_at_a_time, seed=number + 1, **budget
        )

    calls = {
        "S0": loop(True),
        "S1": loop(False),
        "S2": lambda number: object_nsga2(problem.evaluations(fast=False), seed=number + 1, **budget),
        "S3": lambda number: evolve(problem.evaluations(fast=False), seed=number + 1, **budget),
    }
    if problem.fast is not None:
        calls["S4"] = lambda number: evolve(problem.evaluations(), seed=number + 1, **budget)
    return calls


def million() -> SearchSpace:
    """839,808 archs: the published space cut to three units of 2 or 3 blocks and two expand ratios."""
    published = PRESETS["resnet_cifar"]
    units = tuple(unit.model_copy(update={"blocks": 2}) for unit in published.units[:3])
    return SearchSpace(
        published.model_copy(update={"name": "million", "units": units, "depth": (0, 1), "expand": (0.2, 0.35)})
    )


def quality(space: SearchSpace, budgets: Sequence[tuple[int, int]], *, seeds: int) -> list[dict[str, Any]]:
    """Hypervolume over the exact one: last population, archive, random search; means over seeds, one row per budget."""
    problems, wholes, seconds = [], [], 0.0
    for seed in range(seeds):
        costs = (lambda genotypes: space.costs(genotypes)["macs"], space.choices, space.canonical)
        problems.append((synthetic(space, seed), *costs))
        started = time.perf_counter()
        wholes.append(search.exhaustive(*problems[-1], up_to=space.size))
        seconds += (time.perf_counter() - started) / seeds
    rows = []
    for population, generations in budgets:
        shares = []
        for seed, (problem, whole) in enumerate(zip(problems, wholes, strict=True)):
            evaluations, last = evolve(
                Evaluations(*problem, max_cost=None), population=population, generations=generations, seed=seed
            )
            archive = evaluations.archive()
            per_generation = np.bincount(archive.generations)[1:].tolist()
            random = search.random(*problem, generations=per_generation, seed=seed)
            exact = search.hypervolume(whole.front.objectives, whole.scale)
            shares.append(
                [
                    search.hypervolume(objectives[search.non_dominated(objectives)], whole.scale) / exact
                    for objectives in (last.objectives, archive.objectives, random.objectives)
                ]
            )
        mean = np.mean(shares, axis=0)
        rows.append(
            {
                "bench": "search_quality",
                "population": population,
                "generations": generations,
                "evaluations": population * generations,
                "archs": space.size,
                "seeds": seeds,
                **dict(zip(("last_population", "archive", "random"), np.round(mean, 5).tolist(), strict=True)),
                "archive_lowest": round(float(np.min(shares, axis=0)[1]), 5),
                "exhaustive_seconds": round(seconds, 3),
                "exhaustive_archs_per_second": round(space.size / seconds),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Check, time, print, and write one JSON line per row where asked."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    space, rows = SearchSpace(PRESETS[args.space]), []
    facts = machine()
    for predictor in args.predictors:
        problem = make_problem(space, predictor, seed=args.seed)
        differences = equality(problem, seed=args.seed)
        require_equal(differences)
        print(
            f"{predictor}: costs, encodings, archives equal; predictions to {differences['predictions']:.1e}",
            flush=True,
        )
        for population in args.populations:
            calls = timed_calls(problem, population=population, generations=args.generations)
            timings, spread = time_interleaved(calls, rounds=args.rounds, label="searches")
            run = {
                "space": args.space,
                "predictor": predictor,
                "population": population,
                "generations": args.generations,
                "rounds": args.rounds,
                "seed": args.seed,
                "baseline_spread": round(spread, 4),
                "noisy": spread > NOISY,
                "differences": differences,
                "machine": facts,
            }
            rows += [_json_row(row, timings, population, args.generations) | run for row in timings]
            print(_report(timings, run), flush=True)
    if args.seeds:
        shares = [row | {"machine": facts} for row in quality(million(), args.budgets, seeds=args.seeds)]
        rows += shares
        print(_quality_report(shares))
    if args.json:
        write_rows(args.json, rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", choices=sorted(PRESETS), default="resnet_cifar")
    parser.add_argument("--predictors", nargs="+", choices=["package", "published"], default=["package", "published"])
    parser.add_argument("--populations", nargs="+", type=int, default=[100, 400])
    parser.add_argument("--generations", type=int, default=10, help="of a timed search, the random first one included")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count; medians are over them")
    parser.add_argument(
        "--seeds", type=int, default=3, help="of the comparison with exact enumeration; 0 leaves it out"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of predictor and architectures")
    parser.add_argument("--json", nargs="?", const=str(RESULTS), metavar="FILE", help=f"default {RESULTS.name}")
    parser.add_argument(
        "--quick", action="store_true", help="20 archs, 2 generations, 2 rounds, 1 seed: shows that it runs"
    )
    args = parser.parse_args(argv)
    args.budgets = BUDGETS
    if args.quick:
        args.populations, args.generations, args.rounds = [20], 2, 2
        args.budgets, args.seeds = BUDGETS[:1], min(args.seeds, 1)
    require_positive(parser, args, "generations", "rounds", "threads")
    if min(args.populations) < 4:
        parser.error(f"--populations is {min(args.populations)}; expected at least 4")
    return args


def _report(timings: dict[str, Timing], run: dict[str, Any]) -> str:
    """Compose the table of one predictor and population."""
    cells = []
    for row, timing in timings.items():
        seconds = timing.seconds / run["generations"]
        released = timings["S1"].seconds / timing.seconds
        ratios = (f"{timing.ratio_total:.1f}", f"{released:.1f}", f"{timing.ratio_previous:.2f}")
        cells.append((row, *ratios, f"{1e3 * seconds:.2f}", f"{run['population'] / seconds:.0f}", LEVERS[row]))
    header = ("row", "over S0", "over S1", "over previous", "ms/generation", "archs/s", "lever")
    return "\n".join(
        [
            "",
            table(header, cells),
            f"{run['space']}, {run['predictor']} predictor, population {run['population']}, "
            f"{run['generations']} generations, medians of {run['rounds']} rounds",
            ", ".join(f"{key} {value}" for key, value in run["machine"].items()),
            f"baseline timed twice: spread {run['baseline_spread']:.1%}"
            + (" - NOISY, do not quote these ratios" if run["noisy"] else ""),
        ]
    )


def _quality_report(rows: Sequence[dict[str, Any]]) -> str:
    """Compose the table of hypervolumes."""
    names = ("last_population", "archive", "archive_lowest", "random")
    cells = [
        (
            str(row["population"]),
            str(row["generations"]),
            *(f"{row[name]:.4f}" for name in names),
            str(row["evaluations"]),
        )
        for row in rows
    ]
    first = rows[0]
    return "\n".join(
        [
            "",
            table(("population", "generations", *names, "evaluations"), cells),
            f"hypervolume over the exact front's, {first['archs']:,} archs, synthetic predictor, "
            f"{first['seeds']} seeds; "
            f"all archs in {first['exhaustive_seconds']:.2f} s, {first['exhaustive_archs_per_second']:,} archs/s",
        ]
    )


def _json_row(row: str, timings: dict[str, Timing], population: int, generations: int) -> dict[str, Any]:
    """Collect what is particular to a row."""
    timing = timings[row]
    seconds = timing.seconds / generations
    return {
        "bench": "search",
        "row": row,
        "lever": LEVERS[row],
        "baseline": "one arch at a time",
        "ratio_total": round(timing.ratio_total, 4),
        "ratio_released": round(timings["S1"].seconds / timing.seconds, 4),
        "ratio_previous": round(timing.ratio_previous, 4),
        "ms_per_generation": round(1e3 * seconds, 4),
        "cpu_ms_per_generation": round(1e3 * timing.cpu_seconds / generations, 4),
        "archs_per_second": round(population / seconds, 1),
    }


if __name__ == "__main__":
    main()
