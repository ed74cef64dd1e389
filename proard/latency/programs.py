"""ExecuTorch programs of parts of networks: the operators of an exported student, with any weights."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from proard.export.executorch import lowered, prepared, quantised
from proard.latency.graphs import Weights, tensor_shapes
from proard.nets.forward import convolve, run_blocks, run_pooling, with_activation
from proard.space import ConvSpec, Part, key_of

CALIBRATION_MAPS = 4


class PartNet(nn.Module):
    """A part of a network in torch, with weights as of `onnx_file`."""

    def __init__(self, part: Part, weights: Weights) -> None:
        super().__init__()
        self.part = part
        for name, shape in tensor_shapes(part).items():
            self.register_buffer(name, torch.from_numpy(weights(name, shape)))

    def forward(self, x: Tensor) -> Tensor:
        """Maps of shape (1, channels, height, width), or logits at a network's end."""
        values, part = dict(self.named_buffers()), self.part

        def convolved(layer: ConvSpec, x: Tensor) -> Tensor:
            return convolve(layer, x, values[f"{key_of(layer)}_weight"], values[f"{key_of(layer)}_bias"])

        conv = with_activation(convolved)
        if part.of_images:
            x = x * values["scale"] + values["shift"]
        x = run_blocks(part.blocks, x, conv)
        if part.classes:
            x = functional.linear(run_pooling(part.mixer, x, conv), values["head_weight"], values["head_bias"])
        return x


def float_program(part: Part, weights: Weights) -> bytes:
    """A part as a float32 program for one image.

    Parameters
    ----------
    part : Part
        Any part of a network, or a whole one.
    weights : callable
        As of `onnx_file`.

    Raises
    ------
    UserError
        As of `lowered`.
    """
    return lowered(graph_of(part, weights), name=part.key)


def int8_program(part: Part, weights: Weights) -> bytes:
    """A part as an int8 program with random ranges; as of `int8_file`, blocks take and give integers.

    Raises
    ------
    UserError
        As of `lowered`.
    """
    shape = (CALIBRATION_MAPS, part.channels, part.size, part.size)
    module = quantised(graph_of(part, weights), torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    if not part.of_images:
        _take_integers(module.graph)
    if not part.classes:
        _give_integers(module.graph)
    module.recompile()
    return lowered(module, name=part.key)


def call_program() -> bytes:
    """A program that does nearly nothing: its time is that of a call."""
    return lowered(prepared(nn.ReLU(), torch.zeros(1, 1, 1, 1)), name="call")


def graph_of(part: Part, weights: Weights) -> fx.GraphModule:
    """A part's graph, as that of a student is before it is lowered."""
    return prepared(PartNet(part, weights), torch.zeros(1, part.channels, part.size, part.size))


def _take_integers(graph: fx.Graph) -> None:
    """Let the input be what its quantisation gives, where nothing else reads it."""
    (maps,) = graph.find_nodes(op="placeholder")
    if len(maps.users) == 1 and "quantize_per_tensor" in str(node := next(iter(maps.users))):
        node.replace_all_uses_with(maps)
        graph.erase_node(node)
        maps.meta["val"] = maps.meta["val"].to(torch.int8)


def _give_integers(graph: fx.Graph) -> None:
    """Let the output be what is dequantised at the end."""
    (last,) = graph.output_node().all_input_nodes
    if "dequantize_per_tensor" in str(last):
        graph.output_node().replace_input_with(last, last.all_input_nodes[0])
        graph.eliminate_dead_code()
