"""Radii around an image inside which a prediction does not change: an estimate (CLEVER) and a certificate (smoothing).

CLEVER extrapolates the largest gradient norm of a logit margin from samples. The estimate is close where the fit is
good. It is no guarantee, as the true Lipschitz constant may be larger. Randomised smoothing guarantees, with a stated
probability, a radius for another classifier: the majority vote of the network under Gaussian noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from proard.attacks import ball_noise_
from proard.evaluation.certificates import ABSTAIN, Certificate, Clever

Predict = Callable[[Tensor], Tensor]

DUAL = {"linf": 1, "l2": 2}
FARTHEST = 10.0  # largest distance of a fitted end point from the largest sample, in units of the samples' spread


def clever(
    predict: Predict,
    images: Tensor,
    *,
    norm: str,
    radius: float,
    num_maxima: int,
    num_samples: int,
    targets: int | None = None,
    generators: Sequence[torch.Generator],
) -> Clever:
    """Estimate the radius inside which the predicted class stays, from sampled gradients (CLEVER).

    Parameters
    ----------
    predict : callable
        Images to logits.
    images : Tensor of shape (batch, channels, height, width)
        In [0, 1].
    norm : {'linf', 'l2'}
        Norm of the radius; gradients are measured in its dual.
    radius : float
        Radius of the ball that samples are drawn from, pixel units in the norm; no score exceeds it.
    num_maxima, num_samples : int
        Number of maxima to which the extreme-value distribution is fitted, and number of gradients per maximum.
    targets : int, optional
        Only this many wrong classes, those with the largest logits; None takes all of them, as in the paper.
    generators : sequence of torch.Generator
        One per image, so that its samples do not depend on the other images of the batch.

    Notes
    -----
    Samples are clipped to the pixel range, as perturbed images are. The paper fits all of its 500 maxima of 1,024
    samples each; fewer make the end point less certain.

    References
    ----------
    Weng et al., Evaluating the Robustness of Neural Networks: An Extreme Value Theory Approach, ICLR 2018,
    arXiv:1801.10578.
    """
    with torch.no_grad():
        ranked, order = predict(images).sort(1, descending=True)
    last = ranked.shape[1] if targets is None else 1 + targets
    top, wrong = order[:, 0], order[:, 1:last]
    margins = (ranked[:, :1] - ranked[:, 1:last]).double().cpu().numpy()  # (batch, targets)
    maxima = []
    for _ in range(num_maxima):
        noise = [_ball_points(images, num_samples, radius=radius, norm=norm, generator=each) for each in generators]
        samples = torch.clamp(images[:, None] + torch.stack(noise).to(images), 0, 1)
        maxima.append(_largest_norms(predict, samples, top, wrong, order=DUAL[norm]))
    by_target = np.stack(maxima, axis=2)  # (batch, targets, maxima)
    fits = np.array([[largest_value(values) for values in of_image] for of_image in by_target])
    bounds = np.minimum(margins / fits[..., 0].clip(min=np.finfo(float).tiny), radius)
    image, target = np.arange(len(bounds)), bounds.argmin(1)
    return Clever(bounds[image, target], margins[image, target], *fits[image, target].T)


def _ball_points(images: Tensor, number: int, *, radius: float, norm: str, generator: torch.Generator) -> Tensor:
    """Points drawn uniformly from the ball around zero, of shape (number, channels, height, width)."""
    return ball_noise_(torch.empty(number, *images.shape[1:]), eps=radius, norm=norm, generator=generator)


def _largest_norms(predict: Predict, samples: Tensor, top: Tensor, wrong: Tensor, *, order: int) -> NDArray[np.float64]:
    """Largest gradient norm of each margin over the samples of an image, of shape (batch, targets)."""
    batch, number = samples.shape[:2]
    points = samples.flatten(0, 1).requires_grad_()
    with torch.enable_grad():
        logits = predict(points)
    norms = []
    for target in wrong.T:
        direction = torch.zeros(batch, logits.shape[1]).to(logits)
        direction.scatter_(1, top[:, None], 1.0).scatter_(1, target[:, None], -1.0)
        seed = direction.repeat_interleave(number, 0)
        (gradient,) = torch.autograd.grad(logits, points, seed, retain_graph=True)
        norms.append(torch.linalg.vector_norm(gradient.flatten(1), order, dim=1).view(batch, number).amax(1))
    return torch.stack(norms, 1).double().cpu().numpy()


def largest_value(maxima: NDArray[np.float64]) -> tuple[float, float]:
    """Estimate the end point of the distribution of maxima: the location of a fitted reverse Weibull distribution.

    Parameters
    ----------
    maxima : ndarray of shape (n,)
        Independent maxima of a quantity that is bounded above.

    Returns
    -------
    end, p : float
        The end point, at least the largest of `maxima`, and the P value of the Kolmogorov-Smirnov test of the fit.
        Where all maxima are equal up to rounding: that value and NaN.

    Notes
    -----
    The fit is by maximum likelihood. For samples with a long upper tail the likelihood is greatest at infinity. The
    end point is therefore at most 10 times the samples' spread above the largest sample.
    """
    largest = maxima.max()
    spread = largest - maxima.min()
    if spread <= 1e-5 * abs(largest):  # float32 gradients of a linear function differ that much
        return float(largest), float("nan")
    scaled = (maxima - largest) / spread
    shape, end, scale = stats.weibull_max.fit(scaled, 5, loc=0.1, scale=1)
    p = stats.kstest(scaled, stats.weibull_max(shape, end, scale).cdf).pvalue
    return float(largest + spread * min(max(end, 0.0), FARTHEST)), float(p)


def certify(
    predict: Predict,
    image: Tensor,
    *,
    sigma: float,
    num_choose: int,
    num_certify: int,
    alpha: float,
    batch_size: int,
    generator: torch.Generator,
) -> Certificate:
    """Certify the majority vote under Gaussian noise around one image (CERTIFY of randomised smoothing).

    Parameters
    ----------
    predict : callable
        Images to logits; called with noisy images, not clipped to [0, 1], as the theorem requires.
    image : Tensor of shape (channels, height, width)
        In [0, 1].
    sigma : float
        Standard deviation of the noise, pixel units.
    num_choose, num_certify : int
        Number of noisy copies that choose the class, and of other copies that certify it (the paper's n0 and n).
    alpha : float in (0, 1)
        Probability that the certificate is wrong.
    batch_size : int
        Number of copies in one call of `predict`.
    generator : torch.Generator
        Source of the noise.

    Notes
    -----
    The lower bound of the share is Clopper and Pearson's, one-sided, at level 1 - alpha. At or below one half the
    classifier abstains. The radius is the paper's sigma * Phi^-1(share), which treats all other classes as one.

    References
    ----------
    Cohen et al., Certified Adversarial Robustness via Randomized Smoothing, ICML 2019, arXiv:1902.02918.
    """
    votes = partial(_votes, predict, image, sigma=sigma, batch_size=batch_size, generator=generator)
    label = int(votes(num_choose).argmax())
    successes = int(votes(num_certify)[label])
    share_low = clopper_pearson_low(successes, num_certify, alpha)
    if share_low <= 0.5:
        return Certificate(ABSTAIN, 0.0, share_low)
    return Certificate(label, sigma * float(stats.norm.ppf(share_low)), share_low)


@torch.no_grad()
def _votes(
    predict: Predict, image: Tensor, number: int, *, sigma: float, batch_size: int, generator: torch.Generator
) -> NDArray[np.int64]:
    """How often each class is predicted among `number` noisy copies, of shape (classes,)."""
    votes = torch.zeros(0, dtype=torch.int64)
    for size in _batches(number, batch_size):
        noise = torch.empty(size, *image.shape).normal_(0, sigma, generator=generator)
        noisy = (image + noise.to(image)).contiguous(memory_format=torch.channels_last)
        logits = predict(noisy)
        counts = logits.argmax(1).bincount(minlength=logits.shape[1]).cpu()
        votes = counts if not len(votes) else votes + counts
    return votes.numpy()


def _batches(number: int, batch_size: int) -> Iterator[int]:
    """Sizes of consecutive batches of `number` copies."""
    for done in range(0, number, batch_size):
        yield min(batch_size, number - done)


def clopper_pearson_low(successes: int, trials: int, alpha: float) -> float:
    """Lower end of the exact one-sided confidence interval of a share, at level 1 - alpha."""
    return 0.0 if successes == 0 else float(stats.beta.ppf(alpha, successes, trials - successes + 1))


def largest_radius(sigma: float, num_certify: int, alpha: float) -> float:
    """Radius if all noisy copies get one class: the largest radius that `num_certify` copies can certify."""
    return sigma * float(stats.norm.ppf(clopper_pearson_low(num_certify, num_certify, alpha)))
