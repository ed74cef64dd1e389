"""Losses and inner objectives: values by hand, gradients by autograd and by finite differences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from proard.config import Student
from proard.losses import (
    INNER_OBJECTIVES,
    OBJECTIVES,
    Batch,
    CrossEntropy,
    KLBetweenNets,
    KLToTarget,
    Margin,
    absld_loss,
    adaad_loss,
    adr_loss,
    alpha_loss,
    fast_edge_loss,
    hat_loss,
    iad_loss,
    ikl_loss,
    kd_loss,
    kl_to_teacher,
    mart_loss,
    mix_logits,
    mtard_loss,
    rslad_loss,
    sat_loss,
    trades_loss,
    trust,
)

close = torch.testing.assert_close
LABELS = torch.tensor([0, 2, 1, 2])


def logits(seed=0, *, scale=2.0, classes=3):
    return scale * torch.randn(4, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


HALF_KL = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)  # KL((1/2, 1/2) || (1/4, 3/4)) = ln(4/3) / 2


def test_divergence_has_its_hand_computed_value():
    assert math.isclose(HALF_KL, 0.5 * math.log(4 / 3))
    close(kl_to_teacher(of(0.25, 0.75), of(0.5, 0.5)), torch.tensor([HALF_KL], dtype=torch.float64))


def test_rslad_has_its_hand_computed_value():
    teacher, clean, adv = of(0.5, 0.5), of(0.5, 0.5), of(0.25, 0.75)
    assert float(rslad_loss(clean, adv, teacher)) == pytest.approx(5 / 6 * HALF_KL)
    assert float(rslad_loss(adv, clean, teacher, adv_weight=0.25)) == pytest.approx(0.75 * HALF_KL)


def test_trades_has_its_hand_computed_value():
    clean, adv = of(0.5, 0.5), of(0.25, 0.75)
    expected = math.log(2) + 6 * HALF_KL
    assert float(trades_loss(clean, adv, torch.tensor([0]))) == pytest.approx(expected)


def test_sat_has_its_hand_computed_value():
    assert float(sat_loss(of(0.25, 0.75), torch.tensor([0]))) == pytest.approx(math.log(4))


def test_losses_average_over_images():
    one, two = rslad_loss(logits(0), logits(1), logits(2)), trades_loss(logits(0), logits(1), LABELS)
    doubled = [torch.cat([logits(seed), logits(seed)]) for seed in range(3)]
    close(rslad_loss(*doubled), one)
    close(trades_loss(doubled[0], doubled[1], torch.cat([LABELS, LABELS])), two)


def test_losses_do_not_average_over_classes():
    """Classes of probability 0 in both networks change nothing."""

    def wider(x):
        return torch.cat([x, torch.full((len(x), 7), -1e4, dtype=x.dtype)], 1)

    three = [logits(seed) for seed in range(3)]
    close(rslad_loss(*map(wider, three)), rslad_loss(*three))
    close(trades_loss(wider(three[0]), wider(three[1]), LABELS), trades_loss(three[0], three[1], LABELS))


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e5])
def test_equal_logits_give_zero_loss_and_finite_gradients(scale):
    teacher = logits(scale=scale).float()
    clean, adv = teacher.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss = rslad_loss(clean, adv, teacher)
    loss.backward()
    assert loss.item() == 0
    close(clean.grad, torch.zeros_like(clean), atol=1e-6, rtol=0)
    close(adv.grad, torch.zeros_like(adv), atol=1e-6, rtol=0)


def test_far_apart_logits_give_a_finite_loss_and_finite_gradients():
    student = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    loss = rslad_loss(student, student, torch.tensor([[-1e4, 0.0, 1e4]]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_no_gradient_flows_into_the_distillation_teacher():
    teacher, student = logits(0).requires_grad_(), logits(1).requires_grad_()
    rslad_loss(student, student * 2, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_trades_gradient_flows_through_both_branches():
    clean, adv = logits(0).requires_grad_(), logits(1).requires_grad_()
    trades_loss(clean, adv, LABELS).backward()
    with_divergence = clean.grad.clone()
    clean.grad = None
    trades_loss(clean, adv, LABELS, beta=0).backward()
    assert adv.grad.abs().sum() > 0
    assert not torch.allclose(with_divergence, clean.grad)
    assert torch.autograd.gradcheck(lambda a, b: trades_loss(a, b, LABELS), (clean, adv))


def test_rslad_gradient_is_that_of_the_closed_form():
    """The gradient of KL(t || s) with respect to the student's logits is s - t, over images and with its weight."""
    teacher, clean, adv = logits(0), logits(1).requires_grad_(), logits(2).requires_grad_()
    rslad_loss(clean, adv, teacher, adv_weight=0.8).backward()
    close(clean.grad, 0.2 * (clean.softmax(1) - teacher.softmax(1)).detach() / 4)
    close(adv.grad, 0.8 * (adv.softmax(1) - teacher.softmax(1)).detach() / 4)


INNER = {"kl": KLToTarget(logits(5)), "ce": CrossEntropy(LABELS), "margin": Margin(LABELS)}
INNER["kl_both"] = KLBetweenNets()


def given_to(name):
    """Logits as the objective takes them: of one network, or of student and teacher side by side."""
    return torch.cat([logits(1), logits(6)], 1) if name == "kl_both" else logits(1)


@pytest.mark.parametrize("name", INNER)
def test_closed_form_logit_gradient_equals_autograd_and_finite_differences(name):
    objective, x = INNER[name], given_to(name).requires_grad_()
    (by_autograd,) = torch.autograd.grad(objective(x).sum(), x)
    closed = objective.logit_gradient(x.detach())
    close(closed, by_autograd, rtol=1e-6, atol=1e-7)  # a target is kept in float32
    step, differences = 1e-6, torch.zeros_like(closed)
    for index in range(x.shape[1]):
        shift = torch.zeros_like(x)
        shift[:, index] = step
        differences[:, index] = (objective(x + shift) - objective(x - shift)).detach() / (2 * step)
    close(closed, differences, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", INNER)
def test_objectives_give_one_value_per_image_and_leave_the_logits_alone(name):
    x = given_to(name)
    before = x.clone()
    assert INNER[name](x).shape == (4,)
    assert INNER[name].logit_gradient(x).shape == x.shape
    assert torch.equal(x, before)


def test_margin_is_positive_exactly_where_the_image_is_misclassified():
    x = torch.cat([logits(seed) for seed in range(20)])
    labels = LABELS.repeat(20)
    assert torch.equal(Margin(labels)(x) > 0, x.argmax(1) != labels)


def test_divergence_to_a_target_ignores_the_target_s_graph():
    target = logits(0).requires_grad_()
    x = logits(1).requires_grad_()
    KLToTarget(target)(x).sum().backward()
    assert target.grad is None


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_mixed_logits_are_the_mixed_probabilities(weight):
    first, second = logits(0), logits(1)
    mixed = mix_logits(first, second, first_weight=weight)
    close(mixed.softmax(1), weight * first.softmax(1) + (1 - weight) * second.softmax(1))


def test_mixed_logits_of_a_certain_network_stay_finite():
    certain = torch.tensor([[1e4, 0.0, -1e4]])
    assert torch.isfinite(mix_logits(certain, certain, first_weight=0.5)).all()


def batch_with(fields, *, classes=3, **more):
    """A batch with these fields and no others: images of 2 x 2 pixels under a linear network."""
    weight = torch.randn(4, classes, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    images = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(8), dtype=torch.float64).requires_grad_()
    adversarial = (images + 0.05).detach().requires_grad_()
    weight.requires_grad_()
    values = {
        "clean": images.flatten(1) @ weight,
        "adv": adversarial.flatten(1) @ weight,
        "images": images,
        "adversarial": adversarial,
        "teacher_gradient": torch.full_like(images, 0.1).detach(),
        "teacher_gradient_adv": torch.full_like(images, 0.2).detach(),
    }
    values |= {name: logits(seed) for seed, name in enumerate(sorted(fields - values.keys()))}
    return Batch(LABELS, **{name: values[name] for name in fields | {"images", "adversarial"}}, **more), weight


def loss_of(objective, batch, options):
    """As a training step computes it."""
    if objective.memory is not None:
        memory = objective.memory(batch.clean.shape[1], **options)
        batch = replace(batch, memory=memory)
        batch = replace(batch, memory=objective.remember(batch, **options))
    return objective.loss(batch, **options), batch


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_computes_from_what_it_says_it_needs(name):
    objective = OBJECTIVES[name]
    options = Student(name="s", loss=name).loss.options
    batch, weight = batch_with(objective.needs, progress=0.5)
    loss, batch = loss_of(objective, batch, options)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0
    if objective.inner is not None:
        fields = {"kl_clean": "clean", "kl_teacher": "teacher", "kl_class": "teacher"}.get(objective.inner)
        known = Batch(LABELS, memory=batch.memory, **({fields: logits(1)} if fields else {}))
        both = torch.cat([logits(3), logits(4)], 1) if objective.inner == "kl_teacher_adv" else logits(3)
        assert INNER_OBJECTIVES[objective.inner](known)(both).shape == (4,)


SOFT = {"soft_weight": 0.7, "temperature": 2.0}
TRUSTING = {**SOFT, "trust_power": 0.1, "trust_after": 0.3}
SHARES = {"adv_share": torch.full((1,), 0.3, dtype=torch.float64)}
TEMPERATURES = {name: torch.tensor([1.0, 0.7, 2.0]) for name in ("clean_temperature", "adv_temperature")}
CLASS_WEIGHTS = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.4, 0.5]], dtype=torch.float64)
RANGE = {"temperature_rate": 0.1, "temperature_min": 0.5, "temperature_max": 5.0}
ALPHA = {"adv_weight": 0.3, "alpha_min": -1.0, "alpha_max": 0.5, "ratio_clip": 4.0}
WRITTEN_OUT = {  # options, and what the objective is in the functions of the package, batch `b` by batch
    "plain": ({}, lambda b: F.cross_entropy(b.clean, LABELS)),
    "pgd_at": ({}, lambda b: sat_loss(b.adv, LABELS)),
    "sat": ({}, lambda b: sat_loss(b.adv, LABELS)),
    "trades": ({"beta": 3.0}, lambda b: trades_loss(b.clean, b.adv, LABELS, beta=3.0)),
    "mart": ({"beta": 3.0}, lambda b: mart_loss(b.clean, b.adv, LABELS, beta=3.0)),
    "hat": (
        {"beta": 3.0, "helper_weight": 0.4},
        lambda b: hat_loss(b.clean, b.adv, b.beyond, LABELS, b.control_adv, beta=3.0, helper_weight=0.4),
    ),
    "kd": (SOFT, lambda b: kd_loss(b.clean, b.clean, b.teacher, LABELS, **SOFT)),
    "ikl": (
        {"soft_weight": 2.0, "beta": 3.0, "temperature": 4.0},
        lambda b: ikl_loss(b.clean, b.adv, LABELS, CLASS_WEIGHTS, soft_weight=2.0, beta=3.0),
    ),
    "adr": (
        {"soft_weight": (0.6, 0.8), "temperature": (3.0, 1.0)},  # half way: 0.7 and 2
        lambda b: adr_loss(b.adv, b.average, LABELS, soft_weight=0.7, temperature=2.0),
    ),
    "akd": (SOFT, lambda b: kd_loss(b.clean, b.adv, b.teacher_adv, LABELS, **SOFT)),
    "ard": (SOFT, lambda b: kd_loss(b.clean, b.adv, b.teacher, LABELS, **SOFT)),
    "iad": (
        TRUSTING,
        lambda b: iad_loss(b.clean, b.adv, b.teacher, LABELS, trust(b.teacher_adv, LABELS), **SOFT),
    ),
    "adaiad": (
        TRUSTING,
        lambda b: iad_loss(b.clean, b.adv, b.teacher_adv, LABELS, trust(b.teacher_adv, LABELS), **SOFT),
    ),
    "rslad": ({"adv_weight": 0.3}, lambda b: rslad_loss(b.clean, b.adv, b.teacher, adv_weight=0.3)),
    "adaad": (
        {"adv_weight": 0.3},
        lambda b: adaad_loss(b.clean, b.adv, b.teacher, b.teacher_adv, adv_weight=0.3),
    ),
    "mtard": (
        {"balance_rate": 0.025},
        lambda b: mtard_loss(b.clean, b.adv, b.control, b.teacher_adv, adv_share=SHARES["adv_share"]),
    ),
    "absld": (
        {"adv_weight": 0.3, **RANGE},
        lambda b: absld_loss(b.clean, b.adv, b.teacher, LABELS, *TEMPERATURES.values(), adv_weight=0.3),
    ),
    "alpha": (ALPHA, lambda b: alpha_loss(b.clean, b.adv, b.teacher, **ALPHA)),
    "fast_edge": ({"beta": 3.0}, lambda b: fast_edge_loss(b.clean, b.adv, b.teacher, LABELS, beta=3.0)),
}
LOGITS = ("clean", "adv", "teacher", "teacher_adv", "beyond", "control", "control_adv", "average")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_asks_every_network_where_it_should(name):
    """All logits differ, so that swapped ones change results."""
    options, expected = WRITTEN_OUT[name]
    values = {field: logits(seed) for seed, field in enumerate(LOGITS)}
    batch = Batch(LABELS, **values, progress=0.5, memory=SHARES | TEMPERATURES | {"class_weights": CLASS_WEIGHTS})
    close(OBJECTIVES[name].loss(batch, **options), expected(batch))
    for field in set(LOGITS) & OBJECTIVES[name].needs:
        moved = replace(batch, **{field: values[field] + logits(20)})
        assert float(OBJECTIVES[name].loss(moved, **options)) != pytest.approx(float(expected(batch))), field


def test_divergence_grows_when_an_unsure_network_becomes_surer_of_the_truth():
    unsure = torch.tensor([[0.3, 0.0, 0.0]])
    label = torch.tensor([0])
    surer, wrong = unsure + torch.tensor([[2.0, 0.0, 0.0]]), unsure + torch.tensor([[0.0, 0.9, 0.0]])
    divergence, cross_entropy = KLToTarget(unsure), CrossEntropy(label)
    assert divergence(surer) > divergence(wrong)  # an adversary that ascends it helps the network here
    assert cross_entropy(surer) < cross_entropy(unsure) < cross_entropy(wrong)
