"""Measure archs of NSGA-II, of random search (equally many of both) and of uniform scaling, on val and on test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from proard.artifacts import FOOTPRINT, FRONT, read_metadata, read_table, write_table
from proard.config import searched_costs
from proard.progress import Progress
from proard.space import Arch
from proard.space.cost import human
from proard.stages.common import parse_arguments, run
from proard.stages.measuring import load_images, subnet_meter

SEARCHES = ("nsga2", "random")
UNIFORM = "uniform"
PREDICTIONS = ("predicted_clean_acc", "predicted_robust_acc", *FOOTPRINT)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="verify_front",
        reads=["supernet", "front", "train", "val", "test"],
        writes=["table"],
        optional=["cache"],
    )
    files, settings = job.files, job.config.verify_front
    front = read_table(files.front, columns=["arch", "found_by", "predicted_robust_acc"])
    costs = searched_costs(read_metadata(files.front).get("settings", {}))
    chosen = pick(front, settings.num_archs, costs=costs)
    meter = subnet_meter(job, cache=files.cache)
    splits = [load_images(job, "val", settings.num_val_images), load_images(job, "test")]
    rows = []
    progress = Progress("verify", len(chosen) * len(splits), "measurements")
    for _, candidate in chosen.iterrows():
        for images in splits:
            measured = meter.rows(Arch.from_json(candidate["arch"]), images, settings.attacks, worst=True)
            predicted = {name: candidate[name] for name in PREDICTIONS if name in candidate}
            rows += [{**row, **predicted, "found_by": candidate["found_by"]} for row in measured]
            newest = rows[-1]
            progress.advance(
                note=f"{candidate['found_by']} {human(newest['macs'])} MACs on {images.split}: "
                f"clean {newest['clean_acc']:.1%} worst {newest['robust_acc']:.1%}"
            )
    progress.close()
    inputs = [files.supernet, files.front, files.train, files.val, files.test]
    write_table(files.table, rows, FRONT, job.provenance(*inputs))
    job.record_costs()


def pick(front: pd.DataFrame, number: int, *, costs: Sequence[str] = ("macs",)) -> pd.DataFrame:
    """Equally many archs of both searches, spread over the log of the costs along their predicted fronts.

    For each of `number` targets, evenly spaced in the log of every cost from the low to the high end of both fronts'
    common range, the nearest arch of the search that is not yet taken; so both searches answer the same questions.
    Uniform scaling may have fewer archs; then all of them are taken.
    """
    names = [name for name in (*SEARCHES, UNIFORM) if (front["found_by"] == name).any()]
    fronts = {name: front[front["found_by"] == name].sort_values(list(costs)) for name in names}
    number = min(number, *(len(fronts[name]) for name in SEARCHES))
    log = {name: np.log(rows[list(costs)].to_numpy(float)) for name, rows in fronts.items()}  # (archs, costs)
    low = np.max([log[name].min(axis=0) for name in SEARCHES], axis=0)
    high = np.min([log[name].max(axis=0) for name in SEARCHES], axis=0)
    parts = []
    for name in names:
        free = np.ones(len(log[name]), dtype=bool)
        for target in np.linspace(low, high, min(number, len(free))):  # (costs,)
            distances = np.abs(log[name] - target).sum(axis=1)
            nearest = np.where(free, distances, np.inf).argmin()
            free[nearest] = False
        parts.append(fronts[name][~free])
    return pd.concat(parts)


if __name__ == "__main__":
    run(main)
