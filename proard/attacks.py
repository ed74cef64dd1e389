"""The loop of all attacks in training; the objective and the network are arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from proard.kernels import KeyedNoise, pgd_update_
from proard.losses import InnerObjective

Source = torch.Generator | KeyedNoise | None


def start_point(
    images: Tensor,
    *,
    eps: float,
    start: str,
    generator: Source,
    norm: str = "linf",
    scale: float = 1.0,
    clip_to_ball: bool = True,
    among: tuple[int, slice] | None = None,
) -> Tensor:
    """First iterate: the images plus `start_noise_`, clipped.

    One seed gives the same start on every CPU. On a GPU a generator of the CPU gives one number, the key of the noise
    that the device draws (`kernels.KeyedNoise`), so that nothing waits for the host. `among` is (number, part): the
    images are this part of that number of images, and get the part's noise.
    """
    if start == "zero":
        return images.clone()
    count, part = among or (len(images), slice(None))
    source: Source = generator
    if images.is_cuda and isinstance(generator, torch.Generator) and generator.device.type == "cpu":
        source = KeyedNoise(int(torch.randint(2**62, (), generator=generator)))
    if isinstance(source, KeyedNoise):
        source.first = part.start or 0
        noise = torch.empty_like(images)
    else:
        device = images.device if source is None else source.device
        noise = torch.empty((count, *images.shape[1:]), dtype=images.dtype, device=device)
    start_noise_(noise, eps=scale * eps, start=start, norm=norm, generator=source)
    if not isinstance(source, KeyedNoise):
        noise = noise[part].contiguous(memory_format=torch.channels_last)
    return clipper(images, eps=eps, norm=norm, clip_to_ball=clip_to_ball)(noise.add_(images))


def start_noise_(noise: Tensor, *, eps: float, start: str, norm: str = "linf", generator: Source) -> Tensor:
    """Fill `noise`, of four dims: `uniform` in the ball, `gaussian` (TRADES: 0.001 N(0, 1)), or `zero`."""
    if start == "zero":
        return noise.zero_()
    if start == "gaussian":
        return _normal_(noise, generator).mul_(1e-3)
    return ball_noise_(noise, eps=eps, norm=norm, generator=generator)


def ball_noise_(noise: Tensor, *, eps: float, norm: str, generator: Source) -> Tensor:
    """Fill `noise`, of four dims, with a point drawn uniformly from the eps-ball for every image."""
    if norm == "linf":
        return _uniform_(noise, -eps, eps, generator)
    _normal_(noise, generator)
    shape, dims = (len(noise), 1, 1, 1), noise[0].numel()
    share = _uniform_(torch.empty(shape, dtype=noise.dtype, device=noise.device), 0, 1, generator) ** (1 / dims)
    return noise.mul_(eps * share / torch.linalg.vector_norm(noise, dim=(1, 2, 3), keepdim=True))


def _uniform_(out: Tensor, low: float, high: float, source: Source) -> Tensor:
    """Fill with numbers between two bounds."""
    if isinstance(source, KeyedNoise):
        return out.copy_(source.uniform(out.shape, out.device)).mul_(high - low).add_(low)
    return out.uniform_(low, high, generator=source)


def _normal_(out: Tensor, source: Source) -> Tensor:
    """Fill with normal numbers."""
    if isinstance(source, KeyedNoise):
        return out.copy_(source.normal(out.shape, out.device))
    return out.normal_(generator=source)


def bounds(images: Tensor, *, eps: float, clip_to_ball: bool = True) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of every pixel in the linf ball and the pixel range, or in the pixel range only."""
    if not clip_to_ball:
        return torch.zeros_like(images), torch.ones_like(images)
    return (images - eps).clamp_(min=0), (images + eps).clamp_(max=1)


def clipper(images: Tensor, *, eps: float, norm: str = "linf", clip_to_ball: bool = True) -> Callable[[Tensor], Tensor]:
    """Return a function that clips in place to the ball around `images` and the pixel range; bounds are computed once.

    Without `clip_to_ball` it clips only to the pixel range. The l2 ball comes first: clipping to the pixel range then
    only moves an image closer to the clean one, which lies in the range.
    """
    if not clip_to_ball:
        return lambda adv: adv.clamp_(0, 1)
    if norm == "linf":
        low, high = bounds(images, eps=eps)
        return lambda adv: torch.clamp(adv, low, high, out=adv)

    def clip(adv: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(adv.sub_(images), dim=(1, 2, 3), keepdim=True)
        shrink = (eps / length.clamp_(min=torch.finfo(adv.dtype).tiny)).clamp_(max=1)
        return adv.mul_(shrink).add_(images).clamp_(0, 1)

    return clip


def ascend_(adv: Tensor, gradient: Tensor, step_size: float | Tensor, norm: str = "linf") -> Tensor:
    """One steepest-ascent step of length `step_size`, in place; `gradient` is overwritten, a zero one has no effect.

    A tensor of shape (batch, 1, 1, 1) gives every image a length of its own.
    """
    if norm == "linf":
        if isinstance(step_size, Tensor):
            return adv.addcmul_(gradient.sign_(), step_size)
        return adv.add_(gradient.sign_(), alpha=step_size)
    peak = gradient.abs().amax((1, 2, 3), keepdim=True)  # without it squares of small gradients are 0 in float32
    gradient.div_(peak.clamp_(min=torch.finfo(gradient.dtype).tiny))
    length = torch.linalg.vector_norm(gradient, dim=(1, 2, 3), keepdim=True)  # at least 1, or 0
    return adv.add_(gradient.mul_(step_size / length.clamp_(min=0.5)))


def input_gradient(
    predict: Callable[[Tensor], Tensor], objective: InnerObjective, adv: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits at `adv`, and the gradient of the summed objective with respect to it; weights get no gradient."""
    adv = adv.detach().requires_grad_()
    with torch.enable_grad():
        logits = predict(adv)
    seed = objective.logit_gradient(logits.detach())
    (gradient,) = torch.autograd.grad(logits, adv, seed)
    return logits.detach(), gradient


def differentiate(predict: Callable[[Tensor], Tensor]) -> Callable[[InnerObjective, Tensor], tuple[Tensor, Tensor]]:
    """Return `input_gradient` of a fixed network, by the network's own method if it has one.

    `predict.input_gradient()`, if it exists, returns None or a callable of images and of the objective's gradient with
    respect to the logits. Weights must not change while the result is in use.
    """
    own = predict.input_gradient() if hasattr(predict, "input_gradient") else None
    if own is None:
        return lambda objective, adv: input_gradient(predict, objective, adv)
    return lambda objective, adv: own(adv, objective.logit_gradient)


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
    gradient_at = differentiate(predict)
    for _ in range(num_steps):
        _, gradient = gradient_at(objective, adv)
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
    generator: Source = None,
    norm: str = "linf",
    start_scale: float = 1.0,
    clip_to_ball: bool = True,
    initial: Tensor | None = None,
    among: tuple[int, slice] | None = None,
    steps: Callable[..., Tensor] = take_steps,
) -> Tensor:
    """Projected steepest ascent of `objective` inside the eps-ball and the pixel range.

    Parameters
    ----------
    predict : callable
        Maps images to logits of shape (batch, classes).
    objective : InnerObjective
        Value per image, and its gradient with respect to the logits.
    images : Tensor of shape (batch, channels, height, width)
        Clean images in [0, 1], float32.
    eps, step_size : float
        Radius and step length in pixel units, measured in `norm`.
    num_steps : int
        Steps; 0 returns the start point.
    start : {'uniform', 'gaussian', 'zero'}
        First iterate.
    generator : torch.Generator or KeyedNoise
        Source of the start noise, which is drawn before the steps.
    norm : {'linf', 'l2'}
        Norm of the ball. Steps use the gradient's sign in linf and the normalised gradient in l2.
    start_scale : float
        Radius of the uniform start in units of eps.
    clip_to_ball : bool
        If False, only the pixel range is a limit, so that start and steps add up (N-FGSM).
    initial : Tensor of the shape of `images`, optional
        First iterate instead of `start`; it is clipped in a copy and not changed.
    among : (int, slice), optional
        (number, part): the images are this part of that number of images; they get the part's start noise.
    steps : callable
        Function that takes the steps in linf: `take_steps`, or a `kernels.CapturedSteps` of it.

    Returns
    -------
    Tensor of the shape of `images`
        float32, without gradient.

    References
    ----------
    Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, arXiv:1706.06083;
    one step, `start_scale` 2 and no clipping to the ball: de Jorge et al., Make Some Noise, NeurIPS 2022,
    arXiv:2202.01181 (N-FGSM).
    """
    clip = clipper(images, eps=eps, norm=norm, clip_to_ball=clip_to_ball)
    if initial is None:
        noise = partial(start_point, start=start, generator=generator, scale=start_scale, among=among)
        adv = noise(images, eps=eps, norm=norm, clip_to_ball=clip_to_ball)
    else:
        adv = clip(initial.detach().clone())
    if norm == "linf":
        low, high = bounds(images, eps=eps, clip_to_ball=clip_to_ball)
        return steps(predict, objective, adv, low, high, step_size=step_size, num_steps=num_steps)
    gradient_at = differentiate(predict)
    for _ in range(num_steps):
        _, gradient = gradient_at(objective, adv)
        adv = clip(ascend_(adv, gradient, step_size, norm))
    return adv
