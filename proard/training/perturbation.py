"""Adversarial weight perturbation: the loss is minimised at weights first moved to increase it, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def perturbed(
    weights: Sequence[Tensor],
    loss: Tensor,
    *,
    gamma: float,
    totals: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda gradients: gradients,
) -> Iterator[None]:
    """Context in which the weights are w + gamma ||w|| g / ||g||, g the gradient of `loss`; then they return.

    Parameters
    ----------
    weights : sequence of Tensor
        Leaves with more than one dim: convolutions and the head, each a layer of its own. Changed in place.
    loss : Tensor of shape ()
        The loss at the weights as they are; its graph is used up.
    gamma : float
        Share of a layer's norm by which it moves.
    totals : callable
        Sums over the processes among which the loss is spread, tensor by tensor.

    Notes
    -----
    One ascent step, as in the authors' code, which takes it on a copy of the network by SGD without momentum: the same
    direction. Their batch-norm statistics also move at the perturbed weights; those here do not. In a supernet a layer
    is what the subnet uses of it.

    References
    ----------
    Wu et al., Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020, arXiv:2004.05884.
    """
    gradients = totals(torch.autograd.grad(loss, weights))
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            norm = torch.linalg.vector_norm(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)
            weight.add_(gradient * (gamma * torch.linalg.vector_norm(weight) / norm))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(weights), kept)
