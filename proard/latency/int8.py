"""int8 ONNX files of parts of networks, quantised as students are; only their times mean something."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from proard.export.formats import INPUT
from proard.export.int8 import FIRST, fold_normalisation, quantise
from proard.latency.graphs import Weights, onnx_file
from proard.space import Part

CALIBRATION_MAPS = 4
OUTPUT = "logits"


def int8_file(part: Part, weights: Weights) -> bytes:
    """A part as an int8 file with random ranges.

    Inside a network the maps between two blocks are integers already. So a part that does not begin with images takes
    integers, and one whose last operator is quantised gives integers: quantising at its ends is not timed.

    Parameters
    ----------
    part : Part
        Any part of a network, or a whole one.
    weights : callable
        As of `onnx_file`.
    """
    model = fold_normalisation(onnx.load_from_string(onnx_file(part, weights)))
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"node{index}"  # the quantiser excludes and reports nodes by name
    shape = (CALIBRATION_MAPS, part.channels, part.size, part.size)
    maps = np.random.default_rng(0).random(shape, dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantise(model, path, maps, FIRST)
        quantised = onnx.load(path)
    if not part.of_images:
        _take_integers(quantised.graph)
    if not part.classes:
        _give_integers(quantised.graph)
    onnx.checker.check_model(quantised, full_check=True)
    return quantised.SerializeToString()


def _take_integers(graph: onnx.GraphProto) -> None:
    """Let the input be what its quantisation gives, where nothing else reads it."""
    readers = [node for node in graph.node if INPUT in node.input]
    if [node.op_type for node in readers] == ["QuantizeLinear"]:
        _replace_end(graph, readers[0], graph.input[0], readers[0].output[0], INPUT)


def _give_integers(graph: onnx.GraphProto) -> None:
    """Let the output be what is dequantised at the end."""
    last = next(node for node in graph.node if OUTPUT in node.output)
    if last.op_type == "DequantizeLinear":
        _replace_end(graph, last, graph.output[0], last.input[0], OUTPUT)


def _replace_end(graph: onnx.GraphProto, node: onnx.NodeProto, end: onnx.ValueInfoProto, inner: str, name: str) -> None:
    """Remove a node at an end of the graph; the tensor on its inner side takes the name and place of the outer one."""
    graph.node.remove(node)
    for other in graph.node:
        other.input[:] = [name if each == inner else each for each in other.input]
        other.output[:] = [name if each == inner else each for each in other.output]
    end.type.tensor_type.elem_type = TensorProto.UINT8
