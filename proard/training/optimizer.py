"""The optimizer of a training, its state created up front so that a resumed training finds every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from operator import not_
from typing import Any

import torch
from torch import Tensor, nn

from proard.config.settings import Optimisation
from proard.training.muon import Muon

STATE = {"momentum_buffer": "momentum", "exp_avg": "momentum", "exp_avg_sq": "square", "step": "steps"}


def make_optimizer(parameters: Mapping[str, nn.Parameter], settings: Optimisation) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, AdamW with `momentum` as its first decay rate, or Muon.

    Norms, biases and kernel transforms (the identity at first) are spared weight decay. Muon orthogonalises and decays
    the weights of convolutions over several channels; all else moves by SGD at the same rate, without decay.
    """
    groups: list[dict[str, Any]]
    if settings.optimizer == "muon":
        matrix = [p.ndim == 4 and p.shape[1] > 1 for p in parameters.values()]
        matrices, others = (list(compress(parameters.values(), kept)) for kept in (matrix, map(not_, matrix)))
        groups = [{"params": matrices, "orthogonal": True, "weight_decay": settings.weight_decay}, {"params": others}]
        return Muon([group for group in groups if group["params"]], momentum=settings.momentum)
    spared = [p.ndim == 1 or ".transforms." in name for name, p in parameters.items()]
    plain, decayed = (list(compress(parameters.values(), kept)) for kept in (spared, map(not_, spared)))
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        adam = torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.momentum, 0.999), fused=True)
        for parameter in parameters.values():
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        return adam
    nesterov = settings.momentum > 0
    sgd = torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov, fused=True)
    if settings.momentum > 0:  # created up front: fused SGD fails when a first gradient comes later than others
        for parameter in parameters.values():
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state by kind (`momentum`, `square`, `steps`) and by the parameter's name."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        for key, tensor in optimizer.state[parameter].items():
            found.setdefault(STATE[key], {})[name] = tensor
    return found
