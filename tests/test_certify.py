"""Radii: exact on linear networks, below the truth with the stated confidence, and an abstention at a border."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from proard.data import keyed_generator
from proard.evaluation.certify import (
    ABSTAIN,
    certify,
    clever,
    clopper_pearson_low,
    largest_radius,
    largest_value,
)

DIMS = 16
SAMPLES = {"num_maxima": 12, "num_samples": 4}


def streams(count, *, seed=0):
    return [keyed_generator(seed, image) for image in range(count)]


def linear(classes=4, *, seed=0):
    """Linear logits of 1 x 4 x 4 images; weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, DIMS, generator=generator, dtype=torch.float64)
    bias = torch.randn(classes, generator=generator, dtype=torch.float64) / 4
    return (lambda images: images.flatten(1) @ weight.T + bias), weight, bias


def grey(count, *, seed=1):
    shape = (count, 1, 4, 4)
    return 0.3 + 0.4 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_radii(weight, logits, order):
    """min over wrong classes of margin / dual norm of the difference of the weights."""
    top = logits.argmax(1)
    margins = logits.gather(1, top[:, None]) - logits
    norms = torch.linalg.vector_norm(weight[top][:, None] - weight, order, dim=2)
    return torch.where(norms > 0, margins / norms, torch.inf).amin(1).numpy()


# CLEVER


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_clever_of_a_linear_model_is_margin_over_dual_norm(norm, dual):
    predict, weight, _ = linear()
    images = grey(8)
    found = clever(predict, images, norm=norm, radius=10.0, generators=streams(8), **SAMPLES)
    np.testing.assert_allclose(found.radius, exact_radii(weight, predict(images), dual), rtol=1e-9)
    np.testing.assert_allclose(found.margin / found.lipschitz, found.radius)
    assert np.isnan(found.fit_p).all()


def test_clever_gives_no_radius_beyond_its_ball_and_may_look_at_fewer_classes():
    predict, weight, _ = linear()
    images = grey(8)
    exact = exact_radii(weight, predict(images), 2)
    limit = float(np.median(exact))
    capped = clever(predict, images, norm="l2", radius=limit, generators=streams(8), **SAMPLES)
    np.testing.assert_allclose(capped.radius, np.minimum(exact, limit))
    runner_up = clever(predict, images, norm="l2", radius=10.0, targets=1, generators=streams(8), **SAMPLES)
    assert (runner_up.radius >= exact - 1e-12).all()
    top = predict(images).topk(2, dim=1)
    gap = weight[top.indices[:, 0]] - weight[top.indices[:, 1]]
    expected = (top.values[:, 0] - top.values[:, 1]) / gap.norm(dim=1)
    np.testing.assert_allclose(runner_up.radius, expected.numpy())


def test_clever_finds_the_slope_at_the_edge_of_the_ball():
    """Logits (1 - 3 |x - c|^2, 0): the slope at distance r is 6 r, 6 R at the edge of the ball."""
    centre = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)

    def predict(images):
        value = 1 - 3 * (images - centre).square().sum((1, 2, 3))
        return torch.stack([value, torch.zeros_like(value)], 1)

    found = clever(predict, centre, norm="l2", radius=0.2, num_maxima=60, num_samples=30, generators=streams(1))
    assert found.lipschitz[0] == pytest.approx(6 * 0.2, rel=0.01)
    assert found.radius[0] == 0.2  # 1 / 1.2 is outside
    assert found.fit_p[0] > 0.01


def test_clever_samples_of_an_image_do_not_depend_on_the_images_beside_it():
    def predict(images):
        return torch.stack([images.flatten(1).square().sum(1), torch.sin(3 * images.flatten(1)).sum(1)], 1)

    images = grey(3)
    options = {"norm": "l2", "radius": 0.3, **SAMPLES}
    together = clever(predict, images, generators=streams(3), **options)
    alone = clever(predict, images[2:], generators=streams(3)[2:], **options)
    np.testing.assert_allclose(alone.radius, together.radius[2:])
    np.testing.assert_allclose(alone.fit_p, together.fit_p[2:])


@pytest.mark.parametrize("shape", [1.5, 3.0, 6.0])
def test_end_point_of_a_reverse_weibull_sample_is_found(shape):
    ends = []
    for seed in range(20):
        sample = stats.weibull_max.rvs(shape, loc=5.0, scale=2.0, size=200, random_state=seed)
        end, p = largest_value(sample)
        assert end >= sample.max()
        assert 0 < p <= 1
        ends.append(end)
    assert np.median(ends) == pytest.approx(5.0, abs=0.15 * shape / 1.5)


def test_end_point_of_equal_maxima_is_their_value_and_long_tails_stay_finite():
    end, p = largest_value(np.full(20, 3.5) + 1e-8 * np.arange(20))
    assert end == pytest.approx(3.5, rel=1e-6)
    assert math.isnan(p)
    sample = np.random.default_rng(0).standard_exponential(50)
    end, _ = largest_value(sample)
    assert sample.max() <= end <= sample.max() + 10 * np.ptp(sample)


# Randomised smoothing


def two_classes(distance, *, seed=0):
    """A linear two-class network, and an image at this l2 distance from its border, on the side of class 1."""
    weight = torch.randn(DIMS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    image = grey(1)[0]
    offset = float(image.flatten() @ weight) - distance * float(weight.norm())

    def predict(images):
        value = images.flatten(1) @ weight - offset
        return torch.stack([torch.zeros_like(value), value], 1)

    return predict, image


def smoothed(predict, image, *, seed=0, num_certify=1000, alpha=0.001, sigma=0.25):
    options = {"num_choose": 50, "num_certify": num_certify, "alpha": alpha, "batch_size": 300}
    return certify(predict, image, sigma=sigma, **options, generator=keyed_generator(seed, 9))


@pytest.mark.parametrize("distance", [0.1, 0.3, 0.5])
def test_certificate_of_a_linear_network_is_below_its_exact_radius_and_near_it(distance):
    predict, image = two_classes(distance)
    found = smoothed(predict, image, num_certify=20_000)
    assert found.label == 1
    assert 0.93 * distance < found.radius < distance
    assert found.share_low < stats.norm.cdf(distance / 0.25)


def test_certificate_grows_with_the_number_of_copies_and_ends_at_its_limit():
    predict, image = two_classes(50.0)
    radii = [smoothed(predict, image, num_certify=number).radius for number in (100, 1000)]
    assert radii == pytest.approx([largest_radius(0.25, number, 0.001) for number in (100, 1000)])
    assert radii[0] < radii[1]
    assert largest_radius(0.25, 1000, 0.001) == pytest.approx(0.25 * stats.norm.ppf(0.001 ** (1 / 1000)))


def test_certificates_exceed_the_truth_no_more_often_than_alpha():
    predict, image = two_classes(0.2)
    runs = [smoothed(predict, image, seed=seed, num_certify=80, alpha=0.1) for seed in range(300)]
    wrong = sum(found.radius > 0.2 for found in runs)
    assert 0 < wrong <= stats.binom.ppf(0.999, 300, 0.1)


def test_it_abstains_at_the_border():
    predict, image = two_classes(0.0)
    found = [smoothed(predict, image, seed=seed, num_certify=200) for seed in range(10)]
    assert [(each.label, each.radius) for each in found] == [(ABSTAIN, 0.0)] * 10
    assert max(each.share_low for each in found) <= 0.5


def test_the_class_is_chosen_by_other_copies_than_those_that_certify():
    """Copies whose class changes after the choice: the choice is kept, and nothing is certified."""
    seen = []

    def predict(images):
        seen.append(len(images))
        label = 0 if sum(seen) <= 50 else 1
        return torch.nn.functional.one_hot(torch.full((len(images),), label), 2).double()

    found = smoothed(predict, grey(1)[0], num_certify=700)
    assert seen == [50, 300, 300, 100]
    assert (found.label, found.share_low) == (ABSTAIN, 0.0)


def test_noise_is_drawn_around_the_image_and_not_clipped():
    seen = []

    def predict(images):
        seen.append(images)
        return torch.zeros(len(images), 2)

    image = torch.zeros(1, 4, 4)
    smoothed(predict, image, num_certify=3000, sigma=0.5)
    noise = torch.cat(seen)
    assert noise.min() < -1
    assert noise.std().item() == pytest.approx(0.5, rel=0.02)
    assert len(noise.unique(dim=0)) == len(noise)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (1, 10), (9, 10), (10, 10), (873, 1000)])
def test_confidence_bound_is_clopper_and_pearson_s(successes, trials):
    low = clopper_pearson_low(successes, trials, 0.05)
    if successes == 0:
        assert low == 0
    else:  # at the bound, so many successes or more have probability alpha
        assert stats.binom.sf(successes - 1, trials, low) == pytest.approx(0.05)
