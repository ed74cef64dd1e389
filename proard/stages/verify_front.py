"""Measure the fronts of NSGA-II and of random search, equally many archs of each, on val and on test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from proard.artifacts import FOOTPRINT, FRONT, read_table, write_table
from proard.progress import Progress
from proard.space import Arch
from proard.space.cost import human
from proard.stages.common import parse_arguments, run
from proard.stages.measuring import load_images, subnet_meter

SEARCHES = ("nsga2", "random")
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
    chosen = pick(front, settings.num_archs)
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


def pick(front: pd.DataFrame, number: int) -> pd.DataFrame:
    """Equally many archs of each search, spread over log MACs along that search's predicted front.

    For each of `number` targets, evenly spaced in log MACs over both fronts' common range, the nearest arch of the
    search that is not yet taken; so both searches answer the same questions.
    """
    front = front[front["found_by"].isin(SEARCHES)]
    fronts = {name: front[front["found_by"] == name].sort_values("macs") for name in SEARCHES}
    number = min(number, *(len(rows) for rows in fronts.values()))
    log = {name: np.log(rows["macs"].to_numpy(float)) for name, rows in fronts.items()}
    low, high = max(values.min() for values in log.values()), min(values.max() for values in log.values())
    parts = []
    for name in SEARCHES:
        free = np.ones(len(log[name]), dtype=bool)
        for target in np.linspace(low, high, number):
            nearest = np.where(free, np.abs(log[name] - target), np.inf).argmin()
            free[nearest] = False
        parts.append(fronts[name][~free])
    return pd.concat(parts)


if __name__ == "__main__":
    run(main)
