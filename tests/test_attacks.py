"""The inner maximisation: optimum of a linear model, ball and box, start points, unchanged modes and gradients."""

from __future__ import annotations

import pytest
import torch
from helpers import random_archs, random_images, random_supernet, tiny_space
from torch import nn

from proard.attacks import input_gradient, pgd, start_point
from proard.losses import CrossEntropy, KLToTarget, Margin
from proard.nets import SubnetView

EPS = 8 / 255


class Linear(nn.Module):
    """Two logits, +-w.x: the optimum inside the ball is a corner, for every image."""

    def __init__(self, pixels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(pixels, generator=torch.Generator().manual_seed(1)))

    def forward(self, images):
        score = images.flatten(1) @ self.weight
        return torch.stack([score, -score], 1)


def linear_problem(count=5):
    images = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return Linear(48), torch.zeros(count, dtype=torch.long), images, torch.Generator().manual_seed(2)


@pytest.mark.parametrize("start", ["uniform", "gaussian", "zero"])
@pytest.mark.parametrize("objective", [CrossEntropy, Margin])
def test_pgd_reaches_the_optimum_of_a_linear_model(start, objective):
    net, labels, images, generator = linear_problem()
    attack = {"eps": EPS, "step_size": 2 / 255, "num_steps": 10, "start": start, "generator": generator}
    adv = pgd(net, objective(labels), images, **attack)
    descent = net.weight.detach().sign().reshape(1, 3, 4, 4)  # the logit of class 0 decreases with w.x
    torch.testing.assert_close(adv, (images - EPS * descent).clamp(0, 1))


def elastic_problem():
    space = tiny_space()
    net = random_supernet(space, dtype=torch.float32)
    return SubnetView(net, random_archs(space, 1)[0]), random_images(space, 6, dtype=torch.float32)


@pytest.mark.parametrize("eps", [EPS, 0.5])
@pytest.mark.parametrize("start", ["uniform", "gaussian", "zero"])
@pytest.mark.parametrize("num_steps", [0, 1, 7])
def test_pgd_stays_in_the_ball_and_in_the_box(eps, start, num_steps):
    view, images = elastic_problem()
    predict = view.folded(view.running_statistics())
    images[0], images[1] = 0, 1
    before = images.clone()
    objective = CrossEntropy(torch.zeros(6, dtype=torch.long))
    adv = pgd(predict, objective, images, eps=eps, step_size=eps / 3, num_steps=num_steps, start=start)
    assert (adv - images).abs().max() <= eps + 1e-6
    assert 0 <= adv.min() <= adv.max() <= 1
    assert not adv.requires_grad
    assert adv.dtype is torch.float32
    assert torch.equal(images, before)
    assert torch.equal(adv, images) == (start == "zero" and num_steps == 0)


def test_zero_steps_return_the_start_point():
    net, labels, images, _ = linear_problem()
    for start in ("uniform", "gaussian", "zero"):
        kind = {"eps": EPS, "start": start}
        adv = pgd(
            net,
            CrossEntropy(labels),
            images,
            step_size=2 / 255,
            num_steps=0,
            generator=torch.Generator().manual_seed(3),
            **kind,
        )
        assert torch.equal(adv, start_point(images, generator=torch.Generator().manual_seed(3), **kind))


def test_start_modes_have_their_sizes():
    images = torch.full((50, 3, 8, 8), 0.5)
    spread = {}
    for start in ("uniform", "gaussian", "zero"):
        first = start_point(images, eps=0.1, start=start, generator=torch.Generator().manual_seed(0))
        spread[start] = float((first - images).std())
    assert spread["uniform"] == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert spread["gaussian"] == pytest.approx(1e-3, rel=0.05)
    assert spread["zero"] == 0


def test_one_seed_gives_one_result():
    view, images = elastic_problem()
    predict = view.folded(view.running_statistics())

    def attacked(seed):
        generator = torch.Generator().manual_seed(seed)
        return pgd(
            predict,
            Margin(torch.zeros(6, dtype=torch.long)),
            images,
            eps=EPS,
            step_size=0.01,
            num_steps=3,
            generator=generator,
        )

    assert torch.equal(attacked(0), attacked(0))
    assert not torch.equal(attacked(0), attacked(1))


def test_the_attack_raises_its_objective():
    view, images = elastic_problem()
    predict = view.folded(view.running_statistics())
    for objective in (CrossEntropy(predict(images).argmax(1)), KLToTarget(predict(images))):
        adv = pgd(predict, objective, images, eps=0.1, step_size=0.03, num_steps=5, start="gaussian")
        assert (objective(predict(adv)) > objective(predict(images)) - 1e-6).all()


def test_weights_get_no_gradient():
    net, labels, images, generator = linear_problem()
    pgd(net, CrossEntropy(labels), images, eps=EPS, step_size=2 / 255, num_steps=2, generator=generator)
    assert net.weight.grad is None
    view, images = elastic_problem()
    objective = CrossEntropy(torch.zeros(6, dtype=torch.long))
    pgd(lambda x: view(x, frozen=True), objective, images, eps=EPS, step_size=2 / 255, num_steps=2)
    leaves = [leaf for layer in view.leaves.values() for leaf in layer]
    assert all(leaf.grad is None for leaf in (*leaves, *view.supernet.parameters()))


def test_input_gradient_equals_autograd_inside_a_block_without_gradients():
    net, labels, images, _ = linear_problem()
    x = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(CrossEntropy(labels)(net(x)).sum(), x)
    with torch.no_grad():
        logits, gradient = input_gradient(net, CrossEntropy(labels), images)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(logits, net(images).detach())
    assert not images.requires_grad
