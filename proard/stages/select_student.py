"""Choose a budget's student: the best few by prediction are measured on val, the choice is then measured on test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd

from proard.artifacts import FOOTPRINT, STUDENT, read_table, write_table
from proard.config import UserError
from proard.progress import Progress
from proard.space import Arch, Budget, Part, SearchSpace, parse_budget, read_device
from proard.space.cost import check_budget, exactly, human
from proard.stages.common import parse_arguments, run
from proard.stages.measuring import load_images, subnet_meter


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="select_student",
        reads=["archive", "supernet", "train", "val", "test", "budget"],
        writes=["student"],
        optional=["cache"],
    )
    files, settings = job.files, job.config.select_student
    budget = parse_budget(files.budget)
    space = SearchSpace(job.config.space, read_device(job.config.device))
    note = check_budget(files.budget, space)
    archive = with_costs(read_table(files.archive, columns=["arch", "predicted_robust_acc"]), space)
    candidates = under_budget(archive, budget, settings.candidates, arena=partial(arena_of, space))
    candidates = candidates.assign(
        arena=[arena_of(space, arch) for arch in candidates["arch"]],
        latency_file=space.device.file if space.device else None,
    )
    if note:
        print(f"note: {note}")
    meter = subnet_meter(job, cache=files.cache)
    val = load_images(job, "val", settings.num_images)

    rows: list[dict[str, Any]] = []
    progress = Progress(f"select {budget.text}", len(candidates), "candidates")
    for _, candidate in candidates.iterrows():
        (row,) = meter.rows(Arch.from_json(candidate["arch"]), val, [settings.attack])
        rows.append({**row, **_facts(candidate, budget), "role": "candidate", "chosen": False})
        progress.advance(note=f"{human(row['macs'])} MACs clean {row['clean_acc']:.1%} robust {row['robust_acc']:.1%}")
    progress.close()

    best = max(range(len(rows)), key=lambda i: (rows[i]["robust_acc"], rows[i]["clean_acc"], -rows[i]["macs"]))
    rows[best]["chosen"] = True
    choice = candidates.iloc[best]
    for images in (val, load_images(job, "test")):
        arch, attacks = Arch.from_json(choice["arch"]), job.config.verify_front.attacks
        chosen = {**_facts(choice, budget), "role": "choice", "chosen": True}
        rows += [{**row, **chosen} for row in meter.rows(arch, images, attacks, worst=True)]
    inputs = [files.archive, files.supernet, files.train, files.val, files.test]
    inputs += [job.config.device] if job.config.device else []
    write_table(files.student, rows, STUDENT, job.provenance(*inputs))
    worst = rows[-1]
    print(
        f"{budget.text}: {human(worst['macs'])} MACs, {human(worst['params'])} parameters; on test clean "
        f"{worst['clean_acc']:.1%}, robust {worst['robust_acc']:.1%} (worst case of all attacks)"
    )
    job.record_costs()


def with_costs(archive: pd.DataFrame, space: SearchSpace) -> pd.DataFrame:
    """The archive with every cost as this space and its device have it now."""
    genotypes = np.asarray([space.genotype(space.read_arch(arch)) for arch in archive["arch"]])
    return archive.assign(**space.costs(genotypes))


def arena_of(space: SearchSpace, arch: str) -> int:
    """Bytes in which onnxruntime places the activations of an arch, given as JSON."""
    return Part.whole(space.spec(space.read_arch(arch))).arena


def under_budget(
    archive: pd.DataFrame, budget: Budget, number: int, *, arena: Callable[[str], int] = lambda arch: 0
) -> pd.DataFrame:
    """The `number` archs with the best predicted robust accuracy among those that the budget allows.

    A limit on `sram` limits the peak by liveness, which the archive has, and `arena` of an arch: what a runtime needs.

    Raises
    ------
    UserError
        No arch is that small; the smallest feasible cost is named.
    """
    within = pd.DataFrame({column: archive[column] <= limit for column, limit in budget.limits.items()})
    ranked = archive[within.all(axis=1)].drop_duplicates("arch")
    ranked = ranked.sort_values(["predicted_robust_acc", "predicted_clean_acc"], ascending=False)
    memory = budget.limits.get("sram", np.inf)
    feasible = list(islice((row for row, arch in ranked["arch"].items() if arena(arch) <= memory), number))
    if not feasible:
        smallest = {}
        for column in budget.limits:
            others = archive[within.drop(columns=column).all(axis=1)]
            smallest[column] = least_memory(others, arena) if column == "sram" else others[column].min()
        named = [exactly(column, cost) for column, cost in smallest.items() if not pd.isna(cost)]
        beside = " beside the other limits" if len(budget.limits) > 1 else ""
        raise UserError(
            f"budget {budget.text} allows none of the searched subnets; the smallest feasible cost{beside} is "
            f"{' or '.join(named) or 'none: relax each limit'}"
        )
    return ranked.loc[feasible]


def least_memory(archive: pd.DataFrame, arena: Callable[[str], int]) -> float:
    """The smallest limit on `sram` that allows an arch of an archive; NaN for none."""
    least = np.inf
    for arch, sram in archive.sort_values("sram")[["arch", "sram"]].itertuples(index=False):
        if sram >= least:
            break
        least = min(least, max(sram, arena(arch)))
    return least if np.isfinite(least) else np.nan


def _facts(candidate: pd.Series, budget: Budget) -> dict[str, object]:
    """Columns of a row beside its measurement."""
    names = ("predicted_clean_acc", "predicted_robust_acc", "found_by", *FOOTPRINT, "arena", "latency_file")
    return {**{name: candidate[name] for name in names if name in candidate}, "budget": budget.text}


if __name__ == "__main__":
    run(main)
