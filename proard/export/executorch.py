"""A student as an ExecuTorch program (`.pte`) for XNNPACK, in float32 and in int8, and its runtime.

ExecuTorch is an extra: it is imported where it is used. XNNPACK takes whole parts of a graph; what it does not take
would run in slow portable kernels, so a program is refused if an operator is left outside.
"""

from __future__ import annotations

import copy
import importlib.util
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from proard.artifacts import atomic_path
from proard.config import UserError
from proard.export.formats import quiet
from proard.export.twin import RoundThrough
from proard.nets import FixedNet, FoldedNet

aten = torch.ops.aten
AFFINE = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)
PIXEL = 1 / 255  # scale of int8 pixels, so that those of 8 bits enter without loss


def require_executorch(needed_by: str = "executorch_student") -> None:
    """Raise an error that names the extra, where ExecuTorch is missing.

    Raises
    ------
    UserError
        How to install it.
    """
    if importlib.util.find_spec("executorch") is None:
        raise UserError(
            f"{needed_by} needs ExecuTorch, which this environment lacks; get it with: pip install -e .[executorch]"
        )


def deployable(net: FoldedNet | FixedNet) -> fx.GraphModule:
    """The network's graph for one image at a time, as `prepared`.

    Returns
    -------
    GraphModule
        float32 images in [0, 1] of shape (1, channels, height, width) to logits of shape (1, classes), on the CPU.
    """
    return prepared(net, zero_image(net))


def prepared(net: torch.nn.Module, image: Tensor) -> fx.GraphModule:
    """The graph of a network, or of a part of one, for inputs of one shape, as delegates take it.

    The normalisation of pixels is inside the first convolution, exactly, also at the border (as
    `export.int8.fold_normalisation` does it): a channel of ones joins the pixels. Means over height and width keep
    their dims, since XNNPACK takes no others.

    Parameters
    ----------
    net : Module
        It is copied to the CPU.
    image : Tensor of shape (1, channels, height, width)
        An input, on the CPU.
    """
    net = copy.deepcopy(net).cpu().eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    module = _traced(net, image)
    graph = module.graph
    for node in list(graph.nodes):
        if node.target == aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target == aten.to.dtype:  # float32 already
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=aten.mean.dim):
        if len(node.args) < 3 or not node.args[2]:
            with graph.inserting_after(node):
                flat = graph.call_function(aten.flatten.using_ints, (node, 1))
            node.replace_all_uses_with(flat, delete_user_cb=lambda user, flat=flat: user is not flat)
            node.args = (*node.args[:2], True)
    _fold_normalisation(module, image.shape[1])
    graph.eliminate_dead_code()
    module.recompile()
    return _traced(module, image)


def quantised(module: fx.GraphModule, images: Tensor) -> fx.GraphModule:
    """A deployable graph in int8 (PT2E), weights per channel, ranges of activations from images.

    Parameters
    ----------
    module : GraphModule
        What `deployable` gave.
    images : Tensor of shape (n, channels, height, width)
        float32 in [0, 1], on the CPU. The range of pixels is [0, 1] whatever they are.

    Returns
    -------
    GraphModule
        The quantised graph; it has no gradient, see `straight_through`.
    """
    require_executorch()
    with quiet():
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        prepared = prepare_pt2e(copy.deepcopy(module), quantizer)
        with torch.no_grad():
            for image in images.split(1):
                prepared(image)
        converted = convert_pt2e(prepared)
    _fix_pixels(converted)
    return converted


def straight_through(module: fx.GraphModule) -> fx.GraphModule:
    """The twin of a graph of `deployable` or `quantised`: the same values, for any number of images, with a gradient.

    Rounding passes the gradient on where the value is inside its range, and stops it where it is clipped.
    """
    twin = copy.deepcopy(module)
    for node in twin.graph.nodes:
        node.target = STRAIGHT_THROUGH.get(str(node.target), node.target)
    return fx.GraphModule(twin, twin.graph)  # without the checks of the exported graph, which was for one image


def save_pte(path: str | Path, module: fx.GraphModule) -> None:
    """Write the program of a graph.

    Parameters
    ----------
    path : path
        Written atomically.
    module : GraphModule
        Of `deployable` or `quantised`.

    Raises
    ------
    UserError
        As of `lowered`.
    """
    content = lowered(module, name=Path(path).name)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def lowered(module: fx.GraphModule, *, name: str) -> bytes:
    """The program of a graph, which XNNPACK runs.

    Parameters
    ----------
    module : GraphModule
        Of `prepared`, `deployable` or `quantised`.
    name : str
        Of the program in errors.

    Raises
    ------
    UserError
        ExecuTorch is missing, or XNNPACK does not take an operator, which is named.
    """
    require_executorch()
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        (images,) = module.graph.find_nodes(op="placeholder")
        example = torch.zeros(images.meta["val"].shape, dtype=images.meta["val"].dtype)
        program = torch.export.export(module, (example,), strict=False)
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        refuse_undelegated(name, undelegated(edge.exported_program().graph))
        return bytes(edge.to_executorch().buffer)


def undelegated(graph: fx.Graph) -> list[str]:
    """Operators of a lowered graph that no delegate runs, each once."""
    targets = [node.target for node in graph.nodes if node.op == "call_function" and node.target != operator.getitem]
    names = {str(target) for target in targets if not str(target).endswith("call_delegate")}
    return sorted({found[0] if (found := re.search(r"\w+(\.\w+)+", name)) else name for name in names})


def refuse_undelegated(name: str, operators: Sequence[str]) -> None:
    """Raise an error for operators that XNNPACK does not take.

    Raises
    ------
    UserError
        Their names.
    """
    if operators:
        raise UserError(
            f"{name}: XNNPACK does not take {', '.join(operators)}, which would run in slow portable kernels; such a "
            "network is not exported to ExecuTorch yet"
        )


class Runner:
    """A program in ExecuTorch's runtime, as a function of images; no gradient.

    Parameters
    ----------
    path : path
        The `.pte` file.
    threads : int
        CPU threads of the runtime; they are those of all programs in this process.

    Raises
    ------
    UserError
        ExecuTorch is missing.
    """

    def __init__(self, path: str | Path, *, threads: int = 1) -> None:
        require_executorch()
        with quiet():
            from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
            from executorch.runtime import Runtime

            _unsafe_reset_threadpool(threads)
            self.program = Runtime.get().load_program(str(path))  # lives as long as its method
        self.method = self.program.load_method("forward")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes), on the images' device, for float32 images in [0, 1]."""
        single = images.detach().cpu().clone(memory_format=torch.contiguous_format).split(1)  # its strides are checked
        return torch.cat([self.method.execute([image])[0].clone() for image in single]).to(images.device)


def zero_image(net: FoldedNet | FixedNet) -> Tensor:
    """A black image of the network's shape."""
    return torch.zeros(1, net.spec.image_channels, net.spec.image_size, net.spec.image_size)


def _quantise(x: Tensor, scale: float, zero_point: int, low: int, high: int, _: torch.dtype) -> Tensor:
    """Integers as float32, with the gradient of the values."""
    return RoundThrough.apply(x / scale, low - zero_point, high - zero_point) + zero_point


def _dequantise(x: Tensor, scale: float, zero_point: int, *_: Any, **__: Any) -> Tensor:
    """The values of integers, which constants store as such."""
    return (x.to(torch.float32) - zero_point) * scale


STRAIGHT_THROUGH = {
    "quantized_decomposed.quantize_per_tensor.default": _quantise,
    "quantized_decomposed.dequantize_per_tensor.default": _dequantise,
}


def _traced(module: torch.nn.Module, image: Tensor) -> fx.GraphModule:
    """The exported graph as a module; its nodes know their shapes."""
    traced = torch.export.export(module, (image,), strict=False).module(check_guards=False)
    assert isinstance(traced, fx.GraphModule)
    return traced


def _constant(module: fx.GraphModule, node: Any) -> Tensor | None:
    """The value of a node that depends on no image, else None."""
    if not isinstance(node, fx.Node):
        return torch.as_tensor(node) if isinstance(node, int | float) else None
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(module).detach()
    if node.op != "call_function" or not callable(node.target):
        return None
    values = [_constant(module, entry) if isinstance(entry, fx.Node) else entry for entry in node.args]
    return None if any(value is None for value in values) else node.target(*values)


def _fold_normalisation(module: fx.GraphModule, channels: int) -> None:
    """Move per-channel arithmetic on the pixels into the convolutions behind it; other graphs stay as they are."""
    (images,) = module.graph.find_nodes(op="placeholder")
    factor, shift = (torch.full((channels,), value, dtype=torch.float64) for value in (1.0, 0.0))
    last = images
    while len(last.users) == 1 and (node := next(iter(last.users))).target in AFFINE:
        value = _constant(module, node.args[1]) if node.args[0] is last else None
        if value is None or value.numel() not in (1, channels):
            return
        value = value.double().flatten()
        if node.target in (aten.mul.Tensor, aten.div.Tensor):
            factor, shift = node.target(factor, value), node.target(shift, value)
        else:
            shift = node.target(shift, value)
        last = node
    if last is images or any(node.target != aten.conv2d.default or _groups(node) != 1 for node in last.users):
        return
    with module.graph.inserting_before(next(iter(images.users))):
        padded = module.graph.call_function(aten.constant_pad_nd.default, (images, [0, 0, 0, 0, 0, 1], 1.0))
    for place, node in enumerate(list(last.users)):
        weight = _constant(module, node.args[1])
        assert weight is not None
        ones = torch.einsum("oihw,i->ohw", weight.double(), shift)[:, None]
        weight = torch.cat([weight.double() * factor[:, None, None], ones], 1).float().contiguous()
        module.register_buffer(name := f"folded_weight{place}", weight)
        with module.graph.inserting_before(node):
            node.args = (padded, module.graph.get_attr(name), *node.args[2:])


def _groups(node: fx.Node) -> int:
    """Groups of a convolution."""
    return int(node.args[6]) if len(node.args) > 6 else 1  # type: ignore[arg-type]


def _fix_pixels(module: fx.GraphModule) -> None:
    """Give the pixels, and the channel of ones beside them, the scale of 8-bit images."""
    (images,) = module.graph.find_nodes(op="placeholder")
    found = [images]
    for node in found:
        for user in list(node.users):
            name = str(user.target)
            if name.startswith("quantized_decomposed.") and "per_tensor" in name:
                user.args = (user.args[0], PIXEL, -128, *user.args[3:])
            elif user.target != aten.constant_pad_nd.default:
                continue
            found.append(user)
    module.recompile()
