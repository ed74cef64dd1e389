"""CUDA graphs of an attack's step: captured once for a network's shape, replayed for every step of every batch.

One step is what a graph holds. It is captured right after the first step ran eagerly, so that a network met for the
first time pays one pass of host time and no extra arithmetic, and the number of steps may change from call to call.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TakeSteps = Callable[..., Tensor]
Replay = Callable[[], object]


class CudaCapture:
    """Records what a function launches; all graphs share one memory pool, as no two of them ever overlap.

    `torch.cuda.graph` would also wait for the device and return all cached memory to the driver at every capture.
    """

    def __init__(self) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, body: Callable[[], object]) -> Replay:
        """Capture `body`, which must have run before, and give what replays it; nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                body()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph.replay


@dataclass
class Captured:
    """A graph with the tensors that it reads and writes, always the same ones."""

    predict: nn.Module
    objective: Any
    images: list[Tensor]  # iterate, lower and upper bound
    replay: Replay | None = None

    def load(self, predict: nn.Module, objective: Any, images: list[Tensor]) -> None:
        """Copy weights, target and images to where the graph reads them."""
        own = [*self.predict.buffers(), *tensors_of(self.objective).values(), *self.images]
        new = [*predict.buffers(), *tensors_of(objective).values(), *images]
        torch._foreach_copy_(own, new)


class CapturedSteps:
    """An attack's loop that replays a captured step, or runs as it is where there is nothing to gain.

    Parameters
    ----------
    take_steps : callable
        The eager loop: `take_steps(predict, objective, adv, low, high, step_size=..., num_steps=...)` changes `adv` in
        place and returns it.
    batch_size : int
        Batches of another size are ragged: they run eagerly, as do networks that are no module of buffers alone and
        tensors that are not on a GPU.
    capacity : int
        Graphs kept; the one unused for longest goes first. Each holds a copy of its weights and of one batch.
    capture : callable, optional
        Turns a function into what replays it. The default makes CUDA graphs; another one serves any device.
    """

    def __init__(
        self,
        take_steps: TakeSteps,
        *,
        batch_size: int,
        capacity: int = 16,
        capture: Callable[[Callable[[], object]], Replay] | None = None,
    ) -> None:
        self.take_steps, self.batch_size, self.capacity, self.capture = take_steps, batch_size, capacity, capture
        self.any_device = capture is not None
        self.graphs: OrderedDict[Hashable, Captured] = OrderedDict()

    def __call__(
        self,
        predict: Callable[[Tensor], Tensor],
        objective: Any,
        adv: Tensor,
        low: Tensor,
        high: Tensor,
        *,
        step_size: float,
        num_steps: int,
    ) -> Tensor:
        """The iterate after `num_steps` steps; `adv` may be used up."""
        images = [adv, low, high]
        key = self._key(predict, objective, images, step_size) if num_steps > 0 else None
        if key is None:
            return self.take_steps(predict, objective, adv, low, high, step_size=step_size, num_steps=num_steps)
        graph = self.graphs.pop(key, None)
        known = graph is not None
        if graph is None:
            graph = Captured(copy.deepcopy(predict), _own_tensors(objective), [x.clone() for x in images])
        else:
            graph.load(predict, objective, images)

        def step() -> None:
            self.take_steps(graph.predict, graph.objective, *graph.images, step_size=step_size, num_steps=1)

        if not known:
            step()  # the first step of this very attack, and what a capture wants to have run before it
            self.capture = self.capture or CudaCapture()
            graph.replay = self.capture(step)
        self.graphs[key] = graph
        if len(self.graphs) > self.capacity:  # never the last one, with which the shared pool would go
            self.graphs.popitem(last=False)
        for _ in range(num_steps - (not known)):
            graph.replay()
        return graph.images[0].clone()

    def _key(self, predict: Any, objective: Any, images: list[Tensor], step_size: float) -> Hashable | None:
        """What a graph depends on beyond the contents of tensors; None where the loop is to run eagerly."""
        if not (self.any_device or images[0].is_cuda) or len(images[0]) != self.batch_size:
            return None
        if not isinstance(predict, nn.Module) or any(True for _ in predict.parameters()):
            return None
        tensors = {**dict(predict.named_buffers()), **tensors_of(objective)}
        described = ((name, _description(tensor)) for name, tensor in tensors.items())
        constants = tuple((name, value) for name, value in vars(objective).items() if not isinstance(value, Tensor))
        key = (
            type(predict),
            getattr(predict, "spec", None),  # layers of equal shapes may still be put together differently
            type(objective),
            constants,
            tuple(described),
            tuple(_description(image) for image in images),
            step_size,
        )
        try:
            hash(key)
        except TypeError:  # an objective that keeps more than tensors and plain constants
            return None
        return key


def tensors_of(objective: Any) -> dict[str, Tensor]:
    """The tensors that an objective keeps, by name."""
    return {name: value for name, value in vars(objective).items() if isinstance(value, Tensor)}


def _own_tensors(objective: Any) -> Any:
    """An objective of the same kind with copies of its tensors."""
    own = copy.copy(objective)
    for name, tensor in tensors_of(objective).items():
        setattr(own, name, tensor.clone())
    return own


def _description(tensor: Tensor) -> Hashable:
    """Everything about a tensor but its numbers."""
    return tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()
