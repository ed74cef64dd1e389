"""A student as an int8 ONNX file: normalisation folded, ranges calibrated, quantised by onnxruntime in QDQ form.

Activations are unsigned and weights signed by default, the only form that onnxruntime fuses into integer kernels on
x86. Weights keep to 7 bits there: without VNNI, x86 adds two products of 8 bits in 16, and 2 * 255 * 64 still fits.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

from proard.artifacts import atomic_path
from proard.config import UserError
from proard.export.formats import INPUT

INT16_MAX = 2**15 - 1
PADDED = f"{INPUT}_and_ones"
AFFINE = {"Mul": np.multiply, "Div": np.divide, "Add": np.add, "Sub": np.subtract}
BATCH = 64  # calibration images at a time, at most


@dataclass(frozen=True)
class Recipe:
    """One way to quantise.

    Attributes
    ----------
    name : str
        As in the table's column `variant`.
    signed : bool
        Activations int8 and weights of 8 bits; otherwise activations uint8 and weights of 7 bits.
    percentile : float, optional
        Share of the calibration's values, in percent, that the range of an activation keeps; all of them for None.
    float_ends : bool
        The first and the last layer compute in float32.
    """

    name: str
    signed: bool = False
    percentile: float | None = None
    float_ends: bool = False

    @property
    def largest_weight(self) -> int:
        """The integer of a channel's largest weight."""
        return 127 if self.signed else 64

    def with_float_ends(self) -> Recipe:
        """The same with first and last layer in float32."""
        return replace(self, name=f"{self.name}_ends", float_ends=True)

    def with_training(self) -> Recipe:
        """The same with weights that were trained further."""
        return replace(self, name=f"{self.name}_trained")


FIRST = Recipe("reduced")
OTHER_RANGES = (Recipe("percentile", percentile=99.99), Recipe("signed", signed=True))


def fold_normalisation(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the pixels' normalisation inside its first convolution, exactly, also at the border.

    Zero padding of normalised images is padding by the mean pixel. So the shift cannot go into the bias alone: a
    channel of ones joins the pixels, whose filter is the shift of every tap, and which is zero in the padding like the
    pixels themselves. One means the pixel value 1, which 8 bits hold exactly.

    Parameters
    ----------
    model : ModelProto
        Of a float student. A model whose input does not pass through per-channel arithmetic into convolutions is
        returned as it is.

    Returns
    -------
    ModelProto
        A new model; global means are `GlobalAveragePool`, which quantised kernels know.
    """
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    graph = folded.graph
    values = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    channels = graph.input[0].type.tensor_type.shape.dim[1].dim_value
    factor, shift, name, chain = np.ones(channels), np.zeros(channels), INPUT, []
    while True:
        users = [node for node in graph.node if name in node.input]
        if len(users) != 1 or users[0].op_type not in AFFINE:
            break
        (node,) = users
        other = node.input[1 - list(node.input).index(name)]
        constant = values.get(other)
        if constant is None or constant.size not in (1, channels) or (node.op_type == "Div" and node.input[0] != name):
            break
        sign = -1.0 if node.op_type == "Sub" and node.input[0] != name else 1.0
        constant = np.broadcast_to(constant.reshape(-1).astype(np.float64), (channels,))
        if node.op_type in ("Mul", "Div"):
            factor, shift = AFFINE[node.op_type](factor, constant), AFFINE[node.op_type](shift, constant)
        else:
            factor, shift = sign * factor, AFFINE[node.op_type](sign * shift, sign * constant)
        chain.append(node)
        name = node.output[0]
    if chain and all(node.op_type == "Conv" and node.input[0] == name and _groups(node) == 1 for node in users):
        for node in users:
            weight = values[node.input[1]].astype(np.float64)
            ones = np.einsum("oihw,i->ohw", weight, shift)[:, None]
            weight = np.concatenate([weight * factor[None, :, None, None], ones], 1).astype(np.float32)
            _replace(graph, node.input[1], weight)
        for node in users:
            node.input[0] = PADDED
        for node in chain:
            graph.node.remove(node)
        pads = numpy_helper.from_array(np.array([0, 0, 0, 0, 0, 1, 0, 0], dtype=np.int64), "one_channel")
        one = numpy_helper.from_array(np.array(1, dtype=np.float32), "one")
        graph.initializer.extend([pads, one])
        pad = onnx.helper.make_node("Pad", [INPUT, "one_channel", "one"], [PADDED], name="append_ones")
        graph.node.insert(0, pad)
    _pool_globally(graph, values)
    _drop_unused(graph)
    return onnx.shape_inference.infer_shapes(folded)


def _groups(node: onnx.NodeProto) -> int:
    """Groups of a convolution."""
    return next((entry.i for entry in node.attribute if entry.name == "group"), 1)


def _replace(graph: onnx.GraphProto, name: str, value: NDArray[Any]) -> None:
    """Give an initializer another value."""
    (old,) = (entry for entry in graph.initializer if entry.name == name)
    old.CopyFrom(numpy_helper.from_array(value, name))


def _pool_globally(graph: onnx.GraphProto, values: dict[str, NDArray[Any]]) -> None:
    """Write means over height and width as `GlobalAveragePool`."""
    for place, node in enumerate(list(graph.node)):
        axes = values.get(node.input[1]) if node.op_type == "ReduceMean" and len(node.input) > 1 else None
        if axes is None or sorted(axes.tolist()) not in ([2, 3], [-2, -1]):
            continue
        keeps = next((entry.i for entry in node.attribute if entry.name == "keepdims"), 1)
        pooled = node.output[0] if keeps else f"{node.output[0]}_pooled"
        place = list(graph.node).index(node)
        graph.node.remove(node)
        graph.node.insert(place, onnx.helper.make_node("GlobalAveragePool", node.input[:1], [pooled], name=node.name))
        if not keeps:
            flat = onnx.helper.make_node("Flatten", [pooled], node.output[:1], name=f"{node.name}_flat", axis=1)
            graph.node.insert(place + 1, flat)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Delete initializers that no node reads, and shapes noted before the graph changed."""
    used = {name for node in graph.node for name in node.input}
    for entry in [entry for entry in graph.initializer if entry.name not in used]:
        graph.initializer.remove(entry)
    del graph.value_info[:]


def with_weights(model: onnx.ModelProto, weights: Mapping[str, NDArray[np.float32]]) -> onnx.ModelProto:
    """A copy of a model in which the initializers of these names have other values."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for name, value in weights.items():
        _replace(changed.graph, name, value)
    return changed


def ranges_of(path: str | Path) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Scale and zero point of every activation of an int8 file, by the name of the tensor."""
    graph = onnx.load(path).graph
    values = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    quantisers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    return {node.input[0]: (values[node.input[1]], values[node.input[2]]) for node in quantisers}


def quantise(
    model: onnx.ModelProto,
    path: str | Path,
    images: NDArray[np.float32],
    recipe: Recipe,
    *,
    ranges: Mapping[str, tuple[NDArray[Any], NDArray[Any]]] | None = None,
) -> None:
    """Write the int8 file of a folded float model.

    Parameters
    ----------
    model : ModelProto
        What `fold_normalisation` gave.
    path : path
        Written atomically, with the model's metadata and the recipe's name.
    images : ndarray of shape (n, channels, height, width)
        float32 in [0, 1]; ranges of activations are those on these images.
    recipe : Recipe
        How to quantise.
    ranges : mapping of str to (ndarray, ndarray), optional
        Scale and zero point of activations, which then are not calibrated: those of `ranges_of` another file.

    Raises
    ------
    UserError
        The file would saturate on a CPU without VNNI.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    pixel = np.float32(1 / 255)
    zero = np.int8(-128) if recipe.signed else np.uint8(0)
    kind = QuantType.QInt8 if recipe.signed else QuantType.QUInt8
    names = {name for node in model.graph.node for name in node.output} | {INPUT}
    inputs = (INPUT, PADDED) if not recipe.float_ends else ()
    fixed = {name: (np.array(pixel, np.float32), np.array(zero, zero.dtype)) for name in inputs if name in names}
    fixed |= ranges or {}
    layers = [node.name for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    ends = [layers[0], layers[-1], *(node.name for node in model.graph.node if node.op_type == "Pad")]
    method = CalibrationMethod.MinMax if recipe.percentile is None else CalibrationMethod.Percentile
    extra: dict[str, Any] = {
        "TensorQuantOverrides": {
            name: [{"quant_type": kind, "scale": scale, "zero_point": zero_point}]
            for name, (scale, zero_point) in fixed.items()
        },
        "OpTypesToExcludeOutputQuantization": ["Gemm"],
    }
    if recipe.percentile is not None:
        extra["CalibPercentile"] = recipe.percentile
    with tempfile.TemporaryDirectory() as folder, _without_advice():
        source, written = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        quantize_static(
            source,
            written,
            _Reader(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=not recipe.signed,
            activation_type=kind,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=ends if recipe.float_ends else None,
            calibrate_method=method,
            extra_options=extra,
        )
        quantised = onnx.load(written)
    del quantised.graph.value_info[:]  # shapes that the runtime finds by itself
    quantised.producer_name, quantised.producer_version = model.producer_name, model.producer_version
    quantised.doc_string = f"{model.doc_string} int8 (QDQ), {recipe.name}"
    facts = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(quantised, {**facts, "quantisation": recipe.name})
    onnx.checker.check_model(quantised)
    check_range(quantised)
    with atomic_path(path) as temporary:
        temporary.write_bytes(quantised.SerializeToString())


class _Reader:
    """Calibration images as onnxruntime reads them: batches of one size, because it stacks their activations."""

    def __init__(self, images: NDArray[np.float32]) -> None:
        size = max(size for size in range(1, BATCH + 1) if len(images) % size == 0)
        starts = range(0, len(images), size)
        self.batches = iter([np.ascontiguousarray(images[first : first + size]) for first in starts])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next batch, or None."""
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch}


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Context without the quantiser's advice to prepare the model, which is prepared here."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def check_range(model: onnx.ModelProto) -> None:
    """Refuse a file in which two neighbouring products of uint8 and int8 can exceed 16 bits.

    Raises
    ------
    UserError
        Which layer, and its largest weight.
    """
    values = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    made_by = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        sources = [made_by.get(name) for name in node.input[:2]]
        if any(source is None or source.op_type != "DequantizeLinear" for source in sources):
            continue  # computes in float32
        activation, weight = (source for source in sources if source is not None)
        integers = values.get(weight.input[0])
        largest = 128 if integers is None else int(np.abs(integers.astype(np.int32)).max())
        if values[activation.input[2]].dtype == np.uint8 and 2 * 255 * largest > INT16_MAX:
            raise UserError(
                f"layer {node.name} has uint8 inputs and a weight of {largest}: on CPUs without VNNI its sums "
                f"saturate; weights up to {INT16_MAX // 510} are safe"
            )


def operators(path: str | Path) -> dict[str, int]:
    """How often each operator runs once onnxruntime has optimised the file on this CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath).graph.node
    kinds = [node.op_type for node in nodes]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}
