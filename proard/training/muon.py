"""Muon: convolutions move by orthogonalised momentum, all else by SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from proard.kernels.captured import CudaCapture, Replay

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
    capture : callable, optional
        Converts a function into one that replays it. By default a step of parameters on a GPU is one CUDA graph.

    Notes
    -----
    `found_inf`, a tensor of shape (), keeps everything as it is where it is not 0; the host never reads it. A matrix
    with more rows than columns moves sqrt(rows / columns) times as far, as in the authors' code. Matrices of equal
    shape are orthogonalised together, on a GPU in bfloat16, as in the authors' code; all else is float32.
    `torch.optim.Muon` takes the same steps, but of parameters with two axes only, one by one, and without `found_inf`.

    References
    ----------
    Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024, kellerjordan.github.io/posts/muon.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        momentum: float,
        capture: Callable[[Callable[[], object]], Replay] | None = None,
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "orthogonal": False, "momentum": momentum})
        self.found_inf: Tensor | None = None
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        first = self.param_groups[0]["params"][0]
        self.rates = [torch.zeros((), device=first.device) for _ in self.param_groups]
        self.capture = capture or (CudaCapture() if first.is_cuda else None)
        self.replay: Replay | None = None
        self.places: list[int] | None = None  # of what the graph reads besides

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # there is no loss to return
        """Move every parameter along its gradient's momentum."""
        for rate, group in zip(self.rates, self.param_groups, strict=True):
            rate.fill_(group["lr"])
        if self.capture is None:
            self._move()
            return
        read = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        places = [each.data_ptr() for each in (*read, *([] if self.found_inf is None else [self.found_inf]))]
        if places != self.places:  # a capture needs a run before it
            self._move()
            self.replay, self.places = None, places
            return
        self.replay = self.replay or self.capture(self._move)
        self.replay()

    def _move(self) -> None:
        """The step at the rates in `rates`: launches alone, on tensors that stay where they are."""
        for lr, group in zip(self.rates, self.param_groups, strict=True):
            parameters = group["params"]
            if not parameters:
                continue
            alive: Tensor | float = 1.0
            gradients = [parameter.grad for parameter in parameters]
            if self.found_inf is not None:
                alive = 1 - self.found_inf
                gradients = [torch.where(self.found_inf > 0, 0, gradient) for gradient in gradients]
            lr, decay, momentum = lr * alive, group["weight_decay"], group["momentum"]
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


def orthogonalised(weights: list[Tensor], steps: int = 5, *, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Each weight's matrix U S V^T as about U V^T, times sqrt(rows / columns) where that is above 1.

    Singular values end between 0.7 and 1.2 where they were above a hundredth of the matrix's norm. `dtype` is the type
    of the iteration, by default bfloat16 on a GPU and the weights' own elsewhere.
    """
    a, b, c = COEFFICIENTS
    own = weights[0].dtype
    dtype = dtype or (torch.bfloat16 if weights[0].is_cuda else own)
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, weight in enumerate(weights):
        by_shape.setdefault((len(weight), weight[0].numel()), []).append(index)
    found: list[Tensor] = [weights[0]] * len(weights)
    for (rows, columns), indices in by_shape.items():
        matrices = torch.stack([weights[index].reshape(rows, columns) for index in indices])
        wide = matrices.mT if rows > columns else matrices
        wide = (wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
        for _ in range(steps):
            gram = wide @ wide.mT
            wide = a * wide + (b * gram + c * gram @ gram) @ wide
        matrices = (wide.mT if rows > columns else wide).to(own) * max(1.0, rows / columns) ** 0.5
        for index, matrix in zip(indices, matrices, strict=True):
            found[index] = matrix.reshape(weights[index].shape)
    return found
