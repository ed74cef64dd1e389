"""Export a student that was trained by itself: its weights and table -> weights, ONNX, pt2, card, parity, checksums."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from proard.artifacts import TRAINED, ArtifactError, read_header, read_table
from proard.export import TRAINED_ALONE, StudentFacts
from proard.nets import fold, load_static
from proard.stages.common import parse_arguments, run
from proard.stages.export_student import WRITES, read_manifest, write_files
from proard.stages.measuring import load_images


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__, argv, stage="export_trained", reads=["student", "table", "test", "manifest"], writes=WRITES
    )
    (student,) = job.config.train_student.students
    files, settings, measuring = job.files, job.config.export_student, job.config.evaluate_student
    rows, manifest = read_table(files.table, columns=TRAINED), read_manifest(files.manifest)
    test = load_images(job, "test", measuring.num_images)
    net, space, arch, _ = load_static(files.student, kind="trained_student")
    if set(rows["student"]) != {student.name} or set(rows["arch_id"]) != {arch.arch_id}:
        raise ArtifactError(f"{files.table} does not measure {student.name} in {files.student}; rerun evaluate_student")
    facts = StudentFacts(
        name=f"{job.config.run} {student.name}",
        budget=student.name,
        space=space,
        arch=arch,
        classes=test.classes,
        threat=job.config.threat,
        dataset=manifest["source"],
        license=settings.license,
        provenance=job.provenance(files.student, files.table, files.test, files.manifest),
    )
    at_threat = rows[(rows["eps"] - job.config.threat.eps).abs() < 1e-12]
    rows = (rows if at_threat.empty else at_threat).assign(role="trained")
    describe = {
        "attacks": [attack.model_dump() for attack in measuring.attacks],
        "supernet": read_header(files.student),
        "counts": {split: entry["count"] for split, entry in manifest["splits"].items()},
        "origin": TRAINED_ALONE,
    }
    paths = {name: Path(getattr(files, name)) for name in WRITES}
    write_files(job, paths, fold(net), facts, rows, test=test, describe=describe)
    job.record_costs()


if __name__ == "__main__":
    run(main)
