"""Search the space with the predictor, by NSGA-II and at random: -> archive.parquet, front.parquet, history.parquet.

The front also has the archs of uniform scaling (`found_by` uniform), which needs no search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from proard import artifacts, predictor, search
from proard.artifacts import PREDICTED, ArtifactError
from proard.config import SearchFront
from proard.predictor import Predictor
from proard.progress import Progress
from proard.search import HISTORY, Archive, Cost, Exhaustive, non_dominated
from proard.space import SearchSpace, human_cost, read_device
from proard.space.sampling import anchor_archs, footprint_columns, identity_columns
from proard.stages.common import parse_arguments, run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="search_front",
        reads=["predictor", "table"],
        writes=["archive", "front", "history"],
        runs_networks=False,
    )
    settings, space = job.config.search_front, SearchSpace(job.config.space, read_device(job.config.device))
    model = read_predictor(job.files.predictor, job.files.table, space)

    def cost(genotypes: np.ndarray) -> np.ndarray:
        found = space.costs(genotypes)
        return np.column_stack([found[name] for name in settings.cost])  # (n, costs)

    problem = (model.predict, cost, space.choices, space.canonical)
    nsga2 = search.nsga2(
        *problem,
        population=settings.population,
        generations=settings.generations,
        max_cost=settings.limits,
        seed=job.seed,
    )
    per_generation = np.bincount(nsga2.generations)[1:].tolist()
    random = search.random(*problem, generations=per_generation, max_cost=settings.limits, seed=job.seed)
    archives = {"nsga2": nsga2, "random": random}
    whole = exhaustive(problem, settings, size=space.size)
    history = search.history(archives, cost_names=settings.cost, seed=job.seed, exhaustive=whole)

    fronts = {name: take(archive, non_dominated(archive.objectives)) for name, archive in archives.items()}
    scaled = within(np.stack([space.genotype(arch) for arch in space.diagonal()]), cost, settings.limits)
    exact = {} if whole is None else {"exhaustive": take(whole.front, np.arange(len(whole.front)))}
    cheapest = [space.tables.cheapest(column) for column in space.tables.columns]  # every budget that can be met is met
    anchors = np.unique([*(space.genotype(arch) for arch in anchor_archs(space)), *cheapest], axis=0)
    anchor, uniform = (
        Archive(rows, model.predict(rows), cost(rows), np.zeros(len(rows), np.int64)) for rows in (anchors, scaled)
    )
    device = [job.config.device] if job.config.device else []
    provenance = job.provenance(job.files.predictor, job.files.table, *device)
    archive_rows = predicted_rows({**archives, **exact, "anchor": anchor}, space, job.seed)
    artifacts.write_table(job.files.archive, archive_rows, PREDICTED, provenance)
    front_rows = predicted_rows({**fronts, "uniform": uniform, **exact}, space, job.seed)
    artifacts.write_table(job.files.front, front_rows, PREDICTED, provenance)
    artifacts.write_table(job.files.history, history, HISTORY, provenance)
    print(summary(history, fronts, whole, settings.cost))
    job.record_costs()


def read_predictor(path: str, table: str, space: SearchSpace) -> Predictor:
    """The predictor, if it belongs to this table and space.

    Raises
    ------
    ArtifactError
        It was fitted on another table, or for another space.
    """
    model = predictor.load(path)
    if model.space.settings != space.settings:
        raise ArtifactError(f"{path} is for another space, {model.space.settings.name}; rerun fit_predictor")
    fitted_on = artifacts.read_header(path).get("provenance", {}).get("inputs", {}).values()
    if artifacts.sha256(table) not in fitted_on:
        raise ArtifactError(f"{path} was not fitted on {table} as it is now; rerun fit_predictor")
    return model


def exhaustive(problem: tuple[Any, ...], settings: SearchFront, *, size: int) -> Exhaustive | None:
    """Everything within the limits, or None where that is more than `enumerate_up_to`."""
    if settings.limits is None and size > settings.enumerate_up_to:
        return None
    progress = None

    def on_block(archs: int, total: int) -> None:
        nonlocal progress
        progress = progress or Progress("enumerate", total, "archs")
        progress.advance(archs)

    whole = search.exhaustive(*problem, up_to=settings.enumerate_up_to, max_cost=settings.limits, on_block=on_block)
    if progress is not None:
        progress.close()
    return whole


def within(genotypes: np.ndarray, cost: Cost, limits: Sequence[float] | None) -> np.ndarray:
    """The genotypes whose costs are at most the limits."""
    return genotypes if limits is None else genotypes[(cost(genotypes) <= np.asarray(limits)).all(axis=1)]


def take(archive: Archive, rows: np.ndarray) -> Archive:
    """Some rows of an archive, cheapest first; where the first cost is equal, by the second."""
    rows = rows[np.lexsort(archive.costs[rows].T[::-1])]
    return Archive(archive.genotypes[rows], archive.accuracies[rows], archive.costs[rows], archive.generations[rows])


def predicted_rows(archives: dict[str, Archive], space: SearchSpace, seed: int) -> list[dict[str, Any]]:
    """Rows of `PREDICTED`, one per arch and search that evaluated it."""
    rows = []
    for name, archive in archives.items():
        columns = {
            **identity_columns(space, archive.genotypes),
            **footprint_columns(space, archive.genotypes),
        }
        columns["predicted_clean_acc"], columns["predicted_robust_acc"] = archive.accuracies.T.tolist()
        for values in zip(*columns.values(), strict=True):
            rows.append({**dict(zip(columns, values, strict=True)), "found_by": name, "seed": seed})
    return rows


def summary(
    history: Sequence[dict[str, Any]], fronts: dict[str, Archive], whole: Exhaustive | None, costs: Sequence[str]
) -> str:
    """What the searches reached, as text for a terminal."""
    names = "".join(f"{name:20}" for name in costs)
    lines = [f"  {'search':10}{'archs':>9}{'front':>8}{'hypervolume':>13}   {names}best predicted robust_acc"]
    last = {row["search"]: row for row in history}
    found = {name: (last[name]["evaluations"], last[name]["hypervolume"], front) for name, front in fronts.items()}
    if whole is not None:
        found["exact"] = (whole.size, last["nsga2"]["exhaustive_hypervolume"], whole.front)
    for name, (archs, volume, front) in found.items():
        ends = zip(costs, front.costs.min(axis=0).tolist(), front.costs.max(axis=0).tolist(), strict=True)
        ranges = "".join(f"{f'{human_cost(name, low)} to {human_cost(name, high)}':20}" for name, low, high in ends)
        best = f"{100 * front.accuracies[:, 1].max():.1f} %"
        lines.append(f"  {name:10}{archs:9}{len(front):8}{volume:13.4f}   {ranges}{best}")
    if whole is not None:
        shares = [f"{name} {last[name]['relative_hypervolume']:.2%}" for name in fronts]
        lines.append(f"  of the exact hypervolume: {', '.join(shares)}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
