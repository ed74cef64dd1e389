"""Memory of the activations of one image: a lower bound by liveness, and the block in which onnxruntime places them."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proard.space.parts import Node

IMAGES = "images"  # the map that enters
IN_PLACE = ("Relu", "Clip", "HardSwish", "HardSigmoid", "Sigmoid", "Mul", "Add", "Unsqueeze", "Flatten")
IN_PLACE_THERE = ("Relu", "Clip", "HardSigmoid")  # in onnxruntime, which gives sums and products a map of their own
VIEWS = ("Unsqueeze", "Flatten")
ALIGNMENT = 256  # of every map in onnxruntime, in bytes


def peak(nodes: Sequence[Node], entering: int) -> int:
    """Largest sum of the bytes of the maps that exist at the same time.

    Parameters
    ----------
    nodes : sequence of Node
        In order of execution.
    entering : int
        Bytes of the map `images`, which exists until its last reader is done; 0 where the caller holds it elsewhere.

    Notes
    -----
    A map exists from the operator that writes it to the last that reads it. An element-wise operator writes over an
    input of equal size that nothing else reads later. Scratch memory of an operator's implementation is not counted.
    """
    last = {name: index for index, node in enumerate(nodes) for name in node.reads}
    live, most = {IMAGES: entering}, entering
    for index, node in enumerate(nodes):
        ending = [name for name in dict.fromkeys(node.reads) if last[name] == index]
        reused = [name for name in ending if node.kind in IN_PLACE and live[name] == node.bytes]
        if reused:
            del live[reused[0]]
        live[node.output] = node.bytes
        most = max(most, sum(live.values()))
        for name in ending:
            live.pop(name, None)
    return most


def arena(nodes: Sequence[Node]) -> int:
    """Bytes of the block in which onnxruntime places all maps of one image.

    Parameters
    ----------
    nodes : sequence of Node
        Of a part, its last operator at the end.

    Notes
    -----
    What its allocation planner and its memory pattern planner do on a CPU, for every level of graph optimisation except
    the highest, which on x86 pads channels to the width of the vector registers. The second run of a session allocates
    this block. The input and the output are the caller's, and scratch memory of convolutions lies beside the block.

    1. Of two branches, the one whose last operator is listed later is executed first.
    2. A map takes the buffer of an input only in `IN_PLACE_THERE`, where nothing else reads it later. Otherwise it
       takes a buffer of equal shape that is no longer read, the last freed first. A buffer exists from its first map to
       the last reader of its last map, also while none of its maps is needed.
    3. In order of execution, a buffer is placed in the smallest gap that holds it, also that between the last buffer
       and the end of the block; without one, behind the last buffer.
    """
    live: list[tuple[int, int, int]] = []  # start, end, last step of the buffers, by start
    most = 0
    for buffer in _buffers(_executed(nodes)):
        live = [entry for entry in live if entry[2] >= buffer.first]
        size = -(-buffer.bytes // ALIGNMENT) * ALIGNMENT
        ends = [0, *(end for _, end, _ in live)]
        starts = [*(start for start, _, _ in live), most]
        gaps = [(start - end, end) for end, start in zip(ends, starts, strict=True)]
        _, start = min((gap for gap in gaps if gap[0] >= size), default=(0, ends[-1]))
        insort(live, (start, start + size, buffer.last))
        most = max(most, start + size)
    return most


@dataclass
class _Buffer:
    """Memory that several maps of one shape take in turn.

    Attributes
    ----------
    first, last : int
        Steps of the first writer and of the last reader.
    readers : int
        Of its maps until now, those that are still to come.
    """

    shape: tuple[int, ...]
    bytes: int
    first: int
    last: int
    readers: int = 0


def _executed(nodes: Sequence[Node]) -> list[Node]:
    """The operators in onnxruntime's order: depth first from the last one, the later of two branches first."""
    nodes = _kernels(nodes)
    index = {node.output: place for place, node in enumerate(nodes)}
    order: dict[int, None] = {}
    left = [(len(nodes) - 1, False)]
    while left:
        place, inputs_done = left.pop()
        if inputs_done:
            order[place] = None
        elif place not in order:
            inputs = sorted({index[name] for name in nodes[place].reads if name in index})
            left += [(place, True), *((before, False) for before in inputs)]
    return [nodes[place] for place in order]


def _kernels(nodes: Sequence[Node]) -> list[Node]:
    """The operators that onnxruntime has kernels for: two for a HardSwish, one for a product with its own sigmoid."""
    gates = {node.output: node for node in nodes if node.kind == "Sigmoid"}
    found: list[Node] = []
    for node in nodes:
        own = next((name for name in node.reads if name in gates and gates[name].reads[0] in node.reads), None)
        if node.kind == "HardSwish":
            gate = replace(node, kind="HardSigmoid", output=f"{node.output}_gate")
            found += [gate, replace(node, kind="Mul", reads=(*node.reads, gate.output))]
        elif node.kind == "Mul" and own is not None:
            found = [each for each in found if each.output != own]
            found.append(replace(node, kind="QuickGelu", reads=gates[own].reads))
        else:
            found.append(node)
    return found


def _buffers(nodes: Sequence[Node]) -> list[_Buffer]:
    """The buffers of all maps between the input and the output, in order of their first use."""
    readers = Counter(name for node in nodes for name in node.reads)
    of: dict[str, _Buffer] = {IMAGES: _Buffer((), 0, 0, 0, readers=readers[IMAGES] + 1)}  # the caller's: never free
    shapes: dict[str, tuple[int, ...]] = {}
    found: list[_Buffer] = []
    free: list[_Buffer] = []  # the last freed at the end
    for step, node in enumerate(nodes):
        if step + 1 < len(nodes):
            source, same = of[node.reads[0]], shapes.get(node.reads[0]) == node.shape
            if node.kind in VIEWS or (node.kind in IN_PLACE_THERE and same and source.readers == 1):
                buffer = source
            else:
                alike = [place for place, each in enumerate(free) if each.shape == node.shape]
                buffer = free.pop(alike[-1]) if alike else _Buffer(node.shape, node.bytes, step, step)
                if not alike:
                    found.append(buffer)
            buffer.readers += readers[node.output]
            of[node.output], shapes[node.output] = buffer, node.shape
        for name in node.reads:
            buffer = of[name]
            buffer.readers, buffer.last = buffer.readers - 1, step
            if not buffer.readers:
                free.append(buffer)
    return found
