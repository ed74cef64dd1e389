"""Several processes that train one network: the part of a batch that each one computes, and sums over all.

One process a device, started by torchrun. All hold the same weights, draw the same archs, crops and noise for the
whole batch, and look at their own part of it. Whatever depends on more than one image (gradients, batch-norm
statistics, scores, what a loss remembers) is added up over all, so that a step is the one that a single process makes,
up to the order of sums.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from proard.config import UserError
from proard.losses import Batch

PATIENCE = timedelta(days=7)  # one process may validate for hours; one that dies is noticed by its closed connection
REMEMBERED = ("labels", "clean", "teacher", "adv", "teacher_adv", "control")  # what memories of losses are made of


class Gone(UserError):
    """Another process of the training has ended."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a training and the number of this one among them."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which holds the lock, saves, prints and writes."""
        return self.rank == 0

    def part(self, count: int) -> BatchPart:
        """The part of this process of batches of `count` images.

        Raises
        ------
        UserError
            There are fewer images than processes.
        """
        if self.world == 1:
            return BatchPart()
        if count < self.world:
            raise UserError(
                f"{self.world} processes cannot share a batch of {count} images; raise batch_size or ask for fewer GPUs"
            )
        start, stop = (rank * count // self.world for rank in (self.rank, self.rank + 1))
        return BatchPart(self, slice(start, stop), count)

    def add_(self, tensor: Tensor) -> Tensor:
        """Sum of all processes' tensors, in place; the order of the processes is always the same."""
        if self.world > 1:
            _together(dist.all_reduce, tensor)
        return tensor

    def all_reduce_max(self, *values: int) -> list[int]:
        """Largest value over all processes, one by one: a signal that reached one process is seen by all."""
        if self.world == 1:
            return list(values)
        numbers = torch.tensor(values)
        _together(dist.all_reduce, numbers, op=dist.ReduceOp.MAX)
        return numbers.tolist()

    def follow_first_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of the first process."""
        if self.world == 1:
            return
        for tensor in tensors:
            dense = tensor.detach().contiguous().clone()
            _together(dist.broadcast, dense, src=0)
            tensor.detach().copy_(dense)

    def from_first(self, value: Any) -> Any:
        """What the first process passed; any object made of plain ones."""
        if self.world == 1:
            return value
        box = [value]
        _together(dist.broadcast_object_list, box, src=0)
        return box[0]

    def divided(self, jobs: Sequence[Any], do: Callable[[Any], Any]) -> list[Any]:
        """Results of all jobs in their order, each done by one process, as plain objects on all of them."""
        own = [do(job) for job in jobs[self.rank :: self.world]]
        if self.world == 1:
            return own
        found: list[Any] = [None] * self.world
        _together(dist.all_gather_object, found, own)
        return [found[index % self.world][index // self.world] for index in range(len(jobs))]

    def exit_unless_first(self) -> None:
        """End the process group. Only rank 0 returns; the other processes exit here.

        Raises
        ------
        SystemExit
            On all but the first.
        """
        if self.world > 1:
            self.all_reduce_max(0)  # nobody leaves while another one still needs it
            dist.destroy_process_group()
        if not self.first:
            raise SystemExit(0)


@dataclass(frozen=True)
class BatchPart:
    """One process's part of every batch of `count` images; alone, all of a batch of any size."""

    ranks: Ranks = Ranks()
    rows: slice = field(default_factory=lambda: slice(None))
    count: int = 1

    @property
    def several(self) -> bool:
        """Whether there are other parts."""
        return self.ranks.world > 1

    @property
    def weight(self) -> float:
        """Images of this part over images of the batch: a mean over the batch is the weighted sum of the parts'."""
        return (self.rows.stop - self.rows.start) / self.count if self.several else 1.0

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over all processes; the argument stays as it is."""
        return self.ranks.add_(tensor.detach().clone()) if self.several else tensor

    def totals(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The same of several tensors in one collective."""
        if not self.several:
            return tensors
        sums = self.total(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        parts = sums.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the batch of what is given as the mean over each part."""
        return self.total(value * self.weight) if self.several else value

    def whole(self, tensor: Tensor) -> Tensor:
        """The rows of all parts in the batch's order, of shape (count, ...), on every process."""
        if not self.several:
            return tensor
        full = tensor.new_zeros((self.count, *tensor.shape[1:]))
        full[self.rows] = tensor.detach()
        return self.ranks.add_(full)

    def whole_batch(self, batch: Batch) -> Batch:
        """The labels and logits of all parts, without graph: what a loss remembers is the whole batch's."""
        if not self.several:
            return batch
        fields: dict[str, Any] = {name: getattr(batch, name) for name in REMEMBERED}
        whole: dict[str, Any] = {name: self.whole(value) for name, value in fields.items() if value is not None}
        return replace(batch, **whole)


def join(device: str) -> Ranks:
    """Meet the other processes where torchrun started several; each takes the GPU of its number.

    Raises
    ------
    UserError
        There are fewer GPUs than processes.
    """
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if world == 1:
        return Ranks()
    backend = "gloo"
    if device.startswith("cuda"):
        gpus, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", world))
        if gpus < wanted:
            raise UserError(
                f"{wanted} processes were started, one a GPU, but torch sees {gpus}; "
                "ask for as many GPUs as processes, or use --device cpu"
            )
        torch.cuda.set_device(local)
        enter_backward_thread(device)
        backend = "cpu:gloo,cuda:nccl"
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):  # one machine: its name need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=PATIENCE)
    return Ranks(dist.get_rank(), world)


def enter_backward_thread(device: str) -> None:
    """Run a tiny backward pass, so that the thread of a GPU's backward passes has the GPU's context from then on.

    torch starts that thread without one and binds it with the first kernel launched from there. Where a matrix product
    comes first, as the classifier's gradient does, cuBLAS finds none, and torch warns.
    """
    torch.ones((), device=device, requires_grad=True).mul(2).backward()  # its gradient is a kernel of torch's own


def _together(collective: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Call a collective; that another process is gone is an error that a user can understand."""
    try:
        collective(*args, **options)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise Gone(
            "another process of this training is gone; the same command continues from the newest state, where one was "
            f"saved ({reason})"
        ) from None
