"""What the tests of exported students share: names of the files, flags of a stage, logits of an ONNX file."""

from __future__ import annotations

import numpy as np

from proard.artifacts import Provenance
from proard.config import Threat, job_settings
from proard.export import StudentFacts
from proard.export.parity import open_session

BUDGET = "macs=60K"


def arguments(stage, config, **flags):
    argv = ["--settings", job_settings(config, stage), "--seed", "0", "--device", "cpu", "--threads", "1"]
    return argv + [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def onnx_logits(path, images):
    return open_session(path, threads=1).run(["logits"], {"images": np.ascontiguousarray(images)})[0]


def facts_of(space, arch):
    return StudentFacts(
        name="tiny",
        budget=BUDGET,
        space=space,
        arch=arch,
        classes=("left", "right", "low"),
        threat=Threat(),
        dataset="digits",
        license="unspecified",
        provenance=Provenance("tiny", "export_student"),
    )
