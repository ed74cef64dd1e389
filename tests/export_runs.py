"""What the tests of exported students share: names of the files, flags of a stage, logits of an ONNX file."""

from __future__ import annotations

import numpy as np
import torch
from helpers import NAMES, random_supernet, save_stripes, tiny_space

from proard.artifacts import PREDICTED, Provenance, read_header, write_json, write_table
from proard.config import Threat, job_settings
from proard.data import load_split
from proard.export import StudentFacts
from proard.export.parity import open_session
from proard.nets import save_supernet
from proard.space.sampling import identity_columns
from proard.stages import select_student

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
        classes=NAMES,
        threat=Threat(),
        dataset="digits",
        license="unspecified",
        provenance=Provenance("tiny", "export_student"),
    )


def selected_student(folder, config, *, val, number, classes=NAMES):
    """A random supernet, images, and a student selected from `number` predicted archs; the files by name."""
    made_by = Provenance("tiny", "train_phase")
    files = {"supernet": folder / "supernet.safetensors", "archive": folder / "archive.parquet"}
    files |= save_stripes(folder, val=val, classes=classes)
    space = tiny_space(classes=len(classes))
    save_supernet(files["supernet"], random_supernet(space, dtype=torch.float32), made_by)
    genotypes = space.sample(number, np.random.default_rng(0))
    scores = np.linspace(0, 1, len(genotypes))
    archive = {**identity_columns(space, genotypes), "predicted_clean_acc": scores, "predicted_robust_acc": scores}
    rows = [dict(zip(archive, values, strict=True)) for values in zip(*archive.values(), strict=True)]
    write_table(files["archive"], rows, PREDICTED, made_by)
    splits = {
        name: {"count": len(load_split(files[name])), "checksum": read_header(files[name])["checksum"]}
        for name in ("train", "val", "test")
    }
    files["manifest"] = folder / "manifest.json"
    write_json(files["manifest"], {"source": "digits", "classes": list(classes), "splits": splits})
    files["student"] = folder / "student.parquet"
    flags = {name: files[name] for name in ("archive", "supernet", "train", "val", "test", "student")}
    select_student.main(arguments("select_student", config, budget=BUDGET, **flags))
    return files
