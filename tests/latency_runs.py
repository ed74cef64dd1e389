"""Helpers for tests of the latency kit: invented measurements, a student selected with a device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from helpers import random_supernet

from proard.artifacts import Provenance, sha256, write_json
from proard.config import PRESETS, Threat
from proard.export import StudentFacts, save_student
from proard.latency.bench import TIME, describe, measure
from proard.latency.graphs import onnx_file, random_weights
from proard.latency.plan import read_plan
from proard.nets import extract, fold
from proard.space import LatencyTable, Part, SearchSpace
from proard.space.latency import FORMAT
from proard.space.tables import parts_of

CONFIG = """
run: timed
space: resnet_digits
"""


def run_file(data: bytes, images: np.ndarray) -> np.ndarray:
    """Outputs of an ONNX file in memory."""
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


def invented_times(
    folder: Path, *, macs: float = 0.0, passes: tuple[float, float] = (1.0, 1.0), timed: dict | None = None
) -> dict:
    """What a device would measure whose latency is exactly additive over blocks, or over MACs.

    `timed`: what bench.py wrote there for other files; by default for the file of a call, here.
    """
    manifest, checksum = read_plan(folder)
    rng = np.random.default_rng(1)
    parts = {entry["key"]: float(rng.uniform(1, 3)) for entry in manifest["files"].values() if entry["kind"] == "part"}
    table = LatencyTable("invented", "table", 0.5, 1.0 - bool(macs), macs, parts, {})
    space = SearchSpace(PRESETS["resnet_digits"], table)
    times = {}
    for file, entry in manifest["files"].items():
        if entry["kind"] == "call":
            times[file] = 0.25
        elif entry["kind"] == "part":
            times[file] = parts[entry["key"]] + 0.25
        else:
            times[file] = float(space.costs(np.asarray([entry["genotype"]]))["latency"][0])
    files = {file: {TIME: time, "passes": [{TIME: time * factor} for factor in passes]} for file, time in times.items()}
    timed = timed or measure({"call.onnx": folder / "call.onnx"}, name="An Invented (Device)", rounds=1, seconds=0.001)
    return {**timed, "files": files, "manifest_sha256": checksum}


def first_block_last(space: SearchSpace) -> tuple[Part, Part, Part]:
    """A stem, a block of several convolutions, and what follows the last unit."""
    parts = {part.key: part for part in parts_of(space)}.values()
    first, last = (next(part for part in parts if getattr(part, name)) for name in ("of_images", "classes"))
    block = next(part for part in parts if not part.of_images and not part.classes and len(part.convs) > 1)
    return first, block, last


def timed_student(folder: Path) -> Path:
    """An exported student in a folder, selected with the device `board.json`."""
    space = SearchSpace(PRESETS["resnet_digits"])
    arch = space.largest
    net = fold(extract(random_supernet(space).eval(), arch)).float().eval()
    table = {"format": FORMAT, "device": "board", "parts_ms": {}, "threads": 1, "runtime": "another"}
    table |= {
        "model": {"uses": "macs", "base_ms": 1.0, "factor": 0.0, "ms_per_mac": 1e-6},
        "machine": describe("board"),
    }
    write_json(folder / "board.json", table)
    facts = StudentFacts(
        name="tiny",
        budget="latency=1us",
        space=space,
        arch=arch,
        classes=tuple("0123456789"),
        threat=Threat(),
        dataset="digits",
        license="unspecified",
        provenance=Provenance("tiny", "export_student"),
        footprint={"latency": 2.5},
        device=str(folder / "board.json"),
    )
    folder = folder / "student"
    folder.mkdir()
    save_student(folder / "student.safetensors", net, facts)
    (folder / "student.onnx").write_bytes(onnx_file(Part.whole(space.spec(arch)), random_weights(0)))
    (folder / "card.md").write_text("# A student\n\n## Limits\n\n- one\n")
    (folder / "SHA256SUMS").write_text(f"{sha256(folder / 'card.md')}  card.md\n")
    return folder
