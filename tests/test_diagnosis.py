"""KDIGA's bound: it holds for the reported values, its terms are computed correctly, pairs of networks by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import CLASSES, random_images, random_supernet, tiny_space

from proard.data import keyed_generator
from proard.evaluation.diagnosis import (
    ATTACKS,
    difference_field,
    highest_point,
    linearity_field,
    loss_field,
    measure_bound,
    search_points,
)
from proard.evaluation.pairing import holm, mean_interval, pairing
from proard.losses import gradient_gap, loss_gradient
from proard.nets import extract, fold

close = torch.testing.assert_close
NORMS = {"linf": 0.1, "l2": 0.5}
COUNT = 6
LABELS = torch.arange(COUNT) % CLASSES


def network(seed, *, dtype=torch.float64):
    space = tiny_space()
    return fold(extract(random_supernet(space, seed=seed, dtype=dtype), space.largest), dtype=dtype).eval()


def streams(search, restart, *, images=range(COUNT)):
    return [keyed_generator(0, search, restart, image) for image in images]


def diagnosed(student, teacher, images, labels=LABELS, *, norm, eps=None, num_steps=4, generator_of=streams):
    ball = {"norm": norm, "eps": NORMS[norm] if eps is None else eps}
    options = {"num_steps": num_steps, "restarts": 2, "generator_of": generator_of}
    points = search_points(student, teacher, images, labels, **ball, **options)
    return measure_bound(student, teacher, images, labels, points, **ball), points


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(8))
def test_the_bound_holds_on_random_networks_and_images(seed, norm):
    images = random_images(tiny_space(), COUNT, seed=seed)
    for eps in (0.01, NORMS[norm], 2.0):
        bound, _ = diagnosed(network(seed), network(seed + 100), images, norm=norm, eps=eps)
        assert bound.slack.min() > -1e-9
        assert bound.right.min() > 0


@pytest.mark.parametrize("norm", NORMS)
def test_points_found_in_float32_bound_in_float64(norm):
    images = random_images(tiny_space(), COUNT, dtype=torch.float32)
    _, points = diagnosed(network(0, dtype=torch.float32), network(1, dtype=torch.float32), images, norm=norm)
    ball = {"norm": norm, "eps": NORMS[norm]}
    bound = measure_bound(network(0), network(1), images.double(), LABELS, points, **ball)
    assert bound.slack.dtype is torch.float64
    assert bound.slack.min() > -1e-12


def test_without_the_attacks_among_the_linearity_candidates_it_would_not_hold():
    """Networks that agree at the images to first order: all of their difference elsewhere is curvature."""
    images, labels = torch.full((2, 1, 4, 4), 0.5, dtype=torch.float64), torch.tensor([0, 1])

    def curved(x):
        bend = (x - 0.5).square().sum((1, 2, 3))
        return torch.stack([5 * bend, -5 * bend, 0 * bend], 1)

    def flat(x):
        return 0 * curved(x)

    def of_two(search, restart):
        return streams(search, restart, images=range(2))

    _, points = diagnosed(curved, flat, images, labels, norm="linf", generator_of=of_two)
    weak = {name: point if name in ATTACKS else images for name, point in points.items()}  # a search that found nothing
    bound = measure_bound(curved, flat, images, labels, weak, eps=0.1, norm="linf")
    left = torch.stack(list(bound.left.values())).amax(0)
    assert (bound.loss_gap + bound.alignment < left).all()
    assert bound.slack.min() > -1e-12
    close(bound.right, left)


@pytest.mark.parametrize("norm", NORMS)
def test_a_student_that_is_its_teacher_differs_by_nothing(norm):
    images = random_images(tiny_space(), COUNT)
    bound, _ = diagnosed(network(3), network(3), images, norm=norm)
    nothing = torch.zeros(COUNT, dtype=torch.float64)
    for term in (bound.loss_gap, bound.alignment, bound.gap_l1, bound.gap_l2, *bound.left.values()):
        assert torch.equal(term, nothing)
    close(bound.cosine, nothing + 1)
    assert torch.equal(bound.student_linearity, bound.teacher_linearity)
    assert bound.student_linearity.min() > 0
    assert torch.equal(bound.student_robust, bound.teacher_robust)


@pytest.mark.parametrize(("norm", "dual"), [("linf", "l1"), ("l2", "l2")])
def test_alignment_is_eps_times_the_dual_norm_of_the_training_term(norm, dual):
    student, teacher = network(0), network(1)
    images = random_images(tiny_space(), COUNT).requires_grad_()
    gradients = [loss_gradient(net(images), images, LABELS) for net in (student, teacher)]
    bound, _ = diagnosed(student, teacher, images.detach(), norm=norm)
    close(bound.alignment, NORMS[norm] * gradient_gap(*gradients, norm=dual))
    close(bound.gap_l1, gradient_gap(*gradients, norm="l1"))
    close(bound.gap_l2, gradient_gap(*gradients, norm="l2"))
    cosine = torch.nn.functional.cosine_similarity(*(gradient.flatten(1) for gradient in gradients))
    close(bound.cosine, cosine)


def test_losses_and_right_answers_are_those_at_the_images_and_the_points():
    student, teacher = network(0), network(1)
    images = random_images(tiny_space(), COUNT)
    bound, points = diagnosed(student, teacher, images, norm="linf")

    def loss(net, x):
        return torch.nn.functional.cross_entropy(net(x), LABELS, reduction="none")

    close(bound.student_loss, loss(student, images))
    close(bound.loss_gap, (loss(student, images) - loss(teacher, images)).abs())
    for name in ATTACKS:
        close(bound.left[name], (loss(student, points[name]) - loss(teacher, points[name])).abs())
    right = [student(point).argmax(1) == LABELS for point in (images, *points.values())]
    assert torch.equal(bound.student_robust, torch.stack(right).all(0))
    assert torch.equal(bound.student_correct, right[0])


@pytest.mark.parametrize("norm", NORMS)
def test_points_lie_in_the_ball_and_in_the_pixel_range(norm):
    images = random_images(tiny_space(), COUNT).round()  # many pixels at an end of the range
    _, points = diagnosed(network(0), network(1), images, norm=norm)
    for point in points.values():
        length = torch.linalg.vector_norm((point - images).flatten(1), torch.inf if norm == "linf" else 2, dim=1)
        assert length.max() <= NORMS[norm] + 1e-12
        assert point.min() >= 0
        assert point.max() <= 1


def test_an_image_s_rows_do_not_depend_on_the_images_beside_it():
    student, teacher = network(0), network(1)
    images = random_images(tiny_space(), COUNT)
    together, _ = diagnosed(student, teacher, images, norm="linf")

    def alone_streams(search, restart):
        return streams(search, restart, images=[4])

    alone, _ = diagnosed(student, teacher, images[4:5], LABELS[4:5], norm="linf", generator_of=alone_streams)
    close(alone.right, together.right[4:5])
    close(alone.left["difference"], together.left["difference"][4:5])


def quadratic(images):
    """3 * |x - 1/2|^2 - |x - 1/2|_1 / 10 of every image, and its gradient."""
    shift = images - 0.5
    value = 3 * shift.square().sum((1, 2, 3)) - shift.abs().sum((1, 2, 3)) / 10
    return value, 6 * shift - shift.sign() / 10


def test_ascent_finds_the_corner_of_the_box_and_the_sphere():
    images = torch.full((2, 1, 4, 4), 0.5, dtype=torch.float64)
    options = {"num_steps": 10, "generators": [streams(0, 0, images=range(2))]}
    corner = highest_point(quadratic, images, eps=0.2, norm="linf", **options)
    close((corner - images).abs(), torch.full_like(images, 0.2))
    sphere = highest_point(lambda x: (quadratic(x)[0], 6 * (x - 0.5)), images, eps=0.2, norm="l2", **options)
    close(torch.linalg.vector_norm((sphere - images).flatten(1), dim=1), torch.full((2,), 0.2, dtype=torch.float64))


def test_ascent_keeps_the_best_iterate_of_all_restarts():
    images = random_images(tiny_space(), COUNT)
    field = loss_field(network(0), LABELS)
    one, two = [streams(0, 0)], [streams(0, 0), streams(0, 1)]
    options = {"eps": 0.3, "norm": "linf"}
    values = [field(highest_point(field, images, num_steps=5, generators=many, **options))[0] for many in (one, two)]
    assert (values[1] >= values[0]).all()
    assert (values[1] > values[0]).any()
    start_only = field(highest_point(field, images, num_steps=1, generators=one, **options))[0]
    assert (values[0] > field(images)[0]).all()
    assert start_only.isfinite().all()


def test_linearisation_errs_by_the_second_order_and_not_at_all_where_a_function_is_linear():
    images = torch.full((2, 1, 4, 4), 0.3, dtype=torch.float64)
    weight = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def linear(x):
        return (x * weight).sum((1, 2, 3)), weight.expand_as(x)

    def square(x):
        return x.square().sum((1, 2, 3)), 2 * x

    shift = 0.05 * torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value, gradient = linearity_field(linear, images)(images + shift)
    close(value, torch.zeros(2, dtype=torch.float64), atol=1e-15, rtol=0)
    value, gradient = linearity_field(square, images)(images + shift)
    close(value, shift.square().sum((1, 2, 3)))
    close(gradient, 2 * shift)


def test_a_difference_is_absolute_and_so_is_its_gradient():
    images = random_images(tiny_space(), COUNT).requires_grad_()
    first, second = (loss_field(network(seed), LABELS) for seed in (0, 1))
    value, gradient = difference_field(first, second)(images.detach())
    losses = [torch.nn.functional.cross_entropy(network(seed)(images), LABELS, reduction="none") for seed in (0, 1)]
    expected = (losses[0] - losses[1]).abs()
    assert (losses[0] < losses[1]).any()
    assert (losses[0] > losses[1]).any()
    close(value, expected.detach())
    close(gradient, torch.autograd.grad(expected.sum(), images)[0])


def test_pairs_are_counted_by_hand():
    first, second = np.array([1, 1, 1, 1, 0, 0, 1], bool), np.array([0, 0, 0, 1, 1, 0, 1], bool)
    first_gap = np.array([1.0, 2.0, 3.0, 1.0, 5.0, 1.0, 2.0])
    second_gap = np.array([2.0, 3.0, 1.0, 1.0, 4.0, 2.0, 3.0])
    found = pairing(first, second, first_gap, second_gap)
    assert (found.first_only, found.second_only) == (3, 1)
    assert found.mcnemar_p == pytest.approx(10 / 16)  # 4 images, 3 or more on one side: 2 (4 + 1) / 16
    assert found.first_nearer == pytest.approx((4 + 0.5) / 7)
    assert found.nearer_robust == pytest.approx(3 / 4)  # images 0, 1 and 4 of 0, 1, 2, 4
    assert found.nearer_robust_p == pytest.approx(10 / 16)
    swapped = pairing(second, first, second_gap, first_gap)
    assert (swapped.nearer_robust, swapped.mcnemar_p, swapped.gap_p) == (
        found.nearer_robust,
        found.mcnemar_p,
        found.gap_p,
    )
    assert swapped.first_nearer == pytest.approx(1 - found.first_nearer)


def test_networks_that_stand_the_same_images_say_nothing():
    same, gap = np.array([True, False, True]), np.array([1.0, 2.0, 3.0])
    found = pairing(same, same, gap, gap)
    assert (found.mcnemar_p, found.gap_p, found.nearer_robust_p) == (1.0, 1.0, 1.0)
    assert np.isnan([found.nearer_robust, found.nearer_robust_low]).all()


def test_p_values_of_several_pairs_are_corrected_by_holm():
    found = holm(np.array([0.01, 0.04, 0.03, 0.005]))
    assert found == pytest.approx([0.03, 0.06, 0.06, 0.02])  # 4 x 0.005, 3 x 0.01, 2 x 0.03, and no less than before
    assert holm(np.array([0.5, 0.9])) == pytest.approx([1.0, 1.0])


def test_interval_of_a_mean_covers_it_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.normal(2, 1, 60), bootstraps=300, seed=seed) for seed in range(100)]
    covered = sum(low <= 2 <= high for _, low, high in intervals)
    assert 88 <= covered <= 100
    assert all(low <= mean <= high for mean, low, high in intervals)
    constant = mean_interval(np.full(5, 0.25))
    assert constant == (0.25, 0.25, 0.25)
