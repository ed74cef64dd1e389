"""The l2 ball and N-FGSM: lengths, projections, hand-computed iterates; the measuring attack in l2."""

from __future__ import annotations

import pytest
import torch
from helpers import random_archs, random_images, random_supernet, tiny_space

from proard.attacks import ascend_, ball_noise_, clipper, pgd, start_point
from proard.config import Attack, TrainingAttack
from proard.evaluation import attack_images
from proard.losses import CrossEntropy, Margin
from proard.nets import SubnetView
from proard.training.attacker import pgd_options


class Linear:
    """Two logits +-(w.x - shift): the gradient is the same everywhere."""

    def __init__(self, pixels, shift=0.0):
        self.weight = torch.randn(pixels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.shift = shift

    def __call__(self, images):
        score = images.flatten(1) @ self.weight.to(images.dtype) - self.shift
        return torch.stack([score, -score], 1)


def lengths(perturbation):
    return perturbation.flatten(1).norm(dim=1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("eps", [0.1, 2.0])
def test_l2_clipping_shortens_what_is_too_long_and_nothing_else(eps):
    images = torch.rand(8, 3, 6, 6, generator=seeded())
    direction = torch.randn(8, 3, 6, 6, generator=seeded(1))
    direction /= lengths(direction)[:, None, None, None]
    wanted = torch.tensor([0.0, 0.5, 0.99, 1.0, 1.01, 2, 10, 1e6]) * eps
    inside = (images * 0 + 0.5) if eps < 1 else images  # far from the pixel range, so that it does not interfere
    clipped = clipper(inside, eps=eps, norm="l2")(inside + direction * wanted[:, None, None, None])
    assert 0 <= clipped.min() <= clipped.max() <= 1
    if eps < 1:
        torch.testing.assert_close(lengths(clipped - inside), wanted.clamp(max=eps), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close((clipped - inside)[5], direction[5] * eps, rtol=1e-4, atol=1e-6)
    assert (lengths(clipped - inside) <= eps * (1 + 1e-5)).all()


def test_l2_noise_is_uniform_in_the_ball():
    """Radius / eps to the power of the dimension is uniform, the mean direction is none."""
    noise = ball_noise_(torch.empty(4000, 1, 2, 2, dtype=torch.float64), eps=0.3, norm="l2", generator=seeded())
    share = (lengths(noise) / 0.3) ** 4
    assert share.max() <= 1
    quantiles = torch.quantile(share, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), rtol=0, atol=0.03)
    assert noise.mean((0, 2, 3)).abs() < 0.01


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e-30])
def test_l2_step_has_its_length_however_small_the_gradient(size):
    gradient = torch.randn(3, 2, 4, 4, generator=seeded())
    gradient[2] = 0
    adv = torch.full((3, 2, 4, 4), 0.5)
    moved = ascend_(adv.clone(), gradient * size, 0.25, "l2") - adv
    torch.testing.assert_close(lengths(moved), torch.tensor([0.25, 0.25, 0.0]), rtol=1e-4, atol=0)
    cosine = torch.nn.functional.cosine_similarity(moved[:2].flatten(1), gradient[:2].flatten(1))
    torch.testing.assert_close(cosine, torch.ones(2))


@pytest.mark.parametrize("start", ["uniform", "gaussian", "zero"])
@pytest.mark.parametrize("objective", [CrossEntropy, Margin])
def test_l2_pgd_reaches_the_optimum_of_a_linear_model(start, objective):
    net, eps = Linear(48), 0.2
    images = torch.rand(5, 3, 4, 4, generator=seeded(), dtype=torch.float64) * 0.5 + 0.25  # pixels stay in range
    attack = {"eps": eps, "norm": "l2", "step_size": 0.1, "num_steps": 40, "start": start, "generator": seeded(2)}
    adv = pgd(net, objective(torch.zeros(5, dtype=torch.long)), images, **attack)
    descent = -eps * net.weight / net.weight.norm()
    torch.testing.assert_close(adv, images + descent.reshape(1, 3, 4, 4), rtol=0, atol=1e-4)


def test_l2_pgd_stays_in_the_ball_and_in_the_box():
    space = tiny_space()
    view = SubnetView(random_supernet(space, dtype=torch.float32), random_archs(space, 1)[0])
    predict = view.folded(view.running_statistics())
    images = random_images(space, 6, dtype=torch.float32)
    images[0], images[1] = 0, 1
    before = images.clone()
    for steps in (0, 1, 7):
        objective = CrossEntropy(torch.zeros(6, dtype=torch.long))
        adv = pgd(predict, objective, images, eps=0.7, norm="l2", step_size=0.3, num_steps=steps)
        assert (lengths(adv - images) <= 0.7 * (1 + 1e-5)).all()
        assert 0 <= adv.min() <= adv.max() <= 1
        assert torch.equal(images, before)


def test_n_fgsm_by_hand():
    """Noise of twice the radius and one full step add up; only the pixel range limits them (de Jorge et al., eq. 8)."""
    net, eps = Linear(48), 0.1
    images = torch.rand(5, 3, 4, 4, generator=seeded())
    attack = TrainingAttack(num_steps=1, step_size=eps, start="n_fgsm")
    options = pgd_options(attack, eps=eps, norm="linf", num_steps=1)
    adv = pgd(net, CrossEntropy(torch.zeros(5, dtype=torch.long)), images, **options, generator=seeded(3))
    noise = torch.empty(images.shape).uniform_(-2 * eps, 2 * eps, generator=seeded(3))
    step = eps * -net.weight.sign().float().reshape(1, 3, 4, 4)
    torch.testing.assert_close(adv, ((images + noise).clamp(0, 1) + step).clamp(0, 1))
    assert 2 * eps < (adv - images).abs().max() <= 3 * eps
    assert 0 <= adv.min() <= adv.max() <= 1


def test_a_wide_start_is_clipped_to_the_ball_where_that_is_asked():
    images = torch.full((50, 3, 8, 8), 0.5)
    wide = start_point(images, eps=0.1, start="uniform", scale=2.0, generator=seeded())
    on_the_edge = ((wide - images).abs() > 0.1 - 1e-6).float().mean()
    assert (wide - images).abs().max() <= 0.1 + 1e-6
    assert on_the_edge == pytest.approx(0.5, abs=0.02)


def test_an_initial_iterate_is_clipped_and_left_alone():
    images = torch.rand(4, 1, 4, 4, generator=seeded())
    initial = images + 0.3
    kept = initial.clone()
    objective = CrossEntropy(torch.zeros(4, dtype=torch.long))
    adv = pgd(Linear(16), objective, images, eps=0.1, step_size=0.1, num_steps=0, initial=initial)
    torch.testing.assert_close(adv, (images + 0.1).clamp(max=1))
    pgd(Linear(16), objective, images, eps=0.1, step_size=0.1, num_steps=2, initial=initial)
    assert torch.equal(initial, kept)


@pytest.mark.parametrize("accounting", ["any_iterate", "last_iterate"])
def test_measured_l2_robustness_of_a_linear_model_equals_its_margin(accounting):
    """An image is robust exactly if its distance to the plane is more than eps."""
    images = torch.rand(60, 1, 4, 4, generator=seeded(), dtype=torch.float64) * 0.4 + 0.3
    net = Linear(16)
    net.shift = float((images.flatten(1) @ net.weight).mean())
    labels = net(images).argmax(1)
    distance = net(images).amax(1) / net.weight.norm()
    eps = float(distance.median()) + 1e-3
    outcome = attack_images(
        net,
        images,
        labels,
        torch.ones(60, dtype=torch.bool),
        attack=Attack(num_steps=60, step_size=eps / 4),
        eps=eps,
        norm="l2",
        accounting=accounting,
        seed=0,
        batch_size=16,
    )
    clear = (distance - eps).abs() > 2e-3
    assert torch.equal(outcome.robust[clear], (distance > eps)[clear])
    assert 10 < outcome.robust.sum() < 50
