"""Measure a twin and its subnet on the same images under the same attacks: supernet, twin, images -> outcomes.parquet.

Both are recalibrated on the same training images and meet the same noise, so that they compare image by image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proard.artifacts import OUTCOMES, read_header, write_table
from proard.config import UserError
from proard.data import ImageSet, to_float
from proard.evaluation import measure, rows_of, work_of
from proard.evaluation.meter import Measured
from proard.nets import fold, load_static, recalibrate
from proard.progress import Progress
from proard.space import one_pass
from proard.stages.common import parse_arguments, run
from proard.stages.measuring import load_images, subnet_meter


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="measure_twin",
        reads=["supernet", "twin", "train", "val", "test"],
        writes=["outcomes"],
        optional=["cache"],
    )
    files, config, settings = job.files, job.config, job.config.measure_twin
    attacks, shared = config.verify_front.attacks, {"threat": config.threat, "measurement": config.measurement}
    net, space, arch, _ = load_static(files.twin, kind="trained_student")
    meter = subnet_meter(job, cache=files.cache)
    if space.settings != meter.supernet.space.settings:
        raise UserError(f"{files.twin} is of space {space.settings.name}, not of the supernet's; rerun train_student")
    train_seed = read_header(files.twin)["provenance"]["seed"]
    net = net.to(job.device)
    recalibrate(net, to_float(meter.recalibration.images), batch_size=config.measurement.batch_size)
    job.ledger.tally.spent += len(meter.recalibration) * one_pass(net.spec.macs)
    twin = fold(net).eval()
    rows: list[dict[str, Any]] = []
    progress = Progress("twin", 4, "measurements")
    for images in (
        load_images(job, "val", settings.num_val_images),
        load_images(job, "test", settings.num_test_images),
    ):

        def add(role: str, measured: Measured, images: ImageSet = images) -> None:
            described = {"space": space, "arch": arch, "split": images.split, "seed": job.seed, **shared}
            found = rows_of(measured, attacks=attacks, worst=True, **described)
            rows.extend(outcome_rows(found, measured, role=role, train_seed=train_seed))
            progress.advance(note=f"{role} on {images.split}: worst {found[-1]['robust_acc']:.1%}")

        add("subnet", meter.measure(arch, images, attacks))
        measured = measure(twin, images, attacks, seed=job.seed, **shared)
        job.ledger.tally.spent += work_of(measured.values(), net.spec.macs)
        add("twin", measured)
    progress.close()
    inputs = [files.supernet, files.twin, files.train, files.val, files.test]
    write_table(files.outcomes, rows, OUTCOMES, job.provenance(*inputs))
    job.record_costs()


def outcome_rows(rows: list[dict[str, Any]], measured: Measured, *, role: str, train_seed: int) -> list[dict[str, Any]]:
    """Rows of `rows_of` with their images' outcomes in place of intervals; the worst case last."""
    kept = []
    for row in rows:
        entries = list(measured.values()) if row["attack"] == "worst" else [measured[row["attack"]]]
        robust = entries[0]["robust"]
        for entry in entries[1:]:
            robust = robust & entry["robust"]
        outcomes = {"clean": entries[0]["clean"].tolist(), "robust": robust.tolist()}
        columns = {name: row[name] for name in OUTCOMES if name in row}
        kept.append({**columns, **outcomes, "role": role, "train_seed": train_seed})
    return kept


if __name__ == "__main__":
    run(main)
