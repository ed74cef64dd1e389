"""Distillation losses and input-gradient terms: values by hand, gradients by finite differences."""

from __future__ import annotations

import inspect
import math
from unittest import mock

import pytest
import torch

from proard import losses
from proard.config import Phase, TrainTeacher
from proard.config.losses import Rslad, Trades
from proard.losses import OBJECTIVES, Batch, with_igdm, with_kdiga
from proard.losses import alignment as alignment_module

close = torch.testing.assert_close
LABELS = torch.tensor([0, 2, 1, 2])
CLASS_WEIGHTS = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.4, 0.5]], dtype=torch.float64)
FIRST = torch.tensor([0])
ROOT3 = math.sqrt(3)


def logits(seed=0, *, scale=2.0):
    return scale * torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


EVEN, QUARTER = of(0.5, 0.5), of(0.25, 0.75)
KL = 0.5 * math.log(4 / 3)  # KL((1/2, 1/2) || (1/4, 3/4))
SOFT_KL = 2 * math.log((1 + ROOT3) ** 2 / (4 * ROOT3))  # at temperature 2 the quarter is (1, sqrt 3) / (1 + sqrt 3)
SHARP = 1 / (1 + ROOT3)
TEMPERED = SHARP * math.log(2 * SHARP) + (1 - SHARP) * math.log(2 * (1 - SHARP))  # KL(that || (1/2, 1/2))
ONE = torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (lambda: losses.mart_loss(EVEN, QUARTER, FIRST), 2 * math.log(4) + 6 * 0.5 * KL),
        (lambda: losses.mart_loss(of(0.5, 0.3, 0.2), of(0.5, 0.3, 0.2), FIRST), math.log(2) - math.log(0.7)),
        (
            lambda: losses.hat_loss(EVEN, QUARTER, QUARTER, FIRST, of(0.1, 0.9)),
            math.log(2) + 2.5 * KL + 0.5 * math.log(4 / 3),
        ),
        (lambda: losses.kd_loss(EVEN, QUARTER, EVEN, FIRST), 0.5 * KL + 0.5 * math.log(2)),
        (lambda: losses.kd_loss(EVEN, QUARTER, EVEN, FIRST, soft_weight=1, temperature=2), SOFT_KL),
        (lambda: losses.iad_loss(EVEN, QUARTER, EVEN, FIRST, torch.tensor([0.25])), 1.75 * KL),
        (
            lambda: losses.iad_loss(EVEN, QUARTER, EVEN, FIRST, torch.tensor([1.0]), soft_weight=0.6, temperature=2),
            0.6 * SOFT_KL + 0.4 * math.log(2),
        ),
        (lambda: losses.trust(QUARTER, FIRST, trust_power=0.5), 0.5),
        (lambda: losses.adaad_loss(QUARTER, QUARTER, QUARTER, EVEN, adv_weight=0.8), 0.8 * KL),
        (lambda: losses.adaad_loss(QUARTER, EVEN, EVEN, EVEN, adv_weight=0.8), 0.2 * KL),
        (lambda: losses.mtard_loss(EVEN, QUARTER, EVEN, EVEN, adv_share=torch.tensor([0.6])), 0.6 * KL),
        (lambda: losses.mtard_loss(QUARTER, EVEN, EVEN, EVEN, adv_share=torch.tensor([0.6])), 0.4 * KL),
        (lambda: losses.absld_loss(QUARTER, EVEN, QUARTER, FIRST, ONE, 2 * ONE), 5 / 6 * TEMPERED),
        (lambda: losses.absld_loss(EVEN, QUARTER, QUARTER, FIRST, 2 * ONE, ONE), 1 / 6 * TEMPERED),
        (lambda: losses.alpha_divergence(QUARTER, EVEN, alpha=1), KL),
        (lambda: losses.alpha_divergence(QUARTER, EVEN, alpha=-1), 1 / 8),
        (lambda: losses.alpha_divergence(QUARTER, EVEN, alpha=2), 1 / 6),
        (lambda: losses.alpha_divergence(QUARTER, EVEN, alpha=0), 0.25 * math.log(0.5) + 0.75 * math.log(1.5)),
        (lambda: losses.alpha_divergence(QUARTER, EVEN, alpha=-1, ratio_clip=1), -1 / 16),
        (lambda: losses.alpha_loss(EVEN, QUARTER, EVEN), 5 / 6 * KL),  # KL = 0.144 is larger than 1/8
        (lambda: losses.alpha_loss(QUARTER, EVEN, EVEN, alpha_max=-1.0), 1 / 6 * 1 / 8),
        (lambda: losses.igdm_term(QUARTER + 3, EVEN * 0 + 3, EVEN - 1, EVEN * 0 - 1), KL),
    ],
)
def test_losses_have_their_hand_computed_values(value, expected):
    assert float(value()) == pytest.approx(expected)


STUDENT = {  # student logits a, b, c in; the teacher's and all else fixed
    "mart": lambda a, b, c: losses.mart_loss(a, b, LABELS),
    "hat": lambda a, b, c: losses.hat_loss(a, b, c, LABELS, logits(8)),
    "ikl": lambda a, b, c: losses.ikl_loss(a, b, LABELS, CLASS_WEIGHTS, soft_weight=0, beta=3),
    "adr": lambda a, b, c: losses.adr_loss(a, logits(8), LABELS, soft_weight=0.7, temperature=2.0) + (b + c).sum(),
    "ard": lambda a, b, c: losses.kd_loss(a, b, logits(8), LABELS, soft_weight=0.7, temperature=3),
    "iad": lambda a, b, c: losses.iad_loss(a, b, logits(8), LABELS, torch.rand(4), soft_weight=0.7, temperature=3),
    "adaad": lambda a, b, c: losses.adaad_loss(a, b, logits(8), logits(9), adv_weight=0.7),
    "mtard": lambda a, b, c: losses.mtard_loss(a, b, logits(8), logits(9), adv_share=torch.tensor([0.7])),
    "absld": lambda a, b, c: losses.absld_loss(a, b, logits(8), LABELS, torch.full((3,), 2.0), torch.full((3,), 0.7)),
    "alpha": lambda a, b, c: losses.alpha_loss(a, b, logits(8), ratio_clip=1e9),
    "alpha_half": lambda a, b, c: losses.alpha_divergence(a, logits(8), alpha=0.5, ratio_clip=1e9).sum(),
    "igdm": lambda a, b, c: losses.igdm_term(a, b, logits(8), logits(9)),
}


@pytest.mark.parametrize("name", STUDENT)
def test_gradients_match_finite_differences(name):
    def loss(*given):
        torch.manual_seed(0)
        return STUDENT[name](*given)

    given = [logits(seed).requires_grad_() for seed in range(3)]
    assert torch.autograd.gradcheck(loss, given)
    (gradient,) = torch.autograd.grad(loss(*given), given[1:2], allow_unused=True)
    assert name == "alpha_half" or gradient.abs().sum() > 0


TEACHERS = {
    "hat": lambda t, u: losses.hat_loss(logits(0), logits(1), logits(2), LABELS, t),
    "ard": lambda t, u: losses.kd_loss(logits(0), logits(1), t, LABELS),
    "iad": lambda t, u: losses.iad_loss(logits(0), logits(1), t, LABELS, losses.trust(u, LABELS)),
    "adaad": lambda t, u: losses.adaad_loss(logits(0), logits(1), t, u, adv_weight=0.5),
    "mtard": lambda t, u: losses.mtard_loss(logits(0), logits(1), t, u, adv_share=torch.tensor([0.5])),
    "absld": lambda t, u: losses.absld_loss(logits(0), logits(1), t, LABELS, torch.ones(3), torch.ones(3)),
    "alpha": lambda t, u: losses.alpha_loss(logits(0), logits(1), t),
    "igdm": lambda t, u: losses.igdm_term(logits(0), logits(1), t, u),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_no_gradient_flows_into_any_teacher(name):
    assert not TEACHERS[name](logits(8).requires_grad_(), logits(9).requires_grad_()).requires_grad


def test_clipping_bounds_the_alpha_gradient_and_not_the_direction():
    student = of(1e-6, 1 - 1e-6).requires_grad_()
    full, clipped = (
        torch.autograd.grad(losses.alpha_divergence(student, EVEN, alpha=2, ratio_clip=clip).sum(), student)[0]
        for clip in (1e12, 5.0)
    )
    assert full.abs().max() > 1e3
    assert clipped.abs().max() < 5
    assert torch.equal(full.sign(), clipped.sign())


def test_the_two_alphas_take_turns():
    """The maximum is at alpha = -1 for a class that only the student predicts, and at 1 for one that it misses."""
    picked = []
    for student, teacher in ((of(0.6, 0.4), of(0.98, 0.02)), (of(0.98, 0.02), of(0.6, 0.4))):
        low, high = (float(losses.alpha_divergence(student, teacher, alpha=a, ratio_clip=5)) for a in (-1, 1))
        picked.append(low > high)
        assert float(losses.alpha_loss(student, student, teacher)) == pytest.approx(max(low, high))
    assert picked == [True, False]


# What is carried from step to step.


def test_mtard_share_drifts_to_the_term_that_has_fallen_less():
    share = losses.balanced_share(torch.tensor([0.5]), torch.tensor([2.0, 1.0]), torch.tensor([4.0, 1.0]))
    assert float(share) == pytest.approx(0.5 + 0.025 * (1 / 3 - 0.5))


def test_mtard_remembers_its_first_losses():
    objective = OBJECTIVES["mtard"]
    batch = Batch(LABELS, clean=logits(0), adv=logits(1), teacher_adv=logits(2), control=logits(3))
    memory = objective.memory(3, balance_rate=0.5)
    for clean in (logits(0), logits(4)):
        batch = Batch(LABELS, clean, adv=logits(1), teacher_adv=logits(2), control=logits(3), memory=memory)
        memory = objective.remember(batch, balance_rate=0.5)
        if clean.equal(logits(0)):
            first = [float(losses.kl_to_teacher(*pair).mean()) for pair in ((batch.adv, logits(2)), (clean, logits(3)))]
            assert memory["first_losses"].tolist() == pytest.approx(first)
            assert float(memory["adv_share"]) == 0.5  # both ratios are 1
    ratio = float(losses.kl_to_teacher(logits(4), logits(3)).mean()) / first[1]
    assert memory["first_losses"].tolist() == pytest.approx(first)
    assert float(memory["adv_share"]) == pytest.approx(0.25 + 0.5 / (1 + ratio))


def test_hard_classes_get_a_lower_temperature():
    losses_of_classes, counts = torch.tensor([6.0, 1.0, 4.0, 0.0]), torch.tensor([2.0, 1.0, 2.0, 0.0])
    moved = losses.next_temperatures(torch.ones(4), losses_of_classes, counts)
    close(moved, torch.tensor([0.9, 1.1, 1.0, 1.0]))  # means 3, 1, 2; the last class was not seen
    low = losses.next_temperatures(torch.full((4,), 0.55), losses_of_classes, counts, temperature_rate=0.2)
    close(low, torch.tensor([0.5, 0.75, 0.55, 0.55]))


def test_ikl_is_soft_labels_and_pairwise_distances_of_logits():
    clean, adv = logits(0), logits(1).requires_grad_()
    total = torch.zeros(())
    for image, label in enumerate(LABELS.tolist()):
        weights = CLASS_WEIGHTS[label]
        for j in range(3):
            for k in range(3):
                gap = (clean[image, j] - clean[image, k]) - (adv[image, j] - adv[image, k])
                total = total + weights[j] * weights[k] * gap**2
    hard = torch.nn.functional.cross_entropy(clean, LABELS)
    soft = losses.kl_to_teacher(adv, clean).mean() - (clean.softmax(1) * clean.log_softmax(1)).sum(1).mean()
    found = losses.ikl_loss(clean, adv, LABELS, CLASS_WEIGHTS, soft_weight=2.0, beta=3.0)
    close(found, hard + 2 * soft + 3 / 4 * total / 4)


def test_ikl_weighs_by_the_mean_output_of_a_class_in_the_pass_before():
    objective, options = OBJECTIVES["ikl"], {"soft_weight": 4.0, "beta": 20.0, "temperature": 2.0}
    memory = objective.memory(3, **options)
    close(memory["class_weights"], torch.full((3, 3), 1 / 3))
    seen = []
    for data_pass, seed in ((0, 0), (0, 1), (1, 2), (2, 3)):
        labels = torch.tensor([0, 2, 0, 2]) if data_pass == 0 else torch.tensor([1, 1, 0, 1])
        batch = Batch(labels, logits(seed), adv=logits(seed + 4), data_pass=data_pass, memory=memory)
        memory = objective.remember(batch, **options)
        seen.append(memory["class_weights"])
    close(seen[1], torch.full((3, 3), 1 / 3))
    outputs = torch.cat([(logits(seed) / 2).softmax(1).float() for seed in (0, 1)])
    close(seen[2][0], outputs[[0, 2, 4, 6]].mean(0))
    close(seen[2][2], outputs[[1, 3, 5, 7]].mean(0))
    close(seen[2][1], torch.full((3,), 1 / 3))  # no image of the class was seen
    close(seen[3][2], seen[2][2])  # nor in the next pass: its weights stay
    close(seen[3][0], (logits(2) / 2).softmax(1).float()[2])


def test_adr_trusts_the_average_less_where_it_prefers_another_class():
    adv, labels = logits(0)[:2], torch.tensor([0, 0])
    average = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1]], dtype=adv.dtype))
    mixed = torch.tensor([[0.76, 0.16, 0.08], [0.65, 0.30, 0.05]], dtype=adv.dtype)  # weights 0.8 and 0.8 - 0.3
    found = losses.adr_loss(adv, average, labels, soft_weight=0.8, temperature=1.0)
    close(found, -(mixed * adv.log_softmax(1)).sum(1).mean())
    squared = losses.adr_loss(adv, 2 * average, labels, soft_weight=0.8, temperature=2.0)
    close(squared, found)
    far = torch.log(torch.tensor([[0.05, 0.9, 0.05]], dtype=adv.dtype))  # 0.8 - 0.85: the truth alone
    close(
        losses.adr_loss(adv[:1], far, labels[:1], soft_weight=0.8, temperature=1.0),
        torch.nn.functional.cross_entropy(adv[:1], labels[:1]),
    )
    assert [round(losses.annealed((2.0, 1.0), share), 6) for share in (0.0, 0.5, 1.0)] == [2.0, 1.5, 1.0]


def test_absld_moves_its_temperatures_once_a_pass():
    objective = OBJECTIVES["absld"]
    options = {"adv_weight": 5 / 6, "temperature_rate": 0.1, "temperature_min": 0.5, "temperature_max": 5.0}
    memory, seen = objective.memory(3, **options), []
    for data_pass, seed in ((0, 0), (0, 1), (1, 2), (1, 3)):
        batch = Batch(LABELS, logits(seed), adv=logits(seed + 4), data_pass=data_pass, memory=memory)
        memory = objective.remember(batch, **options)
        seen.append(memory)
    assert all(seen[step]["adv_temperature"].eq(1).all() for step in (0, 1))
    sums = torch.zeros(3)
    for seed in (4, 5):
        sums.index_add_(0, LABELS, torch.nn.functional.cross_entropy(logits(seed), LABELS, reduction="none").float())
    expected = losses.next_temperatures(torch.ones(3), sums, torch.tensor([2.0, 2.0, 4.0]))
    close(seen[2]["adv_temperature"], expected)
    assert torch.equal(seen[3]["adv_temperature"], seen[2]["adv_temperature"])
    assert seen[2]["count"].tolist() == [1, 1, 2]
    assert not torch.equal(seen[2]["clean_temperature"], seen[2]["adv_temperature"])


@pytest.mark.parametrize(("progress", "trusting"), [(0.29, True), (0.3, False)])
def test_iad_trusts_its_teacher_blindly_at_first(progress, trusting):
    fields = {"clean": EVEN, "adv": QUARTER, "teacher": QUARTER, "teacher_adv": QUARTER}
    options = {"soft_weight": 1.0, "temperature": 1.0, "trust_power": 0.5, "trust_after": 0.3}
    value = OBJECTIVES["iad"].loss(Batch(FIRST, **fields, progress=progress), **options)
    assert float(value) == pytest.approx(0 if trusting else 0.5 * KL)


# Input gradients.


class Tiny:
    """Two layers with tanh: smooth, so that finite differences are exact to their order."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.weights = [torch.randn(4, 5, generator=generator, dtype=torch.float64).requires_grad_()]
        self.weights.append(torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_())

    def __call__(self, images, weights=None):
        first, second = weights or self.weights
        return torch.tanh(images.flatten(1) @ first) @ second


def some_images():
    return torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()


def alignment(student, teacher, weights=None, *, norm="l2"):
    images = some_images()
    wanted = losses.loss_gradient(teacher(images), images, LABELS)
    return losses.kdiga_term(student(images, weights), images, LABELS, wanted, norm=norm)


def moves_the_weights(term, student):
    """Whether a gradient of the term reaches the student's weights."""
    if not term.requires_grad:
        return False
    gradients = torch.autograd.grad(term, student.weights, allow_unused=True)
    return all(gradient is not None and gradient.abs().max() > 1e-6 for gradient in gradients)


def test_alignment_has_its_hand_computed_value():
    images = torch.zeros(1, 1, 1, 2, dtype=torch.float64, requires_grad=True)
    for norm, expected in (("l2", math.sqrt(0.5)), ("l1", 1.0), ("l2_squared", 0.5)):
        term = losses.kdiga_term(images.flatten(1), images, FIRST, torch.zeros_like(images), norm=norm)
        assert float(term.detach()) == pytest.approx(expected)  # gradient p - y = (-1/2, 1/2)


def test_alignment_is_a_mean_over_images_of_each_image_s_own_gradient():
    student, teacher, images = Tiny(0), Tiny(1), some_images()
    alone = []
    for index in range(4):
        image = images[index : index + 1].detach().requires_grad_()
        gap = losses.loss_gradient(student(image), image, LABELS[index : index + 1])
        gap = gap - losses.loss_gradient(teacher(image), image, LABELS[index : index + 1])
        alone.append(gap.norm())
    close(alignment(student, teacher).detach(), torch.stack(alone).mean())


@pytest.mark.parametrize("norm", losses.NORMS)
def test_alignment_gradient_matches_finite_differences(norm):
    student, teacher = Tiny(0), Tiny(1)
    assert torch.autograd.gradcheck(lambda *w: alignment(student, teacher, list(w), norm=norm), student.weights)


@pytest.mark.parametrize("norm", losses.NORMS)
def test_a_student_that_is_its_teacher_has_no_alignment_to_gain(norm):
    term = alignment(Tiny(0), student := Tiny(0), student.weights, norm=norm)
    gradients = torch.autograd.grad(term, student.weights)
    assert float(term.detach()) == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients)


def test_alignment_moves_the_student_and_a_detached_gradient_would_be_caught():
    student, teacher = Tiny(0), Tiny(1)
    assert moves_the_weights(alignment(student, teacher), student)
    plain = alignment_module.loss_gradient
    without_graph = mock.patch.object(alignment_module, "loss_gradient", lambda *a, create_graph: plain(*a).detach())
    with without_graph:
        assert not moves_the_weights(alignment(student, teacher), student)


@pytest.mark.parametrize("at", ["clean", "adv"])
def test_terms_are_added_with_their_weights(at):
    student, images, fields = Tiny(0), some_images(), {}
    adversarial = (images + 0.05).detach().requires_grad_()
    for seed, name in enumerate(("teacher", "teacher_adv", "mirrored", "teacher_mirrored")):
        fields[name] = logits(seed)
    batch = Batch(
        LABELS,
        student(images),
        adv=student(adversarial),
        images=images,
        adversarial=adversarial,
        teacher_gradient=torch.zeros_like(images),
        teacher_gradient_adv=torch.ones_like(images),
        progress=0.25,
        **fields,
    )
    base = OBJECTIVES["rslad"]
    both = with_kdiga(with_igdm(base, weight=2.0), weight=3.0, norm="l1", at=at)
    logits_there, inputs = (batch.clean, images) if at == "clean" else (batch.adv, adversarial)
    wanted = batch.teacher_gradient if at == "clean" else batch.teacher_gradient_adv
    kdiga = losses.kdiga_term(logits_there, inputs, LABELS, wanted, norm="l1")
    igdm = losses.igdm_term(batch.adv, fields["mirrored"], fields["teacher_adv"], fields["teacher_mirrored"])
    expected = base.loss(batch, adv_weight=0.5) + 2 * 0.25 * igdm + 3 * kdiga
    close(both.loss(batch, adv_weight=0.5), expected)
    assert both.needs - base.needs == {"mirrored", "teacher_adv", "teacher_mirrored"} | (
        {"teacher_gradient"} if at == "clean" else {"teacher_gradient_adv"}
    )
    assert base.needs == {"clean", "adv", "teacher"}


def test_terms_at_adversarial_images_need_an_attack():
    for add, options in ((with_igdm, {}), (with_kdiga, {"at": "adv"})):
        with pytest.raises(ValueError, match="needs a loss with an attack"):
            add(OBJECTIVES["kd"], weight=1, **options)
    with pytest.raises(ValueError, match="loss kd has no attack"):
        Phase(loss="kd", alignment="igdm")
    assert with_kdiga(OBJECTIVES["kd"], weight=1).teacher_at == "clean"


# Images on which the teacher is evaluated, and the papers' defaults.


def test_caching_is_allowed_exactly_where_the_teacher_sees_clean_images_only():
    places = {name: objective.teacher_at for name, objective in OBJECTIVES.items()}
    assert {name for name, place in places.items() if place == "clean"} == {
        "kd",
        "ard",
        "rslad",
        "absld",
        "alpha",
        "fast_edge",
    }
    assert {name for name, place in places.items() if place == "adv"} == {"akd", "adaiad", "mtard"}
    assert {name for name, place in places.items() if place == "both"} == {"iad", "adaad"}
    assert with_kdiga(OBJECTIVES["ard"], weight=1).teacher_at == "clean"
    assert with_kdiga(OBJECTIVES["ard"], weight=1, at="adv").teacher_at == "both"
    assert with_igdm(OBJECTIVES["rslad"], weight=1).teacher_at == "both"


@pytest.mark.parametrize("loss", ["rslad", "adaad", "mtard", "absld", "alpha", "iad", "kd"])
def test_naming_a_loss_sets_the_defaults_of_its_function(loss):
    settings, function = Phase(loss=loss).loss, getattr(losses, f"{loss}_loss")
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is not parameter.empty:
            assert getattr(settings, name) == parameter.default, name


def test_papers_defaults_and_what_overrides_them():
    assert Phase(loss="ard").loss.options == {"temperature": 30, "soft_weight": 1}
    assert Phase(loss={"name": "ard", "temperature": 4}).loss.options == {"temperature": 4, "soft_weight": 1}
    assert (Phase(loss="adaiad").loss.temperature, Phase(loss="akd").loss.soft_weight) == (30, 0.5)
    assert [TrainTeacher(objective=name).objective.beta for name in ("hat", "mart", "trades")] == [2.5, 6, 6]
    assert Phase(teacher="dynamic", teacher_objective="hat").teacher_objective.beta == 2.5
    assert (Phase().loss, Phase().teacher_objective) == (Rslad(adv_weight=5 / 6), Trades(beta=6))
    assert OBJECTIVES["sat"] is OBJECTIVES["pgd_at"]
