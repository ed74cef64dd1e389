"""One loop for every inner maximisation in training; the objective and the network are arguments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from proard.kernels import pgd_update_
from proard.losses import InnerObjective


def start_point(images: Tensor, *, eps: float, start: str, generator: torch.Generator | None) -> Tensor:
    """First iterate: `uniform` in the ball, `gaussian` (TRADES: 0.001 N(0, 1)), or the images themselves (`zero`).

    Noise is drawn on the generator's device, so that one seed gives one start on every device.
    """
    if start == "zero":
        return images.clone()
    device = images.device if generator is None else generator.device
    noise = torch.empty(images.shape, dtype=images.dtype, device=device)
    if start == "uniform":
        noise.uniform_(-eps, eps, generator=generator)
    else:
        noise.normal_(0, 1e-3, generator=generator)
    noise = noise.contiguous(memory_format=torch.channels_last)
    if images.is_cuda and not noise.is_cuda:  # from pageable memory the host would wait for the device
        noise = noise.pin_memory().to(images.device, non_blocking=True)
    return project_(noise.add_(images), images, eps)


def project_(adv: Tensor, images: Tensor, eps: float) -> Tensor:
    """Clip `adv` in place to the ball around `images` and to the pixel range."""
    return torch.clamp(adv, (images - eps).clamp_(min=0), (images + eps).clamp_(max=1), out=adv)


def input_gradient(
    predict: Callable[[Tensor], Tensor], objective: InnerObjective, adv: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits at `adv` and the gradient of the summed objective with respect to it; weights get none."""
    adv = adv.detach().requires_grad_()
    with torch.enable_grad():
        logits = predict(adv)
    seed = objective.logit_gradient(logits.detach())
    (gradient,) = torch.autograd.grad(logits, adv, seed)
    return logits.detach(), gradient


def take_steps(
    predict: Callable[[Tensor], Tensor],
    objective: InnerObjective,
    adv: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    step_size: float,
    num_steps: int,
) -> Tensor:
    """Sign-gradient steps from `adv`, in place, each clipped to the bounds `low` and `high` of every pixel."""
    for _ in range(num_steps):
        _, gradient = input_gradient(predict, objective, adv)
        pgd_update_(adv, gradient, low, high, step_size=step_size)
    return adv


def pgd(
    predict: Callable[[Tensor], Tensor],
    objective: InnerObjective,
    images: Tensor,
    *,
    eps: float,
    step_size: float,
    num_steps: int,
    start: str = "uniform",
    generator: torch.Generator | None = None,
    steps: Callable[..., Tensor] = take_steps,
) -> Tensor:
    """Projected sign-gradient ascent of `objective` inside the eps-ball and the image box.

    Parameters
    ----------
    predict : callable
        Maps images to logits of shape (batch, classes).
    objective : InnerObjective
        Value per image, and its gradient with respect to the logits.
    images : Tensor of shape (batch, channels, height, width)
        Clean images in [0, 1], float32.
    eps, step_size : float
        Radius and step in pixel units.
    num_steps : int
        Steps; 0 returns the start point.
    start : {'uniform', 'gaussian', 'zero'}
        First iterate.
    generator : torch.Generator
        Source of the start noise, which is drawn before the steps.
    steps : callable
        What takes the steps: `take_steps`, or a `kernels.CapturedSteps` of it.

    Returns
    -------
    Tensor of the shape of `images`
        float32, without gradient.

    References
    ----------
    Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, arXiv:1706.06083.
    """
    adv = start_point(images, eps=eps, start=start, generator=generator)
    low, high = (images - eps).clamp_(min=0), (images + eps).clamp_(max=1)
    return steps(predict, objective, adv, low, high, step_size=step_size, num_steps=num_steps)
