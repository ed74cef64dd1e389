"""Measure one variant's supernet at the subnets of all variants, on val and on test: -> table.parquet, outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from proard.artifacts import read_table, save_tensors, write_table
from proard.artifacts.variants import VARIANT_MEASURED
from proard.config import Attack
from proard.data import ImageSet
from proard.evaluation import SubnetMeter, rows_of
from proard.progress import Progress
from proard.space import Arch
from proard.space.cost import human
from proard.stages.common import parse_arguments, run
from proard.stages.measuring import load_images, subnet_meter


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="measure_variant",
        reads=["supernet", "archs", "train", "val", "test", "variant", "train_seed"],
        writes=["table", "outcomes"],
        optional=["cache"],
    )
    files, settings = job.files, job.config.measure_variant
    listed = read_table(files.archs, columns=["arch", "macs"])
    archs = [Arch.from_json(text) for text in spread(listed, settings.num_archs)]
    meter = subnet_meter(job, cache=files.cache)
    splits = [
        (load_images(job, "val", settings.num_val_images), (settings.attack,), False),
        (load_images(job, "test", settings.num_test_images), settings.test_attacks, True),
    ]
    rows: list[dict[str, Any]] = []
    outcomes: dict[str, list[np.ndarray]] = {}
    progress = Progress(f"{files.variant} seed {files.train_seed}", len(archs) * len(splits), "measurements")
    for arch in archs:
        for images, attacks, worst in splits:
            fresh, right = measured(meter, arch, images, attacks, worst=worst)
            rows += [{**row, "variant": files.variant, "train_seed": int(files.train_seed)} for row in fresh]
            for name, mask in right.items():
                outcomes.setdefault(name, []).append(mask)
            newest = rows[-1]
            progress.advance(
                note=f"{human(newest['macs'])} MACs on {images.split}: clean {newest['clean_acc']:.1%} "
                f"{newest['attack']} {newest['robust_acc']:.1%}"
            )
    progress.close()
    provenance = job.provenance(files.supernet, files.archs, files.train, files.val, files.test)
    tensors = {name: torch.from_numpy(np.stack(masks)) for name, masks in outcomes.items()}
    save_tensors(files.outcomes, tensors, kind="outcomes", provenance=provenance)
    write_table(files.table, rows, VARIANT_MEASURED, provenance)
    job.record_costs()


def spread(archs: pd.DataFrame, number: int) -> list[str]:
    """Archs evenly spread over the ranks of MACs, the cheapest and the dearest among them."""
    ordered = archs.sort_values(["macs", "arch"], ignore_index=True)
    ranks = np.unique(np.linspace(0, len(ordered) - 1, min(number, len(ordered))).round().astype(int))
    return ordered["arch"].iloc[ranks].tolist()


def measured(
    meter: SubnetMeter, arch: Arch, images: ImageSet, attacks: Sequence[Attack], *, worst: bool
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Rows of one subnet on one split, and which of its images are right: clean and under each attack."""
    entries = meter.measure(arch, images, attacks)
    rows = rows_of(
        entries,
        space=meter.supernet.space,
        arch=arch,
        split=images.split,
        attacks=attacks,
        threat=meter.threat,
        measurement=meter.measurement,
        seed=meter.seed,
        worst=worst,
    )
    right = {f"{images.split}.{name}": entry["robust"] for name, entry in entries.items()}
    right[f"{images.split}.clean"] = next(iter(entries.values()))["clean"]
    if worst:
        right[f"{images.split}.worst"] = np.logical_and.reduce([entry["robust"] for entry in entries.values()])
    return rows, right


if __name__ == "__main__":
    run(main)
