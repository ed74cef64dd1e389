"""Measure a trained student on test, under the attacks that all students share and under its own: table.parquet."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from proard.artifacts import TRAINED, read_header, write_table
from proard.config import Attack, Student
from proard.data import ImageSet, to_float
from proard.evaluation import measure, rows_of, stands_training_attack, work_of
from proard.nets import fold, load_static
from proard.space import one_pass
from proard.stages.common import Job, parse_arguments, run
from proard.stages.measuring import load_images
from proard.training.attacker import pgd_options


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(__doc__, argv, stage="evaluate_student", reads=["student", "test"], writes=["table"])
    (student,) = job.config.train_student.students
    settings, threat, files = job.config.evaluate_student, job.config.threat, job.files
    net, space, arch, _ = load_static(files.student, kind="trained_student")
    predict = fold(net.to(job.device))
    images = load_images(job, "test", settings.num_images)
    described = {"space": space, "arch": arch, "split": images.split, "seed": job.seed}
    rows: list[dict[str, Any]] = []
    for eps in settings.eps or (threat.eps,):
        attacks = [scaled(attack, eps / threat.eps) for attack in settings.attacks]
        shared = {"threat": threat.model_copy(update={"eps": eps}), "measurement": job.config.measurement}
        measured = measure(predict, images, attacks, **shared, seed=job.seed)
        job.ledger.tally.spent += work_of(measured.values(), net.spec.macs)
        rows += rows_of(measured, attacks=attacks, worst=True, **shared, **described)
    if trained_with(student):
        last = job.config.measurement.model_copy(update={"accounting": "last_iterate"})
        own, measured = own_attack(job, student, predict, images)
        job.ledger.tally.spent += work_of(measured.values(), net.spec.macs) + len(images) * one_pass(net.spec.macs)
        rows += rows_of(measured, attacks=[own], threat=threat, measurement=last, **described)
    facts = read_header(files.student).get("training", {}) | {
        "student": student.name,
        "group": re.sub(r"_seed=\d+$", "", student.name),
        "net": space.settings.name,
        "loss": student.loss,
        "train_steps": trained_with(student),
        "train_step_size": student.attack.step_size if trained_with(student) else None,
        "lr": student.lr,
    }
    write_table(files.table, [{**row, **facts} for row in rows], TRAINED, job.provenance(files.student, files.test))
    at_threat = [row for row in rows if row["eps"] == threat.eps or len(settings.eps) == 1]
    print("\n".join(f"{student.name} on test, {_words(row)}" for row in at_threat or rows))
    job.record_costs()


def trained_with(student: Student) -> int:
    """Attack steps of a training; 0 for a loss without an attack."""
    return 0 if student.loss in ("plain", "kd") else student.attack.num_steps


def scaled(attack: Attack, factor: float) -> Attack:
    """An attack for a ball of another radius: its step in proportion."""
    return attack.model_copy(update={"step_size": attack.step_size * factor})


def own_attack(
    job: Job, student: Student, predict: Callable[[Tensor], Tensor], images: ImageSet
) -> tuple[Attack, dict[str, dict[str, Any]]]:
    """The attack of a student's training as one that measures, and what it leaves, as `measure` returns it."""
    threat, attack = job.config.threat, student.attack
    started, batch = time.monotonic(), job.config.measurement.batch_size
    pixels = to_float(images.images)
    options = pgd_options(attack, eps=threat.eps, norm=threat.norm, num_steps=attack.num_steps)
    right = {
        name: stands_training_attack(predict, pixels, images.labels, batch_size=batch, seed=job.seed, attack=each)
        for name, each in (("clean", {**options, "num_steps": 0, "start": "zero"}), ("robust", options))
    }
    entry = {
        **{name: mask.cpu().numpy() for name, mask in right.items()},
        "gradients": attack.num_steps * len(images),
        "seconds": time.monotonic() - started,
    }
    entry["robust"] = np.logical_and(entry["robust"], entry["clean"])
    own = Attack(name="own", num_steps=attack.num_steps, step_size=attack.step_size)
    return own, {"own": entry}


def _words(row: dict[str, Any]) -> str:
    """One measurement for people."""
    return f"{row['attack']} at {row['eps'] * 255:g}/255: clean {row['clean_acc']:.1%}, robust {row['robust_acc']:.1%}"


if __name__ == "__main__":
    run(main)
