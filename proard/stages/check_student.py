"""Check an exported student for masked gradients: weights, ONNX file, test images, other networks -> checks.parquet."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from proard.artifacts import AUTOATTACK, CHECKS, read_metadata, read_table, write_table
from proard.config import Attack
from proard.data import to_float
from proard.evaluation.masking import CHECKS as LIST
from proard.evaluation.masking import Evidence, Examination
from proard.export.parity import open_session
from proard.nets import fold, load_static
from proard.progress import Progress
from proard.space import SearchSpace, Work
from proard.stages.common import Job, parse_arguments, run
from proard.stages.measuring import Exported, exported_network, load_images, own_outcomes, own_rows, subnet_meter


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="check_student",
        reads=["weights", "onnx", "student", "test", "budget"],
        writes=["checks"],
        optional=["autoattack", "teacher", "supernet", "train"],
    )
    files, measurement, started = job.files, job.config.measurement, time.monotonic()
    images = load_images(job, "test", job.config.check_student.num_images)
    exported = exported_network(job)
    examination = Examination(
        exported.net,
        to_float(images.images),
        images.labels,
        threat=job.config.threat,
        accounting=measurement.accounting,
        batch_size=measurement.batch_size,
        seed=job.seed,
        evidence=evidence_of(job, exported, len(images)),
    )
    progress = Progress(f"check {files.budget}", len(LIST), "checks")
    found = examination.run(lambda name: progress.advance(note=name))
    progress.close()
    shared = {
        "budget": files.budget,
        "arch_id": exported.arch.arch_id,
        "norm": job.config.threat.norm,
        "eps": job.config.threat.eps,
        "num_images": len(images),
        "seconds": time.monotonic() - started,
        "seed": job.seed,
    }
    rows: list[dict[str, Any]] = []
    for number, (check, result) in enumerate(zip(LIST, found, strict=True), start=1):
        threshold = examination.threshold(check)
        passed = None
        if result.value is not None:
            passed = result.value <= threshold if check.relation == "<=" else result.value >= threshold
        row = {"number": number, "check": check.name, "expected": check.expected, "value": result.value}
        row |= {"relation": check.relation, "threshold": threshold, "unit": check.unit, "passed": passed}
        rows.append({**shared, **row, "details": json.dumps(result.details)})
    paths = [getattr(files, name) for name in ("weights", "onnx", "student", "test", "autoattack", "teacher")]
    write_table(files.checks, rows, CHECKS, job.provenance(*(path for path in paths if path)))
    forwards = 2 * examination.gradients + examination.forwards
    job.ledger.tally.spent += Work(forwards=forwards, macs=forwards * exported.space.spec(exported.arch).macs)
    print(summary(files.budget, rows))
    job.record_costs()


def evidence_of(job: Job, exported: Exported, number: int) -> Evidence:
    """What was measured of the first images of test, and the networks that attacks are transferred from."""
    files, evidence = job.files, Evidence(deployed=onnx_network(job.files.onnx))
    own = own_rows(files.student, exported.arch.arch_id, job.config.threat.eps)
    outcomes = own_outcomes(own)
    if outcomes is not None and len(outcomes.robust) >= number:
        evidence.white_box = outcomes.robust[:number]
        attack = first_attack(files.student, own)
        evidence.own = None if attack is None else (attack[0], attack[1][:number])
    if files.autoattack:
        table = read_table(files.autoattack, columns=AUTOATTACK)
        after = {row["attack"]: np.asarray(row["robust"], bool)[:number] for _, row in table.iterrows()}
        evidence.after = after if all(len(mask) == number for mask in after.values()) else {}
    others: dict[str, Callable[[Tensor], Tensor]] = {}
    if files.teacher:
        teacher, *_ = load_static(files.teacher, kind=("teacher",))
        others["the teacher"] = fold(teacher.to(job.device)).requires_grad_(False).eval()
    if files.supernet and files.train:
        space = SearchSpace(job.config.space)
        arch = space.smallest if exported.arch == space.largest else space.largest
        others["another subnet"] = subnet_meter(job, cache=None).student(arch).requires_grad_(False)
    evidence.others = others
    return evidence


def first_attack(path: str, own: pd.DataFrame) -> tuple[Attack, np.ndarray] | None:
    """The first attack of the table whose settings are known, and the outcomes under it."""
    sections = read_metadata(path).get("settings", {})
    known = sections.get("verify_front", {}).get("attacks", [])
    known = known or sections.get("experiment", {}).get("measure", {}).get("attacks", [])
    settings = {entry["name"]: Attack.model_validate(entry) for entry in known}
    for _, row in own.iterrows():
        if row["attack"] in settings:
            return settings[row["attack"]], np.asarray(row["robust"], bool)
    return None


def onnx_network(path: str | Path) -> Callable[[Tensor], Tensor]:
    """The exported ONNX file as a function of images, in onnxruntime on the CPU."""
    session = open_session(Path(path), threads=torch.get_num_threads())
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.cpu().contiguous().numpy()})[0])


def summary(budget: str, rows: list[dict[str, Any]]) -> str:
    """Lines for the terminal: how many checks passed, and each that did not."""
    applied = [row for row in rows if row["passed"] is not None]
    lines = [f"{budget}: {sum(row['passed'] for row in applied)} of {len(applied)} checks passed"]
    for row in applied:
        if not row["passed"]:
            limit = f"{row['value']:.3g}, expected {row['relation']} {row['threshold']:.3g} ({row['unit']})"
            lines.append(f"  check {row['number']}, {row['check']}: {limit}; {row['details']}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
