"""The measuring attack: equal to an attack image by image, its accounting, targets and noise."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import random_archs, random_images, random_supernet, tiny_space
from torch import nn

from proard.artifacts import wilson
from proard.config import Attack
from proard.data import keyed_generator
from proard.evaluation import attack_images, clean_correct
from proard.evaluation.adversary import strongest_wrong
from proard.nets import extract, fold

EPS = 0.1
CE = Attack(name="ce", num_steps=4, step_size=0.04)
CW = Attack(name="cw", objective="margin", num_steps=3, step_size=0.05, restarts=2)
TARGETED = Attack(name="towards", objective="targeted", targets=2, num_steps=4, step_size=("eps", "eps/4"))


class Linear(nn.Module):
    """Two logits +-(w.x - b)."""

    def __init__(self, pixels=16):
        super().__init__()
        self.weight = torch.randn(pixels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def forward(self, images):
        score = (images.flatten(1) - 0.5) @ self.weight
        return torch.stack([score, -score], 1)


def linear_problem(count=60):
    images = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = Linear()
    labels = net(images).argmax(1)
    labels[::7] = 1 - labels[::7]  # these are wrong without any attack
    return net, images, labels


def network_problem(count=40):
    """A random network in float64, so that the size of a batch cannot change a sign of its gradient."""
    space = tiny_space()
    net = fold(extract(random_supernet(space).eval(), space.largest), dtype=torch.float64)
    images = random_images(space, count)
    labels = net(images).argmax(1)
    labels[::9] = (labels[::9] + 1) % 3
    return net, images, labels


def attacked(problem, attack=CE, *, eps=EPS, accounting="any_iterate", seed=0, batch_size=64):
    net, images, labels = problem
    correct = clean_correct(net, images, labels, batch_size=batch_size)
    options = {"attack": attack, "eps": eps, "accounting": accounting, "seed": seed, "batch_size": batch_size}
    return correct, attack_images(net, images, labels, correct, **options)


@pytest.mark.parametrize("accounting", ["any_iterate", "last_iterate"])
@pytest.mark.parametrize("objective", ["ce", "margin"])
def test_attack_on_a_linear_model_equals_brute_force(accounting, objective):
    net, images, labels = linear_problem()
    attack = Attack(objective=objective, num_steps=10, step_size=EPS / 4)
    correct, outcome = attacked((net, images, labels), attack, accounting=accounting)
    towards = torch.where(labels == 0, -1.0, 1.0)[:, None, None, None] * net.weight.sign().reshape(1, 1, 4, 4)
    worst = (images + EPS * towards).clamp(0, 1)
    expected = correct & (net(worst).argmax(1) == labels)
    assert torch.equal(outcome.robust, expected)
    assert 0 < expected.sum() < correct.sum() < len(images)


@pytest.mark.parametrize("accounting", ["any_iterate", "last_iterate"])
@pytest.mark.parametrize("attack", [CE, CW, TARGETED], ids=["ce", "cw", "targeted"])
def test_size_of_the_working_set_changes_nothing(accounting, attack):
    problem = network_problem()
    results = [attacked(problem, attack, eps=0.03, accounting=accounting, batch_size=size)[1] for size in (1, 7, 64)]
    assert all(torch.equal(result.robust, results[0].robust) for result in results)
    assert len({result.gradients for result in results}) == 1
    assert 0 < results[0].robust.sum() < len(problem[1])


def slow_attack(net, image, label, noise, attack, accounting):
    """One image, one restart, written out."""
    adv, wrong = (image + noise).clamp(0, 1), []
    for step in range(attack.num_steps + 1):
        x = adv[None].clone().requires_grad_()
        logits = net(x)
        wrong.append(bool(logits.argmax(1) != label))
        if step < attack.num_steps:
            loss = nn.functional.cross_entropy(logits, label[None])
            (gradient,) = torch.autograd.grad(loss, x)
            adv = adv + attack.step_size * gradient[0].sign()  # in pixel units here
            adv = torch.minimum(torch.maximum(adv, image - 0.03), image + 0.03).clamp(0, 1)
    return any(wrong) if accounting == "any_iterate" else wrong[-1]


@pytest.mark.parametrize("accounting", ["any_iterate", "last_iterate"])
def test_attack_equals_an_image_by_image_reference(accounting):
    net, images, labels = network_problem(20)
    attack = Attack(num_steps=3, step_size=0.02)
    correct, outcome = attacked((net, images, labels), attack, eps=0.03, accounting=accounting, batch_size=6)
    noise = torch.empty(images.shape).uniform_(-0.03, 0.03, generator=keyed_generator(0, 0))
    triples = zip(images, labels, noise, strict=True)
    fallen = [slow_attack(net, *triple, attack, accounting) for triple in triples]
    assert outcome.robust.tolist() == [bool(c) and not f for c, f in zip(correct, fallen, strict=True)]


def slow_targeted(net, image, label, noises, attack, accounting, *, eps=0.03):
    """One image and all its targets, written out; which target was reached first, and how many gradients it took."""
    ranked = [c for c in net(image[None])[0].argsort(descending=True).tolist() if c != label][: attack.targets]
    spent = 0
    for target, noise in zip(ranked, noises, strict=False):
        adv, wrong = (image + noise).clamp(0, 1), []
        for step in range(attack.num_steps + 1):
            x = adv[None].clone().requires_grad_()
            logits = net(x)
            spent += step < attack.num_steps
            wrong.append(bool(logits.argmax(1) != label))
            if wrong[-1] and accounting == "any_iterate":
                return target, spent
            (gradient,) = torch.autograd.grad(logits[0, target] - logits[0, label], x)
            length = eps if step < attack.num_steps / 2 else eps / 4
            adv = adv + length * gradient[0].sign()
            adv = torch.minimum(torch.maximum(adv, image - eps), image + eps).clamp(0, 1)
        if wrong[-1]:
            return target, spent
    return None, spent


@pytest.mark.parametrize("accounting", ["any_iterate", "last_iterate"])
def test_a_targeted_attack_equals_a_plain_loop_over_images_and_targets(accounting):
    net, images, labels = network_problem(30)
    correct, outcome = attacked((net, images, labels), TARGETED, eps=0.03, accounting=accounting, batch_size=6)
    noises = [torch.empty(images.shape).uniform_(-0.03, 0.03, generator=keyed_generator(0, turn, 1)) for turn in (0, 1)]
    found = [
        slow_targeted(net, image, label, [noise[place] for noise in noises], TARGETED, accounting)
        for place, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    expected = [bool(c) and target is None for c, (target, _) in zip(correct, found, strict=True)]
    assert outcome.robust.tolist() == expected
    assert outcome.gradients == sum(spent for c, (_, spent) in zip(correct, found, strict=True) if c)
    assert 0 < sum(expected) < int(correct.sum())
    assert len({target for target, _ in found}) >= 3, "images became wrong towards fewer than two classes"


def test_targets_are_the_wrong_classes_of_highest_logit():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0], [1.0, 5.0, 0.0, 2.0]])
    images, labels, chosen = torch.zeros(3, 1, 1, 1), torch.tensor([0, 2, 3]), torch.tensor([True, False, True])
    kept = iter(logits[chosen].split(1))
    found = strongest_wrong(lambda _: next(kept), images, labels, chosen, 2, batch_size=1)
    assert found.tolist() == [[2, 1], [0, 0], [1, 0]]
    kept = iter([logits[chosen]])
    assert strongest_wrong(lambda _: next(kept), images, labels, chosen, 9, batch_size=5).shape == (3, 3)
    assert len(strongest_wrong(lambda _: None, images, labels, chosen & False, 2, batch_size=1)) == 3


def test_a_targeted_attack_spends_nothing_on_images_that_fell_before():
    net, images, labels = network_problem()
    first = attacked((net, images, labels), CE, eps=0.03)[1]
    seen = []

    def watch(batch):
        seen.extend((batch[:, None] - images).abs().flatten(2).amax(2).argmin(1).tolist())
        return net(batch)

    options = {"eps": 0.03, "accounting": "any_iterate", "seed": 0, "batch_size": 64}
    second = attack_images(watch, images, labels, first.robust, attack=TARGETED, **options)
    assert set(seen) == set(first.robust.nonzero()[:, 0].tolist())
    assert not (second.robust & ~first.robust).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_iterates_of_a_schedule_stay_in_the_ball_and_take_its_lengths(norm):
    net, images, labels = network_problem(12)
    eps, iterates = 0.2, []

    def remember(batch):
        iterates.append(batch.detach().clone())
        return net(batch)

    attack = Attack(objective="targeted", targets=1, num_steps=3, step_size=("eps/8", 0.01), start="zero")
    correct = net(images).argmax(1) == labels
    options = {"eps": eps, "norm": norm, "accounting": "last_iterate", "seed": 0, "batch_size": 64}
    attack_images(remember, images, labels, correct, attack=attack, **options)
    points = torch.stack(iterates[1:])  # the first pass ranks the targets
    moved, order = (points[1:] - points[:-1]).flatten(2), {"linf": torch.inf, "l2": 2}[norm]
    lengths = torch.linalg.vector_norm(moved, ord=order, dim=2)
    wanted = torch.tensor([eps / 8, eps / 8, 0.01], dtype=lengths.dtype)[:, None]
    assert (lengths <= wanted + 1e-9).all()
    torch.testing.assert_close(lengths.amax(1, keepdim=True), wanted)  # clipping to the pixel range only shortens
    assert torch.linalg.vector_norm((points - points[0]).flatten(2), ord=order, dim=2).max() <= eps + 1e-9


class Doubting(nn.Module):
    """A network whose rounded copy has the right gradients and misclassifies every image."""

    def __init__(self, net, labels):
        super().__init__()
        self.net, self.wrong = net, labels

    def forward(self, images):
        return self.net(images)

    def rounded(self, dtype):
        assert dtype is torch.bfloat16
        return lambda images: -self.net(images)


@pytest.mark.parametrize("accounting", ["any_iterate", "last_iterate"])
def test_an_image_falls_by_the_exact_logits_alone(accounting):
    net, images, labels = network_problem(20)
    doubting = Doubting(net, labels)
    attack = Attack(num_steps=3, step_size=1e-6, dtype="bfloat16")  # too small a step to fell anything
    correct, outcome = attacked((doubting, images, labels), attack, eps=1e-6, accounting=accounting, batch_size=6)
    assert torch.equal(outcome.robust, correct)
    standing = int(correct.sum())
    assert outcome.gradients == 3 * standing
    assert outcome.forwards == standing * (1 + 3 * (accounting == "any_iterate"))


def test_a_rounded_attack_fells_nearly_the_same_images():
    problem = network_problem(200)
    exact, rounded = (attacked(problem, Attack(num_steps=5, dtype=d), eps=0.03)[1] for d in ("float32", "bfloat16"))
    assert 0.1 < exact.robust.double().mean() < 0.9
    assert (exact.robust != rounded.robust).double().mean() < 0.03
    net = problem[0].rounded(torch.float64)
    assert torch.equal(net(problem[1]), problem[0](problem[1]))


def test_any_iterate_is_at_least_as_strict_as_last_iterate():
    problem = network_problem()
    coarse = Attack(num_steps=5, step_size=0.06)  # steps larger than the ball
    any_, last = (attacked(problem, coarse, eps=0.03, accounting=a)[1] for a in ("any_iterate", "last_iterate"))
    assert not (any_.robust & ~last.robust).any()
    assert any_.gradients <= last.gradients


@pytest.mark.parametrize("accounting", ["any_iterate", "last_iterate"])
def test_a_gradient_is_taken_for_every_step_and_none_to_look_at_the_last_iterate(accounting):
    net, images, labels = network_problem(20)
    forwards = []
    handle = net.register_forward_hook(
        lambda module, inputs, logits: forwards.append((len(logits), torch.is_grad_enabled()))
    )
    attack = Attack(num_steps=3, step_size=1e-6, restarts=2)  # too small a step to fell anything
    correct, outcome = attacked((net, images, labels), attack, eps=1e-6, accounting=accounting, batch_size=6)
    handle.remove()
    standing = int(correct.sum())
    assert torch.equal(outcome.robust, correct)
    assert outcome.gradients == 2 * 3 * standing
    assert sum(size for size, with_gradient in forwards if not with_gradient) == len(images) + 2 * standing


def test_more_restarts_never_help_the_network():
    problem = network_problem()
    standing = None
    for restarts in (1, 2, 5):
        attack = Attack(num_steps=1, step_size=0.01, restarts=restarts)
        outcome = attacked(problem, attack, eps=0.02)[1]
        if standing is not None:
            assert not (outcome.robust & ~standing).any()
        standing = outcome.robust


def test_robust_images_are_correct_and_shrink_with_eps():
    problem = network_problem()
    before = None
    for eps in (1e-6, 0.02, 0.3):
        correct, outcome = attacked(problem, Attack(num_steps=5, step_size=eps / 2), eps=eps)
        assert not (outcome.robust & ~correct).any()
        if before is None:
            assert torch.equal(outcome.robust, correct)
        else:
            assert outcome.robust.sum() < before.sum()
        before = outcome.robust


def test_one_seed_one_result_and_labels_and_images_stay():
    net, images, labels = network_problem()
    kept = images.clone(), labels.clone()
    attack = Attack(num_steps=1, step_size=0.005)
    results = [attacked((net, images, labels), attack, eps=0.03, seed=seed)[1].robust for seed in (0, 0, 1)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert torch.equal(images, kept[0])
    assert torch.equal(labels, kept[1])


def test_start_noise_is_the_same_for_every_arch():
    """Same images, same noise, in the same order, so that differences between archs are precise."""
    space = tiny_space()
    supernet, images = random_supernet(space).eval(), random_images(space, 12)
    starts = []
    for arch in random_archs(space, 3):
        seen, net = {}, fold(extract(supernet, arch), dtype=torch.float64)
        labels = net(images).argmax(1)

        def remember(batch, seen=seen, net=net):
            for image in batch.detach():
                seen.setdefault(int((images - image).abs().amax((1, 2, 3)).argmin()), image.clone())
            return net(batch)

        correct = torch.ones(12, dtype=torch.bool)
        attack = Attack(num_steps=1, step_size=1e-4)
        options = {"eps": 0.01, "accounting": "last_iterate", "seed": 4, "batch_size": 5}
        attack_images(remember, images, labels, correct, attack=attack, **options)
        starts.append(torch.stack([seen[index] for index in range(12)]))
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2])


def test_wilson_interval_has_its_hand_computed_value():
    assert wilson(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)


def test_clean_accuracy_does_not_depend_on_the_batch_size():
    net, images, labels = network_problem()
    results = [clean_correct(net, images, labels, batch_size=size) for size in (1, 7, 100)]
    assert all(map(partial(torch.equal, results[0]), results))
    assert results[0].tolist() == [index % 9 != 0 for index in range(len(images))]
