"""Muon: convolutions move by orthogonalised momentum, all else by SGD."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that pulls singular values to about 1, in few steps


class Muon(torch.optim.Optimizer):
    """Nesterov momentum; in groups with `orthogonal`, its matrix is replaced by the nearest semi-orthogonal one.

    A weight of shape (out, in, height, width) counts as the matrix of shape (out, in * height * width).

    Parameters
    ----------
    groups : iterable of dict
        Parameters with gradients of their own, `lr`, `weight_decay` (decoupled where `orthogonal`, else added to the
        gradient, as SGD has it) and `orthogonal`.
    momentum : float
        Share of the old momentum that is kept.

    Notes
    -----
    `found_inf`, a tensor of shape (), keeps everything as it is where it is not 0; the host never reads it. A matrix
    with more rows than columns moves sqrt(rows / columns) times as far, as in the authors' code. The step is computed
    in float32; matrices of equal shape are orthogonalised together. `torch.optim.Muon` takes the same steps, but of
    parameters with two axes only, one by one, and without `found_inf`.

    References
    ----------
    Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024, kellerjordan.github.io/posts/muon.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, momentum: float) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "orthogonal": False, "momentum": momentum})
        self.found_inf: Tensor | None = None
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # there is no loss to return
        """Move every parameter along its gradient's momentum."""
        for group in self.param_groups:
            parameters = group["params"]
            if not parameters:
                continue
            alive = 1.0 if self.found_inf is None else 1 - self.found_inf
            gradients = [parameter.grad for parameter in parameters]
            if self.found_inf is not None:
                gradients = [torch.where(self.found_inf > 0, 0, gradient) for gradient in gradients]
            lr, decay, momentum = group["lr"] * alive, group["weight_decay"], group["momentum"]
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            if not group["orthogonal"] and decay:
                gradients = list(torch._foreach_add(gradients, parameters, alpha=decay))
            torch._foreach_mul_(buffers, 1 + alive * (momentum - 1))
            torch._foreach_add_(buffers, torch._foreach_mul(gradients, alive))
            directions = list(torch._foreach_add(gradients, buffers, alpha=momentum))
            if group["orthogonal"]:
                directions = orthogonalised(directions)
                torch._foreach_mul_(parameters, 1 - lr * decay)
            torch._foreach_sub_(parameters, torch._foreach_mul(directions, lr))


def orthogonalised(weights: list[Tensor], steps: int = 5) -> list[Tensor]:
    """Each weight's matrix U S V^T as about U V^T, times sqrt(rows / columns) where that is above 1.

    Singular values end between 0.7 and 1.2 where they were above a hundredth of the matrix's norm.
    """
    a, b, c = COEFFICIENTS
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, weight in enumerate(weights):
        by_shape.setdefault((len(weight), weight[0].numel()), []).append(index)
    found: list[Tensor] = [weights[0]] * len(weights)
    for (rows, columns), indices in by_shape.items():
        matrices = torch.stack([weights[index].reshape(rows, columns) for index in indices])
        wide = matrices.mT if rows > columns else matrices
        wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(steps):
            gram = wide @ wide.mT
            wide = a * wide + (b * gram + c * gram @ gram) @ wide
        matrices = (wide.mT if rows > columns else wide) * max(1.0, rows / columns) ** 0.5
        for index, matrix in zip(indices, matrices, strict=True):
            found[index] = matrix.reshape(weights[index].shape)
    return found
