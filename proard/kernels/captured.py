"""CUDA graphs of an attack step, captured once per network shape and replayed for every step of every batch.

A graph contains one step. It is captured directly after the first step ran eagerly. A new network thus costs one more
pass of host time but no extra arithmetic, and the number of steps may differ between calls. For attacks of few steps,
the graph is captured when their network occurs for the second time.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TakeSteps = Callable[..., Tensor]
Replay = Callable[[], object]
PAYS = 3  # replays in one call from which a capture is worth its cost, even if the network never occurs again


class CudaCapture:
    """Records the launches of a function; all graphs share one memory pool, because they never run at the same time.

    `torch.cuda.graph` would also wait for the device and return all cached memory to the driver at every capture; here
    that happens where memory is short.
    """

    def __init__(self) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, body: Callable[[], object]) -> Replay:
        """Capture `body`, which must have run before, and return the function that replays it; nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        if torch.cuda.mem_get_info()[0] < torch.cuda.max_memory_allocated():
            torch.cuda.empty_cache()  # while a graph is captured, the allocator frees nothing by itself
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
        """Copy weights, target and images to the tensors that the graph reads."""
        own = [*self.predict.buffers(), *tensors_of(self.objective).values(), *self.images]
        new = [*predict.buffers(), *tensors_of(objective).values(), *images]
        grouped: dict[Hashable, tuple[list[Tensor], list[Tensor]]] = {}
        for target, source in zip(own, new, strict=True):  # a fused copy needs one type of source and one of target
            targets, sources = grouped.setdefault((source.dtype, target.dtype), ([], []))
            targets.append(target)
            sources.append(source)
        for targets, sources in grouped.values():
            torch._foreach_copy_(targets, sources)


class Graphs:
    """Graphs by key, at most so many, and the keys that have occurred.

    Parameters
    ----------
    capacity : int
        Maximum number of graphs; the least recently used one is removed first.
    remembered : int
        Maximum number of keys whose first occurrence is remembered.
    capture : callable, optional
        Converts a function into one that replays it. The default makes CUDA graphs; others may support other devices.

    Notes
    -----
    If a capture fails, a warning gives the reason, and everything runs eagerly from then on.
    """

    def __init__(
        self,
        *,
        capacity: int = 16,
        remembered: int = 100_000,
        capture: Callable[[Callable[[], object]], Replay] | None = None,
    ) -> None:
        self.capacity, self.remembered, self.capture = capacity, remembered, capture
        self.any_device = capture is not None
        self.graphs: OrderedDict[Hashable, Any] = OrderedDict()
        self.met: OrderedDict[int, None] = OrderedDict()  # hashes of keys, the newest last
        self.failed = False

    def met_before(self, key: Hashable) -> bool:
        """Whether a key has occurred; from now on it has."""
        mark = hash(key)
        again = mark in self.met
        self.met[mark] = None
        self.met.move_to_end(mark)
        if len(self.met) > self.remembered:
            self.met.popitem(last=False)
        return again

    def record(self, body: Callable[[], object], what: str) -> Replay | None:
        """The function that replays `body`, which has run before; None, with a warning, if its capture fails."""
        try:
            self.capture = self.capture or CudaCapture()
            return self.capture(body)
        except RuntimeError as error:
            warnings.warn(f"{what} run eagerly, because their capture failed: {error}", stacklevel=4)
            self.failed = True
            self.graphs.clear()  # no further capture uses their pool
            return None

    def keep(self, key: Hashable, graph: Any) -> None:
        """Keep a graph as the most recently used one."""
        self.graphs[key] = graph
        self.graphs.move_to_end(key)
        if len(self.graphs) > self.capacity:  # never the last one, because the shared pool would be freed with it
            self.graphs.popitem(last=False)


class CapturedSteps(Graphs):
    """An attack's loop that replays a captured step, or runs eagerly if that is not slower.

    Parameters
    ----------
    take_steps : callable
        The eager loop: `take_steps(predict, objective, adv, low, high, step_size=..., num_steps=...)` changes `adv` in
        place and returns it.
    batch_size : int
        Batches of another size run eagerly. So do networks that are not a module with only buffers, and tensors that
        are not on a GPU.
    **how
        As for `Graphs`; each graph contains a copy of its weights and of one batch.
    """

    def __init__(self, take_steps: TakeSteps, *, batch_size: int, **how: Any) -> None:
        super().__init__(**how)
        self.take_steps, self.batch_size = take_steps, batch_size

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
        """The iterate after `num_steps` steps; `adv` may be overwritten."""
        images = [adv, low, high]
        key = self._key(predict, objective, images, step_size) if num_steps > 0 and not self.failed else None
        graph, replays = None, num_steps
        if key is None:
            return self.take_steps(predict, objective, adv, low, high, step_size=step_size, num_steps=num_steps)
        assert isinstance(predict, nn.Module)  # only modules have a key
        if key in self.graphs:
            graph = self.graphs[key]
            graph.load(predict, objective, images)
        elif self.met_before(key) or num_steps - 1 >= PAYS:
            graph, replays = self._captured(predict, objective, images, step_size), num_steps - 1
        if graph is None:
            return self.take_steps(predict, objective, adv, low, high, step_size=step_size, num_steps=num_steps)
        self.keep(key, graph)
        assert graph.replay is not None
        for _ in range(replays):
            graph.replay()
        return graph.images[0].clone()

    def _captured(self, predict: nn.Module, objective: Any, images: list[Tensor], step_size: float) -> Captured | None:
        """A graph that has taken the first step of this attack; None, with a warning, if the capture fails."""
        graph = Captured(copy.deepcopy(predict), _own_tensors(objective), [x.clone() for x in images])

        def step() -> None:
            self.take_steps(graph.predict, graph.objective, *graph.images, step_size=step_size, num_steps=1)

        step()  # a capture needs a run before it
        graph.replay = self.record(step, "attack steps")
        if graph.replay is None:  # the inputs are unchanged: the attack runs eagerly from its start
            return None
        return graph

    def _key(self, predict: Any, objective: Any, images: list[Tensor], step_size: float) -> Hashable | None:
        """Everything a graph depends on except the values of tensors; None if the loop must run eagerly."""
        if not (self.any_device or images[0].is_cuda) or len(images[0]) != self.batch_size:
            return None
        if not isinstance(predict, nn.Module) or any(True for _ in predict.parameters()):
            return None
        tensors = {**dict(predict.named_buffers()), **tensors_of(objective)}
        described = ((name, _description(tensor)) for name, tensor in tensors.items())
        constants = tuple((name, value) for name, value in vars(objective).items() if not isinstance(value, Tensor))
        key = (
            type(predict),
            getattr(predict, "spec", None),  # layers of equal shapes may be connected differently
            type(objective),
            constants,
            tuple(described),
            tuple(_description(image) for image in images),
            step_size,
        )
        try:
            hash(key)
        except TypeError:  # an objective with attributes other than tensors and constants
            return None
        return key


class CapturedCalls(Graphs):
    """Functions of tensors that recur, each replayed as one graph.

    A function may change tensors in place that exist before it, always the same ones; all else that it reads or
    returns goes through its arguments and results. What it does on the host happens when it runs and when it is
    recorded, not when it is replayed.
    """

    def __call__(
        self, key: Hashable, body: Callable[[dict[str, Tensor]], dict[str, Tensor]], given: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """`body(given)`; the first call with a key runs it and records it, later ones replay what was recorded."""
        known = self.graphs.get(key)
        if known is None:
            results = body(given)
            if not self.failed:
                self._record(key, body, given, results)
            return results
        inputs, results, replay = known
        torch._foreach_copy_(list(inputs.values()), [given[name] for name in inputs])
        self.graphs.move_to_end(key)
        replay()
        return {name: result.clone() for name, result in results.items()}

    def _record(
        self,
        key: Hashable,
        body: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        given: dict[str, Tensor],
        found: dict[str, Tensor],
    ) -> None:
        """Capture a function on tensors that stay where they are."""
        inputs = {name: tensor.clone() for name, tensor in given.items()}
        results = {name: torch.empty_like(tensor) for name, tensor in found.items()}

        def again() -> None:
            for name, tensor in body(inputs).items():
                results[name].copy_(tensor)

        replay = self.record(again, "training steps")
        if replay is not None:
            self.keep(key, (inputs, results, replay))


def tensors_of(objective: Any) -> dict[str, Tensor]:
    """The tensors of an objective, by name."""
    return {name: value for name, value in vars(objective).items() if isinstance(value, Tensor)}


def _own_tensors(objective: Any) -> Any:
    """An objective of the same kind with copies of its tensors."""
    own = copy.copy(objective)
    for name, tensor in tensors_of(objective).items():
        setattr(own, name, tensor.clone())
    return own


def _description(tensor: Tensor) -> Hashable:
    """Shape, type, layout and device of a tensor, without its values."""
    return tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()
