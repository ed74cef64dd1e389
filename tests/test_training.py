"""The training loop: one seed one result, averages, best epoch, non-finite losses, resuming."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import TINY_MOBILE, image_sets, random_supernet, tiny_config, tiny_space
from training_runs import no_validation, phase_run, same, step_of, take, teacher_run

from proard.attacks import pgd
from proard.config import PRESETS, Attack, Measurement, Threat, UserError
from proard.config.losses import Plain
from proard.config.nets import WideResNet
from proard.data import to_float
from proard.evaluation import Conditions, SubnetMeter
from proard.nets import FixedNet, Supernet
from proard.space import FixedSpace, SearchSpace
from proard.stages.training import AugmentedImages
from proard.training import Interrupted, ResumeState, Run, phase_plan, single_plan
from proard.training.run import learning_rate


@pytest.fixture(scope="module")
def train_set(tmp_path_factory):
    return image_sets(tmp_path_factory.mktemp("images"), train=48, val=12)["train"]


@pytest.mark.parametrize("fixed", [False, True], ids=["elastic", "fixed"])
def test_adr_takes_its_labels_from_the_averaged_weights(train_set, fixed):
    settings = tiny_config(train_teacher__objective="adr", train_teacher__ema_decay=0.5).train_teacher
    wide = WideResNet(name="wide", depth=10, widen=1, image_channels=1, image_size=8, classes=3)
    fixed_net = FixedNet(FixedSpace(wide), mean=[0.4], std=[0.3], generator=torch.Generator().manual_seed(0))
    net = fixed_net if fixed else random_supernet(tiny_space(), dtype=torch.float32)
    arch, seen = net.space.largest, []
    plan = single_plan(arch, settings.objective, settings)
    (drawn,) = plan.draw(0, 0, 0)
    objective = drawn.objective

    def loss(batch, **options):
        seen.append(batch.average)
        return objective.loss(batch, **options)

    drawn = replace(drawn, objective=replace(objective, loss=loss))
    step = step_of(net, settings, replace(plan, draw=lambda *_: [drawn]))
    images, labels = to_float(train_set.images[:16]), train_set.labels[:16]
    take(step, images, labels, number=100)
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    with step.update.averaged(), torch.no_grad():
        expected = net.view(arch)(images, frozen=True)
    assert same(kept, net.state_dict())
    now = net.view(arch)(images, frozen=True).detach()
    take(step, images, labels, number=101)
    torch.testing.assert_close(seen[1], expected)
    assert not torch.allclose(seen[1], now, atol=1e-3)
    assert not seen[1].requires_grad


# One seed, one result.


def test_one_seed_gives_one_result(train_set, tmp_path):
    first, second, other = (teacher_run(train_set, tmp_path, epochs=1, seed=seed) for seed in (0, 0, 1))
    assert same(first.net.state_dict(), second.net.state_dict())
    assert all(torch.equal(*pair) for pair in zip(first.source.given, second.source.given, strict=True))
    assert not same(first.net.state_dict(), other.net.state_dict())


def test_noise_depends_on_seed_and_step(train_set, tmp_path):
    """Also where seeds differ in their upper bits only, which torch's CPU generator would ignore."""
    drawn = {}
    for seed in (0, 1, 2**16, 2**32, 2**40):
        run = teacher_run(train_set, tmp_path, epochs=1, seed=seed, fit_now=False)
        run.source.batch = lambda indices, generator, run=run: (
            drawn.setdefault((run.options["seed"], len(drawn)), torch.rand(4, generator=generator)),
            AugmentedImages.batch(run.source, indices, generator),
        )[1]
        run.fit()
    values = {tuple(value.tolist()) for value in drawn.values()}
    assert len(drawn) == 5 * 3
    assert len(values) == len(drawn)


def test_loss_falls_and_images_are_learnt(train_set, tmp_path):
    run = teacher_run(train_set, tmp_path, epochs=8, lr=0.1)
    losses = [row["loss"] for row in run.rows]
    assert losses[-1] < 0.6 * losses[0]
    assert run.rows[-1]["train_clean_acc"] > 0.9
    assert run.rows[-1]["train_robust_acc"] <= run.rows[-1]["train_clean_acc"]


def test_without_a_clean_pass_clean_training_accuracy_is_unknown(train_set, tmp_path):
    attack = {"num_steps": 1, "bn_mode": "running"}
    run = teacher_run(train_set, tmp_path, objective="pgd_at", epochs=1, attack=attack)
    assert math.isnan(run.rows[-1]["train_clean_acc"])
    assert 0 < run.rows[-1]["train_robust_acc"] <= 1


def test_history_counts_steps_images_and_work(train_set, tmp_path):
    run = teacher_run(train_set, tmp_path, epochs=2)
    assert [(row["epoch"], row["step"], row["images"]) for row in run.rows] == [(1, 3, 48), (2, 6, 96)]
    # trades: clean pass 3, two attack steps of 2, adversarial pass 3
    assert [row["forward_equivalents"] for row in run.rows] == [480, 960]
    phase = phase_run(train_set, tmp_path, epochs=1)
    assert phase.rows[-1]["forward_equivalents"] == 48 * (1 + 3 * 10)  # one teacher pass, three subnets


def test_fractional_epochs_train_part_of_a_pass(train_set, tmp_path):
    run = teacher_run(train_set, tmp_path, epochs=1.4)
    assert [(row["epoch"], row["step"]) for row in run.rows] == [(1, 3), (2, 4)]


def test_fewer_images_than_a_batch_still_train(train_set, tmp_path):
    run = teacher_run(train_set, tmp_path, epochs=2, batch_size=1000)
    assert [(row["step"], row["images"]) for row in run.rows] == [(1, 48), (2, 96)]


def test_learning_rate_warms_up_and_falls_to_zero():
    settings = tiny_config(train_teacher__lr=0.5).train_teacher
    rates = [learning_rate(settings, step, 20, 4) for step in range(21)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates[12] == pytest.approx(0.25)
    assert rates[20] == pytest.approx(0)
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))


# Optimizer, average, best epoch.


@pytest.mark.parametrize("space", [tiny_space(), tiny_space(TINY_MOBILE)], ids=["resnet", "mobilenet"])
def test_weight_decay_spares_norms_biases_transforms_and_every_parameter_has_momentum(space):
    settings = tiny_config(train_teacher__weight_decay=0.01).train_teacher
    net = random_supernet(space, dtype=torch.float32)
    plan = single_plan(space.smallest, Plain(), settings)
    step = step_of(net, settings, plan)
    decay = {id(p): group["weight_decay"] for group in step.update.optimizer.param_groups for p in group["params"]}
    for name, parameter in net.named_parameters():
        spared = ".bn." in name or ".transforms." in name or name.endswith("bias")
        assert decay[id(parameter)] == (0.0 if spared else 0.01), name
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(6, 1, 8, 8, generator=generator), torch.arange(6) % 3
    take(step, images, labels)  # the smallest subnet leaves most gradients at zero
    momentum = {name for name in step.tensors() if name.startswith("momentum.")}
    assert momentum == {f"momentum.{name}" for name, _ in net.named_parameters()}


def test_average_equals_the_recursion_by_hand(train_set, tmp_path):
    seen = []

    def validate(net):
        seen.append({name: value.detach().clone() for name, value in net.named_parameters()})
        return no_validation(net)

    run = teacher_run(train_set, tmp_path, epochs=6, batch_size=48, ema_decay=0.3, validate=validate)
    average = {name: run.source.before[0][name].double() for name in seen[0]}
    for step in range(5):
        decay = min(0.3, (1 + step) / (10 + step))
        after = run.source.before[step + 1]
        average = {name: decay * value + (1 - decay) * after[name].double() for name, value in average.items()}
        for name, value in average.items():
            torch.testing.assert_close(seen[step][name].double(), value, rtol=1e-5, atol=1e-6)
    assert min(0.3, 5 / 14) == 0.3, "both branches of the warm-up are met"


@pytest.mark.parametrize(
    ("robust", "clean", "best", "objective"),
    [
        ([0.1, 0.4, 0.3, 0.2], [0.5] * 4, 2, "trades"),
        ([0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.7, 0.6], 4, "trades"),
        ([0.3, 0.3, 0.3, 0.3], [0.5, 0.5, 0.8, 0.6], 3, "trades"),
        ([0.3, 0.3, 0.3, 0.3], [0.5] * 4, 1, "trades"),
        ([0.0] * 4, [0.0] * 4, 1, "trades"),
        ([0.2, 0.2, 0.0, 0.1], [0.5, 0.6, 0.8, 0.8], 4, "plain"),  # no robust network: by clean accuracy first
    ],
)
def test_weights_of_the_best_validated_epoch_are_kept(train_set, tmp_path, robust, clean, best, objective):
    seen = []

    def validate(net):
        seen.append({name: value.detach().clone() for name, value in net.named_parameters()})
        index = len(seen) - 1
        rows = [dict(no_validation(net)[0], arch=arch) for arch in ("smallest", "largest")]
        rows[0] |= {"val_robust_acc": robust[index] - 0.1, "val_clean_acc": clean[index]}
        rows[1] |= {"val_robust_acc": robust[index] + 0.1, "val_clean_acc": clean[index]}
        return rows

    run = teacher_run(train_set, tmp_path, epochs=4, batch_size=48, validate=validate, objective=objective)
    assert same(dict(run.net.named_parameters()), seen[best - 1])
    assert {row["epoch"] for row in run.rows if row["best"]} == {best}
    assert len(run.rows) == 8


def test_training_may_round_convolutions_and_validation_may_not(train_set, tmp_path, monkeypatch):
    """TF32 on a GPU: a subnet is validated as it is measured and exported."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    seen = []

    def search(*arguments, **options):
        seen.append(("step", torch.backends.cudnn.allow_tf32))
        return pgd(*arguments, **options)

    def validate(net):
        seen.append(("validate", torch.backends.cudnn.allow_tf32))
        return no_validation(net)

    teacher_run(train_set, tmp_path, epochs=1, validate=validate, injected={"search": search})
    assert set(seen) == {("step", True), ("validate", False)}
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("keep", "epoch"), [("best", 1), ("last", 3)])
def test_a_phase_keeps_the_epoch_asked_for(train_set, tmp_path, keep, epoch):
    """Validations that are all alike: the first of them is the best."""
    rows = phase_run(train_set, tmp_path, epochs=3, keep=keep).rows
    assert {row["epoch"] for row in rows if row["best"]} == {epoch}


def test_last_epoch_is_validated_whatever_the_rhythm(train_set, tmp_path):
    validation = {"every_epochs": 2, "num_images": 12, "num_steps": 1, "step_size": 0.05}
    run = teacher_run(train_set, tmp_path, epochs=3, batch_size=48, validation=validation)
    assert [row["arch"] for row in run.rows] == ["", "largest", "largest"]


# A loss that is not finite.


@pytest.mark.parametrize("kind", ["teacher", "phase"])
def test_non_finite_loss_stops_before_anything_moves(train_set, tmp_path, kind):
    make = teacher_run if kind == "teacher" else phase_run
    run = make(train_set, tmp_path, epochs=2, fit_now=False)
    run.source.poison_at = 4
    with pytest.raises(UserError, match=r"the loss is nan at step 4; the weights before it are kept in .*net\.state"):
        run.fit()
    assert same(run.net.state_dict(), run.source.before[4])
    tensors, facts = run.state.load()
    assert facts["done"]["step"] == 4
    kept = {name.removeprefix("net."): value for name, value in tensors.items() if name.startswith("net.")}
    assert same(kept, run.source.before[4])
    assert all(torch.isfinite(value).all() for value in tensors.values())


def test_diverging_learning_rate_ends_in_one_clear_error(train_set, tmp_path):
    with pytest.raises(UserError, match=r"at step \d+; .* Lower lr, lengthen warmup_epochs or set clip_norm"):
        teacher_run(train_set, tmp_path, lr=1e25, epochs=5, momentum=0)


def test_non_finite_loss_of_one_subnet_among_several_moves_nothing(train_set, tmp_path):
    """Earlier subnets of the step have already added gradients and statistics."""
    run = phase_run(train_set, tmp_path, epochs=1, fit_now=False)
    with torch.no_grad():
        run.net.layers["unit2_block2_conv2"].weight.fill_(torch.nan)  # in the largest only
    plan = run.options["plan"]
    run.options["plan"] = type(plan)(lambda *key: plan.draw(*key)[::-1])
    with pytest.raises(UserError, match="the loss is nan at step 0"):
        run.fit()
    now, then = run.net.state_dict(), run.source.before[0]
    assert all(torch.equal(now[name].nan_to_num(), then[name].nan_to_num()) for name in then)


# Resuming, within one process; `test_interruption.py` kills real ones.


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": "sandwich"},
        {"sampling": "per_pass", "teacher": "both", "momentum": 0},
        {"sampling": "uniform", "teacher": "dynamic", "attack": {"num_steps": 1, "bn_mode": "running"}},
        {"sampling": "uniform", "loss": "absld", "attack": {"num_steps": 1}},
        {"sampling": "pareto", "loss": "mtard", "alignment": "igdm", "attack": {"num_steps": 1}},
    ],
    ids=["sandwich", "per_pass", "dynamic", "absld", "mtard"],
)
def test_stopped_and_continued_training_equals_an_uninterrupted_one(train_set, tmp_path, changes):
    whole = phase_run(train_set, tmp_path / "whole", epochs=2, archs_per_step=2, **changes)
    parts = [phase_run(train_set, tmp_path / "parts", epochs=2, archs_per_step=2, fit_now=False, **changes)]
    stops = 0
    while True:
        run = parts[-1]
        run.state.path.parent.mkdir(exist_ok=True)
        run.state.request_path.touch()  # a successor's request: one step, then stop
        try:
            run.fit()
            break
        except Interrupted:
            stops += 1
            parts.append(phase_run(train_set, tmp_path / "parts", epochs=2, archs_per_step=2, fit_now=False, **changes))
    assert stops == len(whole.source.given) - 1
    assert same(parts[-1].net.state_dict(), whole.net.state_dict())
    strip = [[{**row, "seconds": 0} for row in run.rows] for run in (parts[-1], whole)]
    assert strip[0] == strip[1]


def test_state_of_other_settings_is_ignored_with_a_message(tmp_path, capsys):
    state = ResumeState(tmp_path / "net.safetensors", "one")
    state.save({"x": torch.ones(2)}, {"done": {}})
    assert ResumeState(tmp_path / "net.safetensors", "one").load() is not None
    assert ResumeState(tmp_path / "net.safetensors", "two").load() is None
    assert "is of other settings, seed, threads or inputs" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-3], lambda b: b[:-1] + b"\xff", lambda b: b"x" * 99])
def test_damaged_state_is_ignored_with_a_message(tmp_path, capsys, damage):
    state = ResumeState(tmp_path / "net.safetensors", "one")
    state.save({"x": torch.ones(2)}, {"done": {}})
    state.path.write_bytes(damage(state.path.read_bytes()))
    assert state.load() is None
    assert f"state ignored: {state.path}" in capsys.readouterr().out


def test_lock_that_its_owner_removed_does_not_count(tmp_path):
    """A process that waited for a lock, removed when the stage finished, must not run the stage beside the next one."""
    first, second = (ResumeState(tmp_path / "net.safetensors", "one", patience=0) for _ in range(2))
    with first.owned():
        first.finish()
        with second.owned(), pytest.raises(UserError, match=r"process \d+ on .* holds .*net\.lock and does not stop"):
            ResumeState(tmp_path / "net.safetensors", "one", patience=0)._locked()
    assert not first.path.exists()


def test_finished_training_leaves_no_file(tmp_path):
    state = ResumeState(tmp_path / "net.safetensors", "one")
    with state.owned():
        state.save({"x": torch.ones(2)}, {"done": {}})
        state.request_path.touch()
        state.finish()
    assert not list(tmp_path.iterdir())


# Every space; those for large images on images of 64 pixels.


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_space_trains_a_step_and_is_measured(name, tmp_path, tmp_path_factory):
    side, channels = min(PRESETS[name].image_size, 64), PRESETS[name].image_channels
    space = SearchSpace(PRESETS[name].model_copy(update={"image_size": side, "classes": 10}))
    train = image_sets(tmp_path_factory.mktemp("images"), train=6, val=3)["train"]
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (6, side, side, channels), dtype=np.uint8))
    statistics = ((0.5,) * channels, (0.25,) * channels)
    images = type(train)(pixels, torch.arange(6), "checksum", "train", train.classes, *statistics)
    (phase,) = tiny_config(
        phase__archs_per_step=2, phase__batch_size=2, phase__attack={"num_steps": 1}, phase__epochs=1 / 3
    ).train_phase.phases
    net = Supernet(space, mean=images.mean, std=images.std, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in net.named_parameters()}
    run = Run(
        net,
        label="step",
        plan=phase_plan(space, phase),
        settings=phase,
        threat=Threat(),
        source=AugmentedImages(images, phase),
        teacher=lambda batch: torch.linspace(-1, 1, 10).expand(len(batch), 10),
        validate=no_validation,
        state=ResumeState(tmp_path / "net.safetensors", "mark"),
        seed=0,
    )
    rows = run.train()
    assert rows[-1]["step"] == 1
    assert math.isfinite(rows[-1]["loss"])
    moved = {name for name, value in net.named_parameters() if not torch.equal(value, before[name])}
    assert {name for name, value in before.items() if value.ndim > 1 and ".transforms." not in name} <= moved
    meter = SubnetMeter(
        net,
        checksum="net",
        train=images,
        conditions=Conditions(Threat(), Measurement(recalibration_images=4, batch_size=2), 0),
    )
    (row,) = meter.rows(space.smallest, images.first(2), [Attack(num_steps=1)])
    assert (row["macs"], row["num_images"]) == (space.spec(space.smallest).macs, 2)
    assert 0 <= row["robust_acc"] <= row["clean_acc"] <= 1
    assert torch.isfinite(meter.student(space.smallest)(to_float(images.images[:2]))).all()
