"""Measurement: the attack on images not yet misclassified, its accounting, rows, recalibrated subnets, the cache."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers import image_sets, random_archs, random_images, random_supernet, tiny_space
from torch import nn

from proard.artifacts import MEASURED, wilson
from proard.config import Attack, Measurement, Threat
from proard.data import ImageSet, keyed_generator, to_float
from proard.evaluation import Conditions, SubnetMeter, attack_images, clean_correct, measure, rows_of
from proard.evaluation.adversary import strongest_wrong
from proard.nets import extract, fold, recalibrate

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


def test_a_targeted_attack_spends_nothing_on_images_that_fell_before(sets):
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


# Rows and the meter: a random network on real image sets.


class Counting(nn.Module):
    """Counts the images that a network sees."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, 0

    def forward(self, images):
        self.seen += len(images)
        return self.net(images)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return image_sets(tmp_path_factory.mktemp("sets"), train=40, val=30)


class Meter(SubnetMeter):
    """A meter whose networks count."""

    def _student(self, arch):
        self.net = Counting(super()._student(arch))
        return self.net


def meter(sets, folder, **changes):
    usual = {"threat": Threat(eps=EPS), "measurement": Measurement(recalibration_images=20, batch_size=10), "seed": 0}
    conditions = Conditions(**{name: changes.pop(name, value) for name, value in usual.items()})
    options = {"checksum": "abc", "conditions": conditions, **changes}
    net = random_supernet(tiny_space(), dtype=torch.float32)
    return Meter(net, train=options.pop("train", sets["train"]), cache=folder, **options)


def without_seconds(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_second_measurement_comes_from_the_cache_without_a_forward(sets, tmp_path):
    arch = tiny_space().largest
    first, second = meter(sets, tmp_path), meter(sets, tmp_path)
    fresh = first.rows(arch, sets["val"], [CE, CW], worst=True)
    assert first.net.seen > 0
    assert second.rows(arch, sets["val"], [CE, CW], worst=True) == fresh  # the recorded seconds too
    assert not hasattr(second, "net"), "a network was built"
    extra = Attack(name="more", num_steps=1)
    assert [row["attack"] for row in second.rows(arch, sets["val"], [CE, extra, CW])] == ["ce", "more", "cw"]
    assert 0 < second.net.seen < first.net.seen, "more than the missing attack was run"


def test_a_targeted_attack_continues_with_what_the_attacks_before_it_left(sets, tmp_path):
    arch = tiny_space().largest
    first, second = meter(sets, tmp_path), meter(sets, tmp_path)
    first.measure(arch, sets["val"], [CE])
    found = first.measure(arch, sets["val"], [CE, TARGETED, CW])  # cross-entropy's comes from the cache
    assert not (found["towards"]["robust"] & ~found["ce"]["robust"]).any()
    (*_, worst) = first.rows(arch, sets["val"], [CE, TARGETED, CW], worst=True)
    assert worst["robust_acc"] <= min(entry["robust"].mean() for entry in found.values())
    assert worst["gradients"] == sum(entry["gradients"] for entry in found.values())
    whole = measure(first.student(arch), sets["val"], [CE, TARGETED, CW], first.conditions)
    assert all(np.array_equal(whole[name]["robust"], entry["robust"]) for name, entry in found.items())
    assert {name: entry["gradients"] for name, entry in whole.items()} == {
        name: entry["gradients"] for name, entry in found.items()
    }
    second.measure(arch, sets["val"], [CE, CW, TARGETED])  # after two attacks it is another measurement
    assert second.net.seen > 0
    again = meter(sets, tmp_path)
    again.measure(arch, sets["val"], [CE, TARGETED])
    assert not hasattr(again, "net")


def test_a_schedule_stands_in_the_rows(sets):
    rows = meter(sets, None).rows(tiny_space().smallest, sets["val"], [CE, TARGETED], worst=True)
    shown = [(row.get("step_size"), row.get("last_step_size"), row.get("targets")) for row in rows]
    assert shown == [(0.04, 0.04, None), (EPS, EPS / 4, 2), (None, None, None)]


def test_renamed_attack_is_the_same_measurement(sets, tmp_path):
    arch = tiny_space().smallest
    meter(sets, tmp_path).rows(arch, sets["val"], [CE])
    again = meter(sets, tmp_path)
    (row,) = again.rows(arch, sets["val"], [CE.model_copy(update={"name": "other"})])
    assert row["attack"] == "other"
    assert not hasattr(again, "net")


@pytest.mark.parametrize(
    "changes",
    [
        {"checksum": "another supernet"},
        {"seed": 1},
        {"threat": Threat(eps=EPS / 2)},
        {"measurement": Measurement(recalibration_images=20, batch_size=10, accounting="last_iterate")},
        {"measurement": Measurement(recalibration_images=30, batch_size=10)},
    ],
    ids=["supernet", "seed", "eps", "accounting", "recalibration"],
)
def test_whatever_a_measurement_depends_on_makes_a_new_one(sets, tmp_path, changes):
    arch = tiny_space().smallest
    meter(sets, tmp_path).rows(arch, sets["val"], [CE])
    other = meter(sets, tmp_path, **changes)
    other.rows(arch, sets["val"], [CE])
    assert other.net.seen > 0


def test_other_images_archs_and_attacks_make_a_new_measurement(sets, tmp_path):
    arch, val = tiny_space().smallest, sets["val"]
    meter(sets, tmp_path).rows(arch, val, [CE])
    swapped = val.take([1, 0, *range(2, len(val))])
    more = CE.model_copy(update={"num_steps": 5})
    for changed in ((arch, val.first(29), [CE]), (arch, swapped, [CE]), (arch, val, [more])):
        again = meter(sets, tmp_path)
        again.rows(*changed)
        assert again.net.seen > 0
    again = meter(sets, tmp_path)
    again.rows(tiny_space().largest, val, [CE])
    assert again.net.seen > 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "7",
        lambda text: "\x00" * len(text),
        lambda text: json.dumps({**json.loads(text), "clean": "zz"}),
        lambda text: json.dumps({**json.loads(text), "clean": None}),
        lambda text: json.dumps({**json.loads(text), "robust": json.loads(text)["robust"][:-2]}),
        lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != "gradients"}),
        lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != "seconds"}),
    ],
    ids=["empty", "half", "list", "number", "zeros", "letters", "null", "short", "no_gradients", "no_seconds"],
)
def test_damaged_cache_file_is_measured_again(sets, tmp_path, damage):
    arch = tiny_space().smallest
    fresh = meter(sets, tmp_path).rows(arch, sets["val"], [CE])
    (path,) = tmp_path.rglob("*.json")
    path.write_text(damage(path.read_text()))
    again = meter(sets, tmp_path)
    assert without_seconds(again.rows(arch, sets["val"], [CE])) == without_seconds(fresh)
    assert again.net.seen > 0
    healed = meter(sets, tmp_path)
    healed.rows(arch, sets["val"], [CE])
    assert not hasattr(healed, "net")


def test_meter_without_a_cache_writes_nothing_and_finds_the_same(sets, tmp_path):
    arch = tiny_space().smallest
    rows = meter(sets, None).rows(arch, sets["val"], [CE])
    assert not list(tmp_path.iterdir())
    assert without_seconds(rows) == without_seconds(meter(sets, tmp_path).rows(arch, sets["val"], [CE]))


def test_measured_network_is_extracted_recalibrated_and_folded(sets):
    measured = meter(sets, None)
    arch = random_archs(tiny_space(), 1)[0]
    net = extract(measured.supernet, arch)
    recalibrate(net, to_float(sets["train"].images[:20]), batch_size=10)
    images = to_float(sets["val"].images)
    torch.testing.assert_close(measured.student(arch)(images), net(images), rtol=1e-4, atol=1e-4)


def test_rows_have_the_contract_s_columns_and_costs(sets):
    arch = tiny_space().largest
    rows = meter(sets, None).rows(arch, sets["val"], [CE, CW], worst=True)
    spec = tiny_space().spec(arch)
    assert [row["attack"] for row in rows] == ["ce", "cw", "worst"]
    for row in rows:
        assert set(MEASURED) - set(row) <= {"step_size", "last_step_size", "targets"}
        assert set(row) <= set(MEASURED)
        assert (row["macs"], row["params"], row["split"], row["num_images"]) == (spec.macs, spec.params, "val", 30)
        assert row["robust_acc"] <= row["clean_acc"]
        for kind in ("clean", "robust"):
            accuracy = row[f"{kind}_acc"]
            assert row[f"{kind}_acc_low"] <= accuracy <= row[f"{kind}_acc_high"]
            assert math.isclose((row[f"{kind}_acc_half_a"] + row[f"{kind}_acc_half_b"]) / 2, accuracy)
    assert (rows[1]["num_steps"], rows[1]["restarts"], rows[1]["eps"]) == (3, 2, EPS)


def test_worst_row_is_the_conjunction_image_by_image():
    clean = np.array([True, True, True, True, False, True])
    masks = {"a": [1, 1, 0, 0, 0, 1], "b": [1, 0, 1, 0, 0, 1]}
    measured = {
        name: {"clean": clean, "robust": np.array(mask, bool), "gradients": 10, "seconds": 1.0}
        for name, mask in masks.items()
    }
    rows = rows_of(
        measured,
        space=tiny_space(),
        arch=tiny_space().smallest,
        split="test",
        attacks=[Attack(name="a", num_steps=3, restarts=2), Attack(name="b", num_steps=5)],
        conditions=Conditions(Threat(), Measurement(), 0),
        worst=True,
    )
    assert [row["robust_acc"] for row in rows] == [3 / 6, 3 / 6, 2 / 6]
    assert [row["clean_acc"] for row in rows] == [5 / 6] * 3
    assert (rows[2]["num_steps"], rows[2]["restarts"], rows[2]["gradients"]) == (5, 3, 20)
    assert rows[2]["robust_acc_half_a"] == 1 / 3  # images 0, 2, 4: the first one is robust
    assert rows[2]["robust_acc_half_b"] == 1 / 3  # images 1, 3, 5: the last one


def test_measure_agrees_with_a_plain_count(sets):
    images: ImageSet = sets["val"]
    space = tiny_space()
    net = fold(extract(random_supernet(space, dtype=torch.float32).eval(), space.largest)).eval()
    conditions = Conditions(Threat(eps=1e-6), Measurement(batch_size=7), 0)
    entry = measure(net, images, [Attack(name="none", num_steps=1, step_size=1e-6)], conditions)["none"]
    expected = (net(to_float(images.images)).argmax(1) == images.labels).numpy()
    assert np.array_equal(entry["clean"], expected)
    assert np.array_equal(entry["robust"], expected)


def test_clean_accuracy_does_not_depend_on_the_batch_size():
    net, images, labels = network_problem()
    results = [clean_correct(net, images, labels, batch_size=size) for size in (1, 7, 100)]
    assert all(map(partial(torch.equal, results[0]), results))
    assert results[0].tolist() == [index % 9 != 0 for index in range(len(images))]
