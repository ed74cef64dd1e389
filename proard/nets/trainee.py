"""Protocols of a network in a training step: a supernet, a fixed network, or a wrapper that counts passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from proard.space import NetSpace

Statistics = dict[str, tuple[Tensor, Tensor]]  # batch norm's mean and variance by layer name


class View(Protocol):
    """One subnet with leaf weights of its own, for one training step."""

    @property
    def spec(self) -> Any:
        """Costs and shape; `macs` are the multiply-accumulates of one image."""

    @property
    def weights(self) -> Sequence[Tensor]:
        """Leaves with more than one dim."""

    def __call__(
        self, images: Tensor, *, record: Statistics | None = None, update_running: bool = False, frozen: bool = False
    ) -> Tensor:
        """Logits with batch statistics (training mode)."""

    def running_statistics(self) -> Statistics:
        """The stored statistics."""

    def folded(self, statistics: Statistics, *, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
        """The subnet with batch norm fixed at these statistics."""

    def scatter_gradients(self) -> None:
        """Add the leaves' gradients to the network's and clear them."""


class Trainee(Protocol):
    """A network that a training changes."""

    mean: Tensor

    @property
    def space(self) -> NetSpace:
        """The archs of the network."""

    def view(self, arch: Any, *, total: Callable[[Tensor], Tensor] | None = None) -> View:
        """A subnet with leaf weights of its own; `total` sums over the processes that share the batch."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Weights by name."""

    def named_buffers(self) -> Iterable[tuple[str, Tensor]]:
        """Statistics and constants by name."""

    def state_dict(self) -> dict[str, Any]:
        """All tensors by name."""
