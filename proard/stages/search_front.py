"""Search the space with the predictor, by NSGA-II and at random: -> archive.parquet, front.parquet, history.parquet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from proard import artifacts, predictor, search
from proard.artifacts import PREDICTED, ArtifactError
from proard.predictor import Predictor
from proard.search import HISTORY, Archive, non_dominated
from proard.space import SearchSpace
from proard.space.cost import human
from proard.space.sampling import ENUMERABLE, anchor_archs, enumerate_genotypes, identity_columns
from proard.stages.common import parse_arguments, run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__, argv, stage="search_front", reads=["predictor", "table"], writes=["archive", "front", "history"]
    )
    settings, space = job.config.search_front, SearchSpace(job.config.space)
    model = read_predictor(job.files.predictor, job.files.table, space)

    def cost(genotypes: np.ndarray) -> np.ndarray:
        return space.costs(genotypes)[settings.cost]

    problem = (model.predict, cost, space.choices, space.canonical)
    nsga2 = search.nsga2(
        *problem,
        population=settings.population,
        generations=settings.generations,
        max_cost=settings.max_cost,
        seed=job.seed,
    )
    per_generation = np.bincount(nsga2.generations)[1:].tolist()
    random = search.random(*problem, generations=per_generation, max_cost=settings.max_cost, seed=job.seed)
    archives = {"nsga2": nsga2, "random": random}
    exhaustive = all_objectives(model, space, settings.cost, settings.max_cost) if space.size <= ENUMERABLE else None
    history = search.history(archives, cost_name=settings.cost, seed=job.seed, exhaustive=exhaustive)

    fronts = {name: take(archive, non_dominated(archive.objectives)) for name, archive in archives.items()}
    anchors = np.asarray([space.genotype(arch) for arch in anchor_archs(space)])
    anchor = Archive(anchors, model.predict(anchors), cost(anchors), np.zeros(len(anchors), dtype=np.int64))
    provenance = job.provenance(job.files.predictor, job.files.table)
    archive_rows = predicted_rows({**archives, "anchor": anchor}, space, job.seed)
    artifacts.write_table(job.files.archive, archive_rows, PREDICTED, provenance)
    artifacts.write_table(job.files.front, predicted_rows(fronts, space, job.seed), PREDICTED, provenance)
    artifacts.write_table(job.files.history, history, HISTORY, provenance)
    print(summary(history, fronts))


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


def all_objectives(model: Predictor, space: SearchSpace, cost: str, max_cost: float | None) -> np.ndarray:
    """Objectives of every arch within the limit, of shape (archs, 3)."""
    genotypes = enumerate_genotypes(space.choices, space.canonical)
    costs = space.costs(genotypes)[cost]
    kept = costs <= (np.inf if max_cost is None else max_cost)
    return np.column_stack([-model.predict(genotypes[kept]), costs[kept]])


def take(archive: Archive, rows: np.ndarray) -> Archive:
    """Some rows of an archive, cheapest first."""
    rows = rows[np.argsort(archive.costs[rows], kind="stable")]
    return Archive(archive.genotypes[rows], archive.accuracies[rows], archive.costs[rows], archive.generations[rows])


def predicted_rows(archives: dict[str, Archive], space: SearchSpace, seed: int) -> list[dict[str, Any]]:
    """Rows of `PREDICTED`, one per arch and search that evaluated it."""
    rows = []
    for name, archive in archives.items():
        columns = identity_columns(space, archive.genotypes)
        columns["predicted_clean_acc"], columns["predicted_robust_acc"] = archive.accuracies.T.tolist()
        for values in zip(*columns.values(), strict=True):
            rows.append({**dict(zip(columns, values, strict=True)), "found_by": name, "seed": seed})
    return rows


def summary(history: Sequence[dict[str, Any]], fronts: dict[str, Archive]) -> str:
    """What the searches reached, as text for a terminal."""
    lines = [f"  {'search':8}{'archs':>8}{'front':>8}{'hypervolume':>13}   {'cost':20}best predicted robust_acc"]
    last = {row["search"]: row for row in history}
    for name, front in fronts.items():
        row = last[name]
        costs = f"{human(front.costs.min())} to {human(front.costs.max())}"
        lines.append(
            f"  {name:8}{row['evaluations']:8}{row['front_size']:8}{row['hypervolume']:13.4f}   {costs:20}"
            f"{100 * front.accuracies[:, 1].max():.1f} %"
        )
    best = last["nsga2"]["exhaustive_hypervolume"]
    if best is not None:
        lines.append(f"  {'whole space':29}{best:8.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
