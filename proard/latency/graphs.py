"""ONNX files of parts of networks: the operators of an exported student, with any weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from proard.space import ConvSpec, Part, key_of

Array = NDArray[np.float32]
Weights = Callable[[str, tuple[int, ...]], Array]  # name and shape of a tensor -> its values

OPSET = 20


def random_weights(seed: int) -> Weights:
    """Weights that keep the variance of activations, so that no number of a network becomes subnormal."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Array:
        if name == "scale":
            return np.ones(shape, dtype=np.float32)
        fan_in = max(int(np.prod(shape[1:])), 1)
        factor = np.sqrt(2 / fan_in) if len(shape) > 1 else 0.1
        return (factor * rng.standard_normal(shape)).astype(np.float32)

    return draw


def tensor_shapes(part: Part) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a part by name; dots in a layer's name become underscores."""
    shapes: dict[str, tuple[int, ...]] = {}
    for conv in part.convs:
        shape = (conv.out_channels, conv.in_channels // conv.groups, conv.kernel, conv.kernel)
        shapes |= {f"{key_of(conv)}_weight": shape, f"{key_of(conv)}_bias": shape[:1]}
    if part.classes:
        shapes |= {"head_weight": (part.classes, part.features), "head_bias": (part.classes,)}
    if part.of_images:
        shapes |= dict.fromkeys(("scale", "shift"), (part.channels, 1, 1))
    return shapes


def onnx_file(part: Part, weights: Weights, *, opset: int = OPSET) -> bytes:
    """A part as an ONNX file with a free batch size.

    Parameters
    ----------
    part : Part
        Its input is `images`; its output is named `logits`, whatever it is.
    weights : callable
        Gives the tensors of `tensor_shapes` by name and shape.
    opset : int
        ONNX operator set, from 18 on.
    """
    entering = (part.channels, part.size, part.size)
    shapes = tensor_shapes(part)
    nodes, tensors = [], []

    def tensor(name: str) -> str:
        values = np.ascontiguousarray(weights(name, shapes[name]), dtype=np.float32)
        tensors.append(numpy_helper.from_array(values, name))
        return name

    def constant(name: str, values: Any, kind: Any) -> str:
        tensors.append(numpy_helper.from_array(np.asarray(values, dtype=kind), name))
        return name

    for index, node in enumerate(part.nodes):
        reads, attributes = list(node.reads), dict(node.attributes)
        output = node.output if index + 1 < len(part.nodes) else "logits"
        if node.layer is not None:
            reads += [tensor(f"{key_of(node.layer)}_{name}") for name in ("weight", "bias")]
            attributes = _conv_attributes(node.layer)
        elif node.kind == "Gemm":
            reads += [tensor("head_weight"), tensor("head_bias")]
            attributes = {"transB": 1}
        elif node.kind == "ReduceMean":
            reads.append(constant(f"axes{index}", [2, 3], np.int64))
            attributes = {"keepdims": int(attributes["keepdims"])}
        elif node.kind == "Unsqueeze":
            reads.append(constant(f"axes{index}", [2, 3], np.int64))
        elif node.kind == "Clip":
            reads += [constant(f"low{index}", 0.0, np.float32), constant(f"high{index}", 6.0, np.float32)]
        elif part.of_images and index < 2:
            reads.append(tensor(("scale", "shift")[index]))
        nodes.append(helper.make_node(node.kind, reads, [output], **attributes))
    return _model(nodes, entering, part.nodes[-1].shape, tensors, opset)


def call_file(*, opset: int = OPSET) -> bytes:
    """A file that does nearly nothing: its time is that of a call."""
    return _model([helper.make_node("Relu", ["images"], ["logits"])], (1, 1, 1), (1, 1, 1), [], opset)


def _model(
    nodes: list[Any], entering: tuple[int, ...], leaving: tuple[int, ...], tensors: list[Any], opset: int
) -> bytes:
    """A checked ONNX file of one input and one output."""
    ends = (("images", entering), ("logits", leaving))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]) for name, shape in ends]
    graph = helper.make_graph(nodes, "part", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], producer_name="proard")
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _conv_attributes(layer: ConvSpec) -> dict[str, Any]:
    """A convolution's attributes in ONNX."""
    return {
        "kernel_shape": [layer.kernel] * 2,
        "strides": [layer.stride] * 2,
        "pads": [layer.kernel // 2] * 4,
        "dilations": [1, 1],
        "group": layer.groups,
    }
