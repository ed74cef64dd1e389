"""Write a student's card with the results of AutoAttack, of the checks and in int8, also beside the exported files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proard.artifacts import (
    AUTOATTACK,
    CHECKS,
    QUANTISED,
    ArtifactError,
    Provenance,
    read_header,
    read_metadata,
    read_table,
    sha256,
    write_text,
)
from proard.config import Threat
from proard.export import StudentFacts, Trust, model_card
from proard.export.card import FOOTPRINT_WORDS
from proard.export.int8_card import int8_block
from proard.space import read_space
from proard.stages.common import Job, parse_arguments, run
from proard.stages.export_student import (
    EXPORTED,
    checksum_list,
    chosen_rows,
    describe_budget,
    describe_training,
    image_counts,
    read_manifest,
    trained_rows,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="describe_student",
        reads=["weights", "student", "manifest", "budget"],
        writes=["card"],
        optional=["supernet", "trained", "autoattack", "checks", "quantised"],
        runs_networks=False,
    )
    files = job.files
    folder = Path(files.weights).parent
    exported = {name: folder / file for name, file in EXPORTED.items()}
    trust = Trust(
        read_table(files.autoattack, columns=AUTOATTACK) if files.autoattack else None,
        read_table(files.checks, columns=CHECKS) if files.checks else None,
    )
    text = card_of(job, json.loads(exported["parity"].read_text(encoding="utf-8")), trust)
    if files.quantised:
        text = f"{text.rstrip()}\n\n{int8_block(read_table(files.quantised, columns=QUANTISED))}"
    write_text(files.card, text)
    write_text(exported["card"], text)  # the folder that is passed on says the same
    write_text(exported["checksums"], checksum_list(exported))
    print(f"{files.budget}: {files.card}, also in {folder} with new checksums")
    job.record_costs()


def card_of(job: Job, parity: dict[str, Any], trust: Trust) -> str:
    """Text of the card, from what the exported weights and their tables say.

    Raises
    ------
    ArtifactError
        A table examined other weights, or the rows are of another student.
    """
    files, header, manifest = job.files, read_header(job.files.weights), read_manifest(job.files.manifest)
    weights = sha256(files.weights)
    for path in (files.autoattack, files.checks):
        if path and read_metadata(path).get("inputs", {}).get("student.safetensors") != weights:
            raise ArtifactError(f"{path} examined other weights than {files.weights}; rerun the stage that writes it")
    space, threat = read_space(header["space"]), Threat.model_validate(header["threat"])
    facts = StudentFacts(
        name=header["name"],
        budget=header["budget"],
        space=space,
        arch=space.read_arch(header["arch"]),
        classes=tuple(header["classes"]),
        threat=threat,
        dataset=header["dataset"],
        license=header["license"],
        footprint={key: header[key] for key in FOOTPRINT_WORDS if header.get(key) is not None},
        device=header.get("device"),
        latency_file=header.get("latency_file", "student.onnx"),
        provenance=Provenance(**header["provenance"]),
    )
    if files.trained:
        rows = trained_rows(files.student, files.budget, header["arch_id"], threat.eps)
        describe = describe_training(files.student, files.trained)
    else:
        rows, describe = chosen_rows(files.student, files.budget), describe_budget(files.student, files.supernet)
    opset = job.config.export_student.opset
    return model_card(facts, rows, parity=parity, opset=opset, counts=image_counts(manifest), trust=trust, **describe)


if __name__ == "__main__":
    run(main)
