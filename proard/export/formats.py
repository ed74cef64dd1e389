"""A folded network as safetensors, single-file ONNX and torch.export archive, each with facts about the network."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch

from proard import __version__
from proard.artifacts import ArtifactError, Provenance, atomic_path, load_tensors, save_tensors
from proard.config import Threat
from proard.nets import FixedNet, FoldedNet
from proard.nets.files import bare_fixed
from proard.space import NetArch, NetSpace, SearchSpace, read_space

INPUT, OUTPUT = "images", "logits"
CHANNEL_ORDERS = {1: "grey", 3: "RGB"}
# ONNX operator set: the first onnxruntime that loads a file of it, tried from 1.15 on.
OLDEST_RUNTIME = {18: "1.15", 19: "1.15", 20: "1.17", 21: "1.18", 22: "1.21", 23: "1.23", 24: "1.24", 25: "1.24"}


@dataclass(frozen=True)
class StudentFacts:
    """Facts about the network in every exported file.

    Attributes
    ----------
    name : str
        Run and budget, or run and student.
    classes : tuple of str
        Class names in the order of the logits.
    dataset : str
        Source of the training images (`prepare_data.source`).
    provenance : Provenance
        Of the export.
    footprint : mapping of str to float
        Other costs where they are known: `flash`, `sram` and `arena` in bytes, `latency` in predicted milliseconds.
    device : str, optional
        Latency table that the latency was predicted with.
    latency_file : str
        File of the student that it was predicted for.
    """

    name: str
    budget: str
    space: NetSpace
    arch: NetArch
    classes: tuple[str, ...]
    threat: Threat
    dataset: str
    license: str
    provenance: Provenance
    footprint: Mapping[str, float] = field(default_factory=dict)
    device: str | None = None
    latency_file: str = "student.onnx"

    @property
    def settings_hash(self) -> str:
        """Checksum of the settings of the export and of the measurement."""
        return hashlib.sha256(json.dumps(self.provenance.settings, sort_keys=True).encode()).hexdigest()

    @property
    def channel_order(self) -> str:
        """Order of the input's channels."""
        channels = self.space.settings.image_channels
        return CHANNEL_ORDERS.get(channels, f"{channels} channels")

    def to_header(self) -> dict[str, Any]:
        """The facts as JSON values."""
        spec, side = self.space.spec(self.arch), self.space.settings.image_size
        return {
            "name": self.name,
            "version": __version__,
            "budget": self.budget,
            "arch_id": self.arch.arch_id,
            "arch": self.arch.to_json(),
            "macs": spec.macs,
            "params": spec.params,
            **self.footprint,
            **({"device": self.device, "latency_file": self.latency_file} if self.device else {}),
            "classes": list(self.classes),
            "input": f"{INPUT}: float32 (batch, {spec.image_channels}, {side}, {side}), {self.channel_order}",
            "input_range": [0.0, 1.0],
            "normalisation": "inside the network",
            "output": f"{OUTPUT}: float32 (batch, {spec.classes}), before the softmax",
            "threat": self.threat.model_dump(mode="json"),
            "dataset": self.dataset,
            "license": self.license,
            "run": self.provenance.run,
            "seed": self.provenance.seed,
            "settings_sha256": self.settings_hash,
        }

    def to_text(self) -> dict[str, str]:
        """The facts as text: lists and mappings as JSON."""
        header = self.to_header()
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}


def save_student(path: str | Path, net: FoldedNet | FixedNet, facts: StudentFacts) -> None:
    """Write a folded (or fixed) network so that `load_student` needs this file only."""
    convs = facts.space.spec(facts.arch).convs
    layers = [[conv.name, conv.in_channels, conv.out_channels, conv.kernel, conv.stride] for conv in convs]
    save_tensors(
        path,
        net.state_dict(),
        kind="student",
        provenance=facts.provenance,
        space=facts.space.settings.model_dump(mode="json"),
        layers=layers,
        **facts.to_header(),
    )


def load_student(path: str | Path) -> FoldedNet | FixedNet:
    """Read a student from its safetensors file alone.

    Returns
    -------
    FoldedNet or FixedNet
        On the CPU, in evaluation mode: float32 images in [0, 1] of shape (batch, channels, height, width) to logits of
        shape (batch, classes).

    Raises
    ------
    ArtifactError
        The file is missing, damaged or no student.
    """
    tensors, header = load_tensors(path, kind="student")
    try:
        space = read_space(header["space"])
        if isinstance(space, SearchSpace):
            return FoldedNet.from_state(space.spec(space.read_arch(header["arch"])), tensors).eval()
        net = bare_fixed(space)
        net.load_state_dict(tensors)
        return net.frozen()
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{path}: header and weights are not of one network ({reason}); export it again") from None


def export_program(net: FoldedNet | FixedNet) -> torch.export.ExportedProgram:
    """Trace a network on the CPU with a free batch size; source lines are left out of the graph."""
    spec = net.spec
    images = torch.zeros(2, spec.image_channels, spec.image_size, spec.image_size)
    program = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def save_pt2(path: str | Path, program: torch.export.ExportedProgram, facts: StudentFacts) -> None:
    """Write a torch.export archive; the facts are its extra file `proard.json`."""
    archive = io.BytesIO()
    with warnings.catch_warnings():
        # torch takes channels_last weights for parts of larger tensors; they are written whole
        warnings.filterwarnings("ignore", message="No complete tensor found", category=UserWarning)
        torch.export.save(program, archive, extra_files={"proard.json": json.dumps(facts.to_header())})
    _write_bytes(path, archive.getvalue())


def save_onnx(path: str | Path, program: torch.export.ExportedProgram, facts: StudentFacts, *, opset: int) -> None:
    """Write one self-contained ONNX file: weights, normalisation and the facts inside.

    Parameters
    ----------
    opset : int
        Version of the ONNX operator set. The file's IR version is the lowest that it allows, so that old runtimes
        read the file.

    Raises
    ------
    onnx.checker.ValidationError
        The exporter produced an invalid model.
    """
    with quiet():
        exported = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=opset,
            external_data=False,
            verbose=False,
            dynamo=True,
        )
    assert exported is not None
    model = exported.model_proto
    _strip(model)
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    model.producer_name, model.producer_version = "proard", __version__
    model.doc_string = f"{facts.name}: {facts.channel_order} images in [0, 1] to logits; normalisation inside."
    onnx.helper.set_model_props(model, facts.to_text())
    onnx.checker.check_model(model, full_check=True)
    _write_bytes(path, model.SerializeToString())


def _strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's debugging notes, which contain source paths and are larger than a small network."""
    graph = model.graph
    for entry in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        entry.ClearField("metadata_props")
        entry.ClearField("doc_string")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's progress lines, warnings and log messages."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _write_bytes(path: str | Path, content: bytes) -> None:
    """Write a binary file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
