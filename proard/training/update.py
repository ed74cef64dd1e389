"""The state that a step changes: weights, momentum, averages. A step whose loss is not finite changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from proard.config import UserError
from proard.config.settings import Optimisation
from proard.nets import FixedNet
from proard.nets.modules import present
from proard.nets.trainee import Trainee
from proard.space import FixedSpec, NetSpec
from proard.training.guard import Guard, flat
from proard.training.optimizer import make_optimizer, optimizer_tensors
from proard.training.ranks import BatchPart
from proard.training.sync import GradientSync


class Update:
    """Optimizer, guard against losses that are not finite, and the exponential average of the weights.

    Within a step: `begin`, then gradients are added to the network's, then one call.

    Parameters
    ----------
    net : Supernet or FixedNet
        Changed in place.
    settings : Optimisation
        Optimizer, decays, clipping.
    memory : dict of Tensor
        What the loss keeps from step to step; put back, too, where a step fails.
    part : BatchPart, optional
        The part of every batch that this process is given.

    Raises
    ------
    UserError
        Several processes and a fixed network with batch norm.
    """

    def __init__(
        self,
        net: Trainee,
        settings: Optimisation,
        *,
        memory: dict[str, Tensor] | None = None,
        part: BatchPart | None = None,
    ) -> None:
        part = part or BatchPart()
        if part.several and isinstance(net, FixedNet) and net.norms():
            raise UserError(
                "batch norm over several processes is that of elastic networks; train this one in one process"
            )
        self.net, self.settings, self.memory, self.part = net, settings, memory or {}, part
        self.parameters = dict(net.named_parameters())
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = make_optimizer(self.parameters, settings)
        self.guard = Guard(net.mean.device)
        self.optimizer.found_inf = self.guard.failed  # type: ignore[attr-defined]  # fused optimizers read it
        self.sync = GradientSync(net, part.ranks) if part.several else None
        self.statistics = [buffer for name, buffer in net.named_buffers() if "running" in name]
        self.statistics += self.memory.values()
        self.before = flat(self.statistics)
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.best = {name: value.clone() for name, value in self.average.items()}

    def begin(self) -> None:
        """Start a step: gradients are zero, statistics are remembered."""
        torch._foreach_zero_([present(parameter.grad) for parameter in self.parameters.values()])
        self.before = flat(self.statistics)

    def __call__(
        self, loss: Tensor, right: Sequence[Tensor], specs: Iterable[NetSpec | FixedSpec], *, lr: float, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """End a step: one optimizer step, unless loss or gradient are not finite.

        Parameters
        ----------
        loss : Tensor of shape ()
            Mean loss of this process's part.
        right : two Tensors of shape ()
            Correct clean and adversarial images of this part.
        specs : iterable of NetSpec
            The subnets whose gradients were added.
        lr : float
            Learning rate.
        step : int
            Its number.

        Returns
        -------
        three Tensors of shape ()
            Loss and correct images of the whole batch.
        """
        clean, robust = right
        if self.sync is not None:
            loss, clean, robust = self.sync(specs, torch.stack([loss * self.part.weight, clean, robust]))
        parameters = list(self.parameters.values())
        self.guard.watch(loss, step, [present(parameter.grad) for parameter in parameters])
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self._move_average(step)
        self.guard.restore_(self.statistics, self.before)
        return loss, clean, robust

    @torch.no_grad()
    def _move_average(self, step: int) -> None:
        """Exponential average of the weights; its decay grows to `ema_decay` during the first steps."""
        decay = min(self.settings.ema_decay, (1 + step) / (10 + step))
        average, weight = list(self.average.values()), self.guard.alive * (1 - decay)
        torch._foreach_lerp_(average, list(self.parameters.values()), [weight.to(average[0].dtype)] * len(average))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the network holds the averaged weights."""
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(kept)

    def remember_best(self) -> None:
        """Keep a copy of the averaged weights."""
        for name, value in self.average.items():
            self.best[name].copy_(value)

    def keep_best(self) -> None:
        """Put the best averaged weights into the network and drop the gradients."""
        self._write(self.best)
        for parameter in self.parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a resumed training needs, by kind and name."""
        groups = {"net": self.net.state_dict(), "average": self.average, "best": self.best}
        return groups | {"momentum": {}, **optimizer_tensors(self.optimizer, self.parameters)} | {"memory": self.memory}

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        """Copy values into the parameters."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
