"""Measure one shard of sampled subnets on val: supernet, archs, images -> table.parquet."""

from __future__ import annotations

import re
from collections.abc import Sequence

from proard.artifacts import MEASURED, read_table, write_table
from proard.config import UserError
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
        stage="evaluate_archs",
        reads=["supernet", "archs", "train", "val", "shard"],
        writes=["table"],
        optional=["cache"],
    )
    files, settings = job.files, job.config.evaluate_archs
    archs = read_table(files.archs, columns=["arch"])
    first, last = shard_range(files.shard)
    shard = archs.iloc[first : last + 1]
    if shard.empty:
        raise UserError(f"shard {files.shard} is beyond the {len(archs)} archs of {files.archs}")
    meter = subnet_meter(job, cache=files.cache)
    val = load_images(job, "val", settings.num_images)
    rows = []
    progress = Progress(f"shard {files.shard}", len(shard), "archs")
    for text in shard["arch"]:
        rows += meter.rows(Arch.from_json(text), val, [settings.attack])
        newest = rows[-1]
        progress.advance(
            note=f"{human(newest['macs'])} MACs clean {newest['clean_acc']:.1%} robust {newest['robust_acc']:.1%}"
        )
    progress.close()
    write_table(files.table, rows, MEASURED, job.provenance(files.supernet, files.archs, files.train, files.val))
    job.record_costs()


def shard_range(text: str) -> tuple[int, int]:
    """First and last row of a shard such as 0050-0099."""
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise UserError(f"shard {text!r} is not understood; write its first and last row, as in 0050-0099")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    run(main)
