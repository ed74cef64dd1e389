"""Attack an exported student with standard AutoAttack: weights, test images -> table with outcomes per image."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch

from proard.artifacts import AUTOATTACK, AUTOATTACK_UNION, write_table
from proard.config import Attack
from proard.data import ImageSet, to_float
from proard.evaluation import clean_correct, rows_of, work_of
from proard.evaluation.autoattack import ATTACKS, STEPS, Attacked, autoattack, check_classes
from proard.progress import Progress
from proard.space import one_pass
from proard.stages.common import Job, parse_arguments, run
from proard.stages.measuring import Exported, conditions_of, exported_network, load_images, own_outcomes, own_rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="autoattack_student",
        reads=["weights", "student", "test", "budget"],
        writes=["table"],
        optional=["cache"],
    )
    files, settings = job.files, job.config.autoattack_student
    images = load_images(job, "test", settings.num_images)
    check_classes(len(images.classes))
    exported = exported_network(job)
    own = own_rows(files.student, exported.arch.arch_id, job.config.threat.eps)
    outcomes = own_outcomes(own)
    pixels, macs = to_float(images.images), exported.space.spec(exported.arch).macs
    clean = clean_correct(exported.net, pixels, images.labels, batch_size=settings.block_size).cpu().numpy()
    lost = np.zeros_like(clean) if outcomes is None else outcomes.lost(clean)
    if outcomes is None and not settings.attack_all:
        print(f"note: {files.student} has no outcomes per image: all images are attacked")
    threat, number = job.config.threat, int((clean & ~lost).sum() if not settings.attack_all else clean.sum())
    print(
        f"{files.budget}: AutoAttack on {number} of {len(images)} test images, {threat.norm} {threat.eps:g}", flush=True
    )
    progress = Progress(f"AutoAttack {files.budget}", len(ATTACKS) * len(images), "images")
    found = autoattack(
        exported.net,
        images,
        threat=threat,
        seed=job.seed,
        block_size=settings.block_size,
        left_out=None if settings.attack_all else lost,
        cache=files.cache,
        advance=progress.advance,
    )
    progress.close()
    own_acc = float((clean & ~lost).mean()) if outcomes is not None else same_images_acc(own, images)
    rows = table_rows(job, exported, images, found, own_acc=own_acc)
    write_table(files.table, rows, AUTOATTACK, job.provenance(files.weights, files.student, files.test))
    spent = [{**entry["spent"], "clean": found.clean} for entry in found.entries.values()]
    job.ledger.tally.spent += work_of(spent, macs) + len(images) * one_pass(macs)
    print(summary(files.budget, found, own_acc))
    job.record_costs()


def same_images_acc(own: Any, images: ImageSet) -> float | None:
    """The worst case in the table, if it was measured on as many images."""
    row = own.sort_values("robust_acc").iloc[0]
    return float(row["robust_acc"]) if row["num_images"] == len(images) else None


def table_rows(
    job: Job, exported: Exported, images: ImageSet, found: Attacked, *, own_acc: float | None
) -> list[dict[str, Any]]:
    """Rows of AUTOATTACK: the images that are robust after each attack and all before it, and after all."""
    whole = {name: sum(entry[name] for entry in found.entries.values()) for name in ("gradients", "seconds")}
    whole |= {"robust": found.entries[ATTACKS[-1]]["robust"], "attacked": found.entries[ATTACKS[0]]["attacked"]}
    entries = {**found.entries, AUTOATTACK_UNION: whole}
    measured = {name: {**entry, "clean": found.clean, "dtype": "float32"} for name, entry in entries.items()}
    attacks = [Attack(name=name, num_steps=STEPS.get(name, max(STEPS.values()))) for name in measured]
    shared = {
        "step_size": None,
        "accounting": "any_iterate",
        "budget": job.files.budget,
        "left_out": found.left_out,
        "own_robust_acc": own_acc,
        "version": f"standard, pyautoattack {metadata.version('pyautoattack')}, torch {torch.__version__}",
        "warnings": "; ".join(found.warnings),
    }
    rows = rows_of(
        measured,
        space=exported.space,
        arch=exported.arch,
        images=images,
        attacks=attacks,
        conditions=conditions_of(job),
    )
    for row in rows:
        row |= {**shared, "attacked": measured[row["attack"]]["attacked"]}
    return rows


def summary(budget: str, found: Attacked, own_acc: float | None) -> str:
    """Lines for the terminal."""
    after = ", ".join(f"{name} {entry['robust'].mean():.1%}" for name, entry in found.entries.items())
    lines = [f"{budget}: clean {found.clean.mean():.1%}, robust after {after} ({len(found.clean):,} test images)"]
    if found.left_out:
        lines.append(f"  {found.left_out} are misclassified under the run's own attacks and are not attacked again")
    if own_acc is not None:
        difference = 100 * (own_acc - found.entries[ATTACKS[-1]]["robust"].mean())
        lines.append(f"  under the run's own attacks {own_acc:.1%}: {difference:+.1f} points more")
    return "\n".join([*lines, *(f"  warning of AutoAttack: {message}" for message in found.warnings)])


if __name__ == "__main__":
    run(main)
