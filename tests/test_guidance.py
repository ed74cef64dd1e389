"""What a training step does for a loss: whom it asks where, perturbed weights, competing subnets, opening choices."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import TINY_MOBILE, image_sets, random_images, random_supernet, save_stripes, tiny_config, tiny_space
from training_runs import EPS, phase_run, plain_network, same, teacher_run

from proard.artifacts import Provenance, read_header
from proard.attacks import pgd
from proard.config import UserError, job_settings
from proard.losses import OBJECTIVES, Batch, KLBetweenNets, adaad_loss, igdm_term, kdiga_term, kl_to_teacher
from proard.nets import extract, save_static
from proard.nets.view import SubnetView
from proard.stages import train_phase, train_teacher
from proard.stages.training import Training
from proard.training import Drawn, phase_plan
from proard.training.attentive import at_one_cost, settle
from proard.training.guidance import Guidance, guided, passed, side_by_side
from proard.training.perturbation import perturbed
from proard.training.trainer import Trainer

close = torch.testing.assert_close
LABELS = torch.arange(6) % 3
STUDENT_LOSSES = ["kd", "akd", "ard", "iad", "rslad", "adaad", "adaiad", "mtard", "absld", "alpha"]
TERMS = {"igdm_weight": 1, "kdiga_weight": 1}
ONE_STEP = {"num_steps": 1, "step_size": 0.05}
TWO_STEPS = {"num_steps": 2, "step_size": 0.05}


@pytest.fixture(scope="module")
def train_set(tmp_path_factory):
    return image_sets(tmp_path_factory.mktemp("images"), train=48, val=12)["train"]


def phase_of(**changes):
    (phase,) = tiny_config(**{f"phase__{key}": value for key, value in changes.items()}).train_phase.phases
    return phase


def one_step(settings, plan, *, teacher=None, control=None, seed=0, step=0):
    """A step on six random images: the trainer after it, and what the step returned."""
    net = random_supernet(tiny_space(), seed=seed, dtype=torch.float32)
    trainer = Trainer(net, settings, plan, EPS, teacher, 0, control)
    images = random_images(tiny_space(), 6, dtype=torch.float32)
    returned = trainer.step(images, LABELS, step, 0, 0.05, torch.Generator().manual_seed(0))
    return trainer, returned


# Every loss trains.


@pytest.mark.parametrize("teacher", ["frozen", "dynamic", "both"])
@pytest.mark.parametrize("loss", STUDENT_LOSSES)
def test_every_loss_trains_with_every_teacher(loss, teacher):
    phase = phase_of(loss=loss, teacher=teacher, archs_per_step=2, attack=ONE_STEP, sampling="uniform")
    before = random_supernet(tiny_space(), dtype=torch.float32).state_dict()
    frozen = None if teacher == "dynamic" else plain_network()
    trainer, (value, *_) = one_step(phase, phase_plan(tiny_space(), phase), teacher=frozen, control=plain_network())
    assert math.isfinite(value)
    assert value > 0
    assert not same(before, trainer.net.state_dict())
    assert all(torch.isfinite(tensor).all() for tensor in trainer.net.state_dict().values())


@pytest.mark.parametrize("at", ["clean", "adv"])
@pytest.mark.parametrize("loss", ["ard", "adaad", "absld"])
def test_terms_change_what_any_loss_trains(loss, at):
    weights = []
    for terms in ({}, {"igdm_weight": 1}, {"kdiga_weight": 1}):
        phase = phase_of(loss=loss, archs_per_step=1, attack=ONE_STEP, kdiga_at=at, sampling="uniform", **terms)
        trainer, (value, *_) = one_step(phase, phase_plan(tiny_space(), phase), teacher=plain_network(), step=1)
        weights.append({name: tensor.clone() for name, tensor in trainer.net.state_dict().items()})
        assert math.isfinite(value)
    assert not same(weights[0], weights[1])
    assert not same(weights[0], weights[2])


@pytest.mark.parametrize("objective", ["sat", "mart", "hat"])
def test_every_teacher_objective_trains(train_set, tmp_path, objective):
    run = teacher_run(train_set, tmp_path, objective=objective, epochs=1 / 3)
    assert math.isfinite(run.rows[-1]["loss"])
    assert not same(run.source.before[0], run.net.state_dict())


def test_sat_is_another_name_for_pgd_at(train_set, tmp_path):
    runs = [teacher_run(train_set, tmp_path / name, objective=name, epochs=1 / 3) for name in ("sat", "pgd_at")]
    assert same(runs[0].net.state_dict(), runs[1].net.state_dict())


@pytest.mark.parametrize(
    ("changes", "work"),
    [
        ({"loss": "rslad"}, 1 + 3 + 2 * 2 + 3),
        ({"loss": "kd"}, 1 + 3),
        ({"loss": "iad"}, 1 + 3 + 2 * 2 + 3 + 1),
        ({"loss": "akd"}, 3 + 2 * 2 + 3 + 1),
        ({"loss": "adaad"}, 1 + 2 * 2 * 2 + 3 + 1),  # a clean pass for batch norm alone
        ({"loss": "adaad", "adv_weight": 0.9}, 1 + 3 + 2 * 2 * 2 + 3 + 1),
        ({"loss": "adaad", "attack": {**TWO_STEPS, "bn_mode": "running"}}, 2 * 2 * 2 + 3 + 1),
        ({"loss": "adaad", "kdiga_weight": 1}, 3 + 2 * 2 * 2 + 3 + 1 + 2 + 3),
        ({"loss": "adaiad"}, 3 + 2 * 2 * 2 + 3 + 1),
        ({"loss": "mtard"}, 3 + 2 * 2 + 3 + 2),
        ({"loss": "akd", "sampling": "pareto", "archs_per_step": 3}, 1 + 3 * (3 + 2 * 2 + 3 + 1) + 3),
        ({"loss": "rslad", "igdm_weight": 1}, 1 + 3 + 2 * 2 + 3 + 2 + 3),
        ({"loss": "kd", "kdiga_weight": 1}, 1 + 3 + 2 + 3),
        ({"loss": "rslad", "awp_gamma": 0.01}, 1 + 3 + 2 * 2 + 3 + 6),
        ({"loss": "rslad", "sampling": "pareto", "archs_per_step": 3}, 1 + 3 * (3 + 2 * 2 + 3) + 3),
    ],
)
def test_forward_equivalents_are_counted(changes, work):
    phase = phase_of(**{"sampling": "uniform", "archs_per_step": 1, **changes})
    _, returned = one_step(phase, phase_plan(tiny_space(), phase), teacher=plain_network(), control=plain_network())
    assert returned[3].forwards == work


# Whom a step asks.


@pytest.mark.parametrize("teacher", ["frozen", "both"])
@pytest.mark.parametrize(("loss", "asked"), [("akd", False), ("adaiad", False), ("mtard", False), ("rslad", True)])
def test_the_teacher_sees_clean_images_only_where_a_loss_reads_what_it_says(loss, asked, teacher):
    phase = phase_of(loss=loss, teacher=teacher, archs_per_step=2, attack=ONE_STEP, sampling="uniform")
    net, clean = plain_network(), random_images(tiny_space(), 6, dtype=torch.float32)
    seen = []

    def watched(images):
        seen.append(torch.equal(images.detach(), clean))
        return net(images)

    one_step(phase, phase_plan(tiny_space(), phase), teacher=watched, control=plain_network(seed=5))
    assert any(seen) == asked
    assert seen


def test_adaad_of_adversarial_images_alone_trains_as_with_a_clean_term_of_no_weight():
    phase = phase_of(loss="adaad", adv_weight=1, archs_per_step=1, attack=TWO_STEPS, sampling="uniform")
    plan = phase_plan(tiny_space(), phase)
    whole = replace(plan, draw=lambda *key: [replace(one, objective=OBJECTIVES["adaad"]) for one in plan.draw(*key)])

    def weighed(batch, adv_weight):
        return adaad_loss(batch.clean, batch.adv, batch.teacher, batch.teacher_adv, adv_weight=adv_weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OBJECTIVES, "adaad", replace(OBJECTIVES["adaad"], loss=weighed))
        slow, (slow_loss, *_) = one_step(phase, whole, teacher=plain_network())
    fast, (fast_loss, *_) = one_step(phase, plan, teacher=plain_network())
    assert float(fast_loss) == float(slow_loss)
    assert same(fast.net.state_dict(), slow.net.state_dict())


def test_the_dynamic_teacher_joins_a_frozen_one_that_was_not_asked_at_clean_images():
    images = random_images(tiny_space(), 4)
    frozen, guide = (lambda x: x.flatten(1)[:, :3]), (lambda x: 2 * x.flatten(1)[:, 3:6])
    mixed = Guidance(None, frozen).led_by(guide(images), guide, frozen_weight=0.3)
    assert mixed.target is None
    close(mixed.teacher(images).softmax(1), 0.3 * frozen(images).softmax(1) + 0.7 * guide(images).softmax(1))


def test_a_student_that_is_its_teacher_has_nothing_to_align():
    net = random_supernet(tiny_space())
    view = SubnetView(net, tiny_space().largest)
    images = random_images(tiny_space(), 6).requires_grad_()
    adversarial = (images.detach() + 0.05).requires_grad_()
    batch = Batch(LABELS, view(images), adv=view(adversarial), images=images, adversarial=adversarial)
    teacher = partial(view, frozen=True)
    needs = frozenset({"teacher_gradient", "teacher_gradient_adv", "teacher_adv", "teacher_mirrored", "mirrored"})
    with torch.no_grad():
        guidance = Guidance(teacher(images), teacher)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        batch, _ = guided(batch, needs, guidance)
    batch, _ = passed(batch, needs, view, reach=2.0)
    for norm in ("l2", "l1", "l2_squared"):
        clean = kdiga_term(batch.clean, images, LABELS, batch.teacher_gradient, norm=norm)
        adv = kdiga_term(batch.adv, adversarial, LABELS, batch.teacher_gradient_adv, norm=norm)
        assert batch.teacher_gradient.abs().max() > 1e-3
        close(torch.stack([clean, adv]).detach(), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    close(igdm_term(batch.adv, batch.mirrored, batch.teacher_adv, batch.teacher_mirrored).detach().item(), 0.0)


def test_each_network_is_asked_at_its_own_images():
    images, adversarial = random_images(tiny_space(), 6), random_images(tiny_space(), 6, seed=1)
    teacher, control = (lambda x: x.flatten(1)[:, :3] ** 2), (lambda x: x.flatten(1)[:, 3:6])
    needs = frozenset({"teacher_adv", "teacher_mirrored", "control", "control_adv", "teacher_gradient"})
    batch = Batch(LABELS, images=images, adversarial=adversarial)
    batch, work = guided(batch, needs, Guidance(teacher(images), teacher, control, 0.4, 3))
    close(batch.teacher_adv, teacher(adversarial))
    close(batch.teacher_mirrored, teacher(2 * images - adversarial))
    close(batch.control, control(images))
    close(batch.control_adv, control(adversarial))
    chosen = images.clone().requires_grad_()
    torch.nn.functional.cross_entropy(teacher(chosen).float(), LABELS, reduction="sum").backward()
    close(batch.teacher_gradient, chosen.grad)
    assert (batch.progress, batch.data_pass, work.forwards) == (0.4, 3, 6)
    own, work = passed(batch, frozenset({"beyond", "mirrored", "teacher"}), control, reach=2.5)
    close(own.beyond, control(images + 2.5 * (adversarial - images)))
    close(own.mirrored, control(2 * images - adversarial))
    assert own.clean is None
    assert work == 6


def test_the_dynamic_teacher_is_asked_alone_or_in_the_mixture():
    images = random_images(tiny_space(), 4)
    frozen, guide = (lambda x: x.flatten(1)[:, :3]), (lambda x: 2 * x.flatten(1)[:, 3:6])
    alone = Guidance(None, None).led_by(guide(images), guide, frozen_weight=0.0)
    close(alone.teacher(images), guide(images))
    mixed = Guidance(frozen(images), frozen).led_by(guide(images), guide, frozen_weight=0.3)
    expected = 0.3 * frozen(images).softmax(1) + 0.7 * guide(images).softmax(1)
    close(mixed.target.softmax(1), expected)
    close(mixed.teacher(images).softmax(1), expected)


def test_attack_through_both_networks_takes_the_gradient_of_both():
    student, teacher = plain_network(seed=1), plain_network(seed=2)
    images = random_images(tiny_space(), 6, dtype=torch.float32)
    adv = images.clone().requires_grad_()
    kl_to_teacher(student(adv), teacher(adv)).sum().backward()
    both = side_by_side(student, teacher)
    found = pgd(both, KLBetweenNets(), images, eps=0.1, step_size=0.01, num_steps=1, start="zero")
    close(found, (images + 0.01 * adv.grad.sign()).clamp(0, 1))
    alone = images.clone().requires_grad_()
    kl_to_teacher(student(alone), teacher(alone).detach()).sum().backward()
    assert not torch.equal(alone.grad.sign(), adv.grad.sign())


def test_a_loss_that_asks_the_control_says_so_when_it_is_not_there():
    class Without:
        settings = phase_of(loss="mtard")

    with pytest.raises(UserError, match="give --control"):
        Training.control(Without(), None)
    Without.settings = phase_of(loss="rslad")
    assert Training.control(Without(), None) is None


@pytest.mark.parametrize(
    ("stage", "changes"),
    [(train_teacher, {"train_teacher__objective": "hat"}), (train_phase, {"phase__loss": "mtard"})],
    ids=["hat", "mtard"],
)
def test_stages_read_the_control_and_depend_on_it(tmp_path, stage, changes):
    name, output = stage.__name__.rsplit(".", 1)[1], tmp_path / "net.safetensors"
    section = "phase" if name == "train_phase" else name
    config = tiny_config(**changes, **{f"{section}__epochs": 1 / 6, f"{section}__attack": ONE_STEP})
    space, files = tiny_space(), save_stripes(tmp_path)
    for seed, kind in enumerate(("control", "teacher")):
        net = extract(random_supernet(space, seed=seed, dtype=torch.float32), space.largest)
        files[kind] = tmp_path / f"{kind}.safetensors"
        save_static(
            files[kind], net, space=space, arch=space.largest, kind=kind, provenance=Provenance("tiny", f"train_{kind}")
        )
    phase = "all" if name == "train_phase" else None
    flags = {"settings": job_settings(config, name, phase=phase), "device": "cpu", "threads": 1}
    flags |= {"train": files["train"], "val": files["val"], "history": tmp_path / "history.parquet"}
    flags |= {"teacher": files["teacher"], "supernet": output} if phase else {"teacher": output}
    arguments = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    with pytest.raises(UserError, match="give --control, train_control's output"):
        stage.main(arguments)
    stage.main([*arguments, "--control", str(files["control"])])
    assert any("control.safetensors" in path for path in read_header(output)["provenance"]["inputs"])


# Perturbed weights.


def test_perturbed_weights_move_by_their_share_up_the_gradient_and_come_back():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((3, 4), (2, 3))]
    kept = [weight.clone() for weight in weights]
    for weight in weights:
        weight.requires_grad_()
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)

    def loss():
        return (torch.tanh(x @ weights[0].T) @ weights[1].T).square().mean()

    before = loss()
    gradients = torch.autograd.grad(loss(), weights)
    with perturbed(weights, before, gamma=0.01):
        for weight, old, gradient in zip(weights, kept, gradients, strict=True):
            close(weight.detach(), old + 0.01 * old.norm() * gradient / gradient.norm())
        assert loss() > before
        after = torch.autograd.grad(loss(), weights)
    assert all(torch.equal(weight, old) for weight, old in zip(weights, kept, strict=True))
    assert not torch.equal(after[0], gradients[0])


def test_awp_trains_otherwise_and_only_after_its_warm_up(train_set, tmp_path):
    runs = {
        name: teacher_run(train_set, tmp_path / name, epochs=1, batch_size=48, **changes)
        for name, changes in {
            "plain": {},
            "awp": {"awp_gamma": 0.05},
            "later": {"awp_gamma": 0.05, "awp_warmup_epochs": 1},
        }.items()
    }
    states = {name: run.net.state_dict() for name, run in runs.items()}
    assert same(states["plain"], states["later"])
    assert not same(states["plain"], states["awp"])
    statistics = [{k: v for k, v in states[name].items() if "running" in k} for name in ("plain", "awp")]
    assert same(*statistics)  # they move at the weights as they are
    assert runs["awp"].rows[-1]["loss"] > runs["plain"].rows[-1]["loss"]


# Memory.


def test_memory_does_not_move_with_a_loss_that_is_not_finite():
    phase = phase_of(loss="mtard", sampling="uniform", archs_per_step=1, attack=ONE_STEP)
    options = {"teacher": plain_network(), "control": plain_network()}
    trainer, (value, *_) = one_step(phase, phase_plan(tiny_space(), phase), **options)
    kept = {name: tensor.clone() for name, tensor in trainer.tensors().items() if name.startswith("memory.")}
    assert math.isfinite(value)
    assert kept["memory.first_losses"].min() > 0
    images = torch.full((6, 1, 8, 8), torch.nan)
    value, *_ = trainer.step(images, LABELS, 1, 0, 0.05, torch.Generator().manual_seed(0))
    assert math.isnan(value)
    assert same(kept, {name: trainer.tensors()[name] for name in kept})


# Sampling.


def test_rivals_have_one_cost_and_costs_cover_the_range():
    space = tiny_space()
    among, rng = space.open_choices(), np.random.default_rng(0)
    groups = [at_one_cost(space, among, 3, rng) for _ in range(40)]
    macs = np.log([[space.spec(arch).macs for arch in group] for group in groups])
    low, high = np.log([space.spec(space.smallest).macs, space.spec(space.largest).macs])
    assert all(len(set(group)) == 3 for group in groups)
    assert np.median(np.ptp(macs, axis=1)) < 0.1 * (high - low)
    assert macs[:, 0].min() < low + 0.2 * (high - low)
    assert macs[:, 0].max() > high - 0.2 * (high - low)
    narrow = at_one_cost(space, space.open_choices(width=[0.5]), 3, rng)
    assert all(set(arch.width) == {0.5} for arch in narrow)


@pytest.mark.parametrize(("pick", "place"), [("best", 0), ("worst", 2)])
def test_the_best_or_the_worst_of_the_rivals_is_trained(pick, place):
    archs = [tiny_space().arch(row) for row in tiny_space().sample(3, np.random.default_rng(0))]
    scores = dict(zip(archs, (0.1, 0.5, 0.9), strict=True))
    drawn = [Drawn(archs[1], OBJECTIVES["plain"], {}, rivals=(archs[0], archs[2]), pick=pick)]
    settled, scored = settle(drawn, lambda arch: torch.tensor(scores[arch]))
    assert ([one.arch for one in settled], settled[0].rivals, len(scored)) == ([archs[place]], (), 3)
    alone = [Drawn(archs[0], OBJECTIVES["plain"], {})]
    assert settle(alone, lambda arch: None) == (alone, [])


def test_pareto_keeps_the_ends_and_lets_the_rest_compete():
    space = tiny_space()
    draws = phase_plan(space, phase_of(sampling="pareto", archs_per_step=4, pareto_candidates=3)).draw(0, 0, 0)
    assert [one.arch for one in draws[:2]] == [space.largest, space.smallest]
    assert [len(one.rivals) for one in draws] == [0, 0, 2, 2]
    phase = phase_of(sampling="pareto", archs_per_step=4, teacher="dynamic")
    draws = [one for step in range(20) for one in phase_plan(space, phase).draw(0, step, 0)]
    assert all(space.largest not in (one.arch, *one.rivals) for one in draws if not one.guides)


def test_progressive_opens_width_then_depth_then_expand():
    space = tiny_space()
    plan = phase_plan(space, phase_of(sampling="progressive", epochs=6, archs_per_step=4))
    varied = []
    for data_pass in range(6):
        archs = [one.arch for step in range(8) for one in plan.draw(0, 8 * data_pass + step, data_pass)]
        dims = [{arch.width for arch in archs}, {arch.depth for arch in archs}]
        dims.append({max(arch.expand) for arch in archs} | {min(arch.expand) for arch in archs if arch.depth == (1, 1)})
        varied.append([len(values) > 1 for values in dims])
    expected = [[True, False, False], [True, True, False], [True, True, True]]
    assert varied == [row for row in expected for _ in range(2)]
    assert plan.passes_per_epoch == 1


def test_progressive_opens_what_a_mobilenet_has_to_choose_kernel_first():
    """ProARD opens kernels where a ResNet has widths; a single width has no part of its own."""
    space = tiny_space(TINY_MOBILE | {"width": [1.0]})
    plan = phase_plan(space, phase_of(sampling="progressive", epochs=3, archs_per_step=4))
    varied = []
    for data_pass in range(3):
        archs = [one.arch for step in range(8) for one in plan.draw(0, 8 * data_pass + step, data_pass)]
        deepest = [arch for arch in archs if arch.depth == space.largest.depth]
        varied.append([len({getattr(arch, dim) for arch in deepest}) > 1 for dim in ("kernel", "expand")])
        varied[-1].insert(1, len({arch.depth for arch in archs}) > 1)
    assert varied == [[True, False, False], [True, True, False], [True, True, True]]


def test_loss_scale_multiplies_the_gradient_of_a_phase():
    batch, losses = Batch(torch.tensor([0, 1]), *torch.randn(3, 2, 4).double()), []
    for scale in (1.0, 0.1):
        (student, *_) = phase_plan(tiny_space(), phase_of(loss="rslad", loss_scale=scale)).draw(0, 0, 0)
        losses.append(student.objective.loss(batch, **student.options))
    torch.testing.assert_close(0.1 * losses[0], losses[1])


def test_progressive_stays_inside_the_phase(train_set, tmp_path):
    changes = {"sampling": "progressive", "width": [0.5], "epochs": 3, "attack": ONE_STEP, "batch_size": 48}
    plan = phase_plan(tiny_space(), phase_of(**changes))
    assert {one.arch.width for step in range(3) for one in plan.draw(0, step, step)} == {(0.5, 0.5, 0.5)}
    run = phase_run(train_set, tmp_path, **changes)
    assert math.isfinite(run.rows[-1]["loss"])
