"""Networks trained one by one: grids written out, the stage from settings to files, and what Snakemake plans."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml
from helpers import CONFIG, TINY, random_images, random_supernet, tiny_space
from student_runs import config_of, student_files, train
from training_runs import EPS, plain_network, same, step_of, take

from proard.artifacts import read_header
from proard.attacks import pgd
from proard.config import ConfigError, UserError, job_settings, load
from proard.config.experiment import expand
from proard.config.losses import Ard, Rslad
from proard.losses import Batch, Objective, fast_edge_loss
from proard.nets import load_static
from proard.nets.elastic import Supernet
from proard.stages import train_experiment
from proard.stages.train_teacher import fitted_space
from proard.training import Drawn, Interrupted, Plan, single_plan
from proard.training.run import learning_rate

ROOT = Path(__file__).parents[1]


def names(config):
    return [student.name for student in config.experiment.trainings]


# --- settings -----------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_with_a_name_of_its_own():
    entry = {"name": "edge", "lr": 0.1, "attack": {"step_size": "2/255"}}
    entry |= {"grid": {"attack.num_steps": [1, 2], "attack.step_size": ["2/255", 0.5]}, "seeds": [3, 4]}
    expanded = expand(entry)
    assert [each["name"] for each in expanded[:3]] == [
        "edge_num_steps=1_step_size=2-255_seed=3",
        "edge_num_steps=1_step_size=2-255_seed=4",
        "edge_num_steps=1_step_size=0.5_seed=3",
    ]
    assert len({each["name"] for each in expanded}) == len(expanded) == 8
    assert expanded[-1]["attack"] == {"num_steps": 2, "step_size": 0.5}
    assert expanded[-1]["seed"] == 4
    assert expanded[-1]["lr"] == 0.1
    assert entry["attack"] == {"step_size": "2/255"}
    assert expand({"name": "alone"}) == [{"name": "alone"}]


def test_students_take_the_shared_keys_and_their_grid_is_parsed():
    config = config_of({"name": "a", "loss": "ard", "grid": {"lr": [0.1, "1/4"]}}, {"name": "b", "lr": 0.3}, epochs=7)
    assert names(config) == ["a_lr=0.1", "a_lr=1-4", "b"]
    assert [student.lr for student in config.experiment.trainings] == [0.1, 0.25, 0.3]
    assert {student.epochs for student in config.experiment.trainings} == {7}
    assert [student.loss for student in config.experiment.trainings] == [Ard(), Ard(), Rslad()]
    again = load(json.loads(job_settings(config, "train_experiment")))
    assert again.experiment.trainings == config.experiment.trainings


def test_a_job_is_told_of_its_own_student_alone():
    before = config_of({"name": "a", "grid": {"lr": [0.1, 0.2]}})
    after = config_of({"name": "a", "grid": {"lr": [0.1, 0.2, 0.3]}}, {"name": "c"})
    one, other = (job_settings(config, "train_experiment", training="a_lr=0.2") for config in (before, after))
    assert one == other
    assert [entry["name"] for entry in json.loads(one)["experiment"]["trainings"]] == ["a_lr=0.2"]
    with pytest.raises(ConfigError, match=r"a_lr=0\.4 is no training.*did you mean a_lr=0\.[12]"):
        job_settings(before, "train_experiment", training="a_lr=0.4")


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({"name": "a", "grid": {"lr": 0.1}}, ["experiment.a.grid", "lists"]),
        ({"name": "a", "grid": {"lr": []}}, ["experiment.a.grid", "lists"]),
        ({"name": "a", "seeds": 3}, ["experiment.a.seeds", "list"]),
        ({"name": "a", "grid": {"attack.num_step": [1]}}, ["num_step", "did you mean", "num_steps"]),
        ({"name": "a", "grid": {"lr": [0.1, 0.1]}}, ["different names", "a_lr=0.1"]),
        ({"name": "a", "loss": "kd", "alignment": {"name": "kdiga", "at": "adv"}}, ["a", "no attack", "kdiga"]),
        ({"name": "a", "loss": "trades", "teacher_logits": "float32"}, ["teacher_logits", "trades"]),
        ({"name": "a", "loss": "rslat"}, ["experiment.a.loss", "rslat", "rslad"]),
        ({"name": "a", "attack": {"step_size": 2}}, ["experiment.a", "2/255"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(sorted(value)),
)
def test_a_wrong_student_is_one_clear_line(student, words):
    with pytest.raises(ConfigError) as caught:
        config_of(student)
    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["fast_edge", "fast_edge_micro", "kdiga", "kdiga_micro"])
def test_a_committed_experiment_holds_what_it_says(name):
    config = load(yaml.safe_load((ROOT / "config" / "experiments" / f"{name}.yaml").read_text("utf-8")))
    students = config.experiment.trainings
    seeds = {}
    for student in students:
        seeds.setdefault(student.name.rsplit("_seed=", 1)[0], set()).add(student.seed)
    assert {len(found) for found in seeds.values()} <= {2, 3}
    assert {attack.objective for attack in config.experiment.measure.attacks} == {"ce", "margin"}
    assert len({student.net.family for student in students}) == 2
    for student in students:
        fitted_space(student.net, config.space, where=student.name)
    gradients = {s.epochs * (s.attack.num_steps + 1) for s in students if s.name.startswith("equal_")}
    assert all(found == pytest.approx(max(gradients)) for found in gradients)


# --- the stage ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return student_files(tmp_path_factory.mktemp("students"))


@pytest.mark.parametrize("loss", ["plain", "pgd_at", "ikl", "adr", "kd", "ard", "rslad", "adaad", "mtard", "absld"])
def test_any_loss_trains_an_arch_of_the_runs_space(files, tmp_path, loss):
    net, space, arch, history, written = train(files, tmp_path, {"name": "s", "loss": loss, "arch": "smallest"})
    assert arch == space.smallest
    assert space.settings.model_dump()["units"] == load(CONFIG).space.model_dump()["units"]
    start = Supernet(space, mean=[0.4], std=[0.3], generator=torch.Generator().manual_seed(0))
    assert not torch.equal(net.head.weight, start.head.weight[:, : net.spec.features])
    assert history["epoch"].tolist() == [1, 2]
    assert set(history["phase"]) == {"s"}
    assert set(history["macs"]) == {net.spec.macs}
    assert not list(tmp_path.glob("*.state"))
    assert read_header(written["weights"])["provenance"]["stage"] == "train_experiment"


def test_the_seed_and_the_loss_decide_the_weights(files, tmp_path):
    student = {"name": "s", "loss": "rslad"}
    runs = [train(files, tmp_path / str(i), student, seed=seed)[0].state_dict() for i, seed in enumerate([0, 0, 1])]
    other = train(files, tmp_path / "other", {"name": "s", "loss": "ard"})[0].state_dict()
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])
    assert not same(runs[0], other)


def test_a_loss_that_asks_a_teacher_needs_its_file_and_others_do_not(files, tmp_path):
    with pytest.raises(UserError, match=r"experiment\.s needs a teacher.*--teacher"):
        train(files, tmp_path, {"name": "s", "loss": "kd"}, networks=())
    with pytest.raises(UserError, match=r"--control"):
        train(files, tmp_path, {"name": "s", "loss": "hat"}, networks=("teacher",))
    train(files, tmp_path, {"name": "s", "loss": "pgd_at"}, networks=())


def test_the_gradient_term_changes_what_is_learned(files, tmp_path):
    weights = [
        train(files, tmp_path / name, {"name": "s", "loss": "kd", "alignment": alignment})[0].state_dict()
        for name, alignment in (("without", None), ("with", {"name": "kdiga", "weight": 10}))
    ]
    assert not same(*weights)


def test_an_arch_is_written_out_and_a_preset_takes_the_runs_images(files, tmp_path):
    student = {"name": "s", "loss": "plain", "arch": {"depth": [1, 0], "width": [1, 0.5, 1], "expand": [1, 0.5, 1, 0]}}
    _, space, arch, *_ = train(files, tmp_path / "own", student)
    assert space.genotype(arch) == tiny_space(TINY).genotype(arch)
    assert arch.depth == (1, 0)
    _, space, arch, *_ = train(files, tmp_path / "preset", {**student, "net": "resnet_digits", "arch": "smallest"})
    assert (space.settings.name, space.settings.classes, arch) == ("resnet_digits", 3, space.smallest)
    with pytest.raises(ConfigError, match=r"experiment\.s\.arch lists depth, width and expand"):
        train(files, tmp_path / "wrong", {**student, "arch": {"depth": [1]}})
    with pytest.raises(ConfigError, match=r"experiment.s: net is .resnet_tiny."):
        train(files, tmp_path / "wrong", {**student, "net": "resnet_tiny"})


def test_the_frozen_teacher_is_the_one_in_the_file(files):
    config = config_of({"name": "s", "loss": "kd"})
    job = type("Job", (), {"files": type("Files", (), {"teacher": files["teacher"]}), "device": "cpu"})
    teacher = train_experiment.frozen_teacher(job, config.experiment.trainings[0])
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    net, *_ = load_static(files["teacher"], kind="teacher")
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), net(images))
        assert not torch.allclose(teacher(images), plain_network(seed=3)(images))


@pytest.mark.parametrize("net", ["vit", "wide_resnet", "resnet20", "mobilenet_v2_micro"])
def test_other_networks_train_with_attack_and_teacher(files, tmp_path, net):
    chosen = {"vit": {"family": "vit", "patch": 4, "layers": 1, "heads": 2, "hidden": 8, "mlp": 8}}
    chosen |= {"wide_resnet": {"family": "wide_resnet", "depth": 10, "widen": 1}}
    student = {
        "name": "s",
        "net": chosen.get(net, net),
        "loss": "ard",
        "alignment": {"name": "kdiga", "weight": 0.1, "at": "adv"},
    }
    trained, space, arch, history, _ = train(files, tmp_path, {**student, "epochs": 1})
    assert history["macs"].tolist() == [space.spec(arch).macs]
    assert (space.settings.image_channels, space.settings.classes) == (1, 3)
    with torch.no_grad():
        assert trained(torch.rand(2, 1, 8, 8)).isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "adamw", "lr": 1e-3}, {"optimizer": "muon", "lr": 0.02}],
    ids=["sgd", "adamw", "muon"],
)
def test_a_stopped_training_of_a_vit_goes_on_bit_for_bit(files, tmp_path, changes):
    net = {"family": "vit", "patch": 4, "layers": 1, "heads": 2, "hidden": 8, "mlp": 8}
    student = {"name": "s", "net": net, "loss": "rslad", **changes}
    whole = train(files, tmp_path / "whole", student)[0].state_dict()
    seen = []

    def search(*arguments, **options):
        seen.append(arguments)
        if len(seen) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return pgd(*arguments, **options)

    with pytest.raises(Interrupted, match="after step 8"):
        train(files, tmp_path / "parts", student, search=search)
    again = train(files, tmp_path / "parts", student)[0].state_dict()
    assert same(whole, again)


def test_every_optimizer_takes_its_own_steps(files, tmp_path):
    student = {"name": "s", "loss": "plain", "lr": 0.01}
    kinds = ("sgd", "adamw", "muon")
    trained = [train(files, tmp_path / kind, {**student, "optimizer": kind})[0].state_dict() for kind in kinds]
    assert not any(same(one, other) for one, other in combinations(trained, 2))


# --- options of a training ----------------------------------------------------------------------------------------


def test_gradients_are_counted(files, tmp_path):
    counts = {}
    for name, student in {
        "plain": {"loss": "plain"},
        "attacked": {"loss": "ard"},
        "aligned": {"loss": "kd", "alignment": "kdiga"},
        "taught": {"loss": "fast_edge", "attack": {"crafted_on": "teacher", "num_steps": 1}},
    }.items():
        history = train(files, tmp_path / name, {"name": "s", **student})[3]
        counts[name] = history["gradients"].iloc[-1] / history["images"].iloc[-1]
    assert counts == {"plain": 1, "attacked": 3, "aligned": 2, "taught": 2}


@pytest.mark.parametrize("kept", ["float32", "float16"])
def test_kept_gradients_of_the_teacher_are_those_it_would_give(files, tmp_path, kept):
    student = {"name": "s", "loss": "kd", "alignment": "kdiga", "augment": {"crop_padding": 1, "flip": True}}
    plain = train(files, tmp_path / "plain", {**student})[0].state_dict()
    both = {"teacher_gradients": kept, "teacher_logits": "float32"}
    table = train(files, tmp_path / kept, {**student, **both})
    if kept == "float32":
        assert same(plain, table[0].state_dict())
    else:
        for name, value in table[0].state_dict().items():
            torch.testing.assert_close(value, plain[name], atol=1e-2, rtol=1e-2)


def test_a_scaled_loss_has_scaled_gradients(files):
    config = config_of({"name": "s", "loss": {"name": "ard", "scale": 0.1}}, {"name": "t", "loss": "ard"})
    logits, teacher = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    batch = Batch(torch.arange(4) % 3, clean=logits, adv=2 * logits, teacher=teacher)
    small, whole = (
        float(drawn.objective.loss(batch, **drawn.options))
        for student in config.experiment.trainings
        for drawn in single_plan(tiny_space().largest, student.loss, student).draw(0, 0, 0)
    )
    assert small == pytest.approx(whole / 10)


def test_schedules():
    config = config_of({"name": "s", "lr": 0.8, "grid": {"schedule": ["constant", "steps", "cosine"]}})
    rates = [[learning_rate(s, step, 8, 0) for step in range(8)] for s in config.experiment.trainings]
    assert rates[0] == [0.8] * 8
    assert rates[1] == pytest.approx([0.8] * 4 + [0.08] * 2 + [0.008] * 2)
    assert rates[2][4] == pytest.approx(0.4)


def test_the_last_epoch_is_kept_where_asked(files, tmp_path):
    history = train(files, tmp_path, {"name": "s", "loss": "plain", "keep": "last", "epochs": 4})[3]
    assert history.loc[history["best"], "epoch"].tolist() == [4]


def test_equal_gradients_become_epochs():
    config = config_of(
        {"name": "s", "effort": {"gradients": 22}, "grid": {"attack.num_steps": [1, "2", 10]}},
        {"name": "t", "effort": {"gradients": 8}},
        {"name": "u", "effort": {"gradients": 8}, "loss": "kd"},  # without an attack
    )
    assert [student.epochs for student in config.experiment.trainings] == pytest.approx([11, 22 / 3, 2, 8 / 3, 8])
    again = load(json.loads(job_settings(config, "train_experiment")))
    assert again.experiment.trainings == config.experiment.trainings
    with pytest.raises(ConfigError, match=r"experiment\.s\.effort\.gradients is 'ten'; expected: a number"):
        config_of({"name": "s", "effort": {"gradients": "ten"}})
    with pytest.raises(
        ConfigError, match="needs one of forward_equivalents, gradients, steps; given: gradients, steps"
    ):
        config_of({"name": "s", "effort": {"gradients": 1, "steps": "path"}})
    with pytest.raises(ConfigError, match=r"experiment\.s\.effort: forward_equivalents is for supernets"):
        config_of({"name": "s", "effort": {"forward_equivalents": 1}})


def test_noise_moves_every_clean_image_inside_the_ball():
    seen, space = [], tiny_space()
    watched = Objective(None, lambda batch: seen.append(batch.images) or batch.clean.sum(), frozenset({"clean"}))
    plan = Plan(lambda seed, step, data_pass: [Drawn(space.largest, watched, {})])
    images = random_images(space, 6, dtype=torch.float32)
    for noise in (0, 1):
        (student,) = config_of({"name": "s", "loss": "kd", "clean_noise": noise}).experiment.trainings
        take(step_of(random_supernet(space, dtype=torch.float32), student, plan), images, torch.arange(6) % 3)
    before, after = seen
    assert torch.equal(before, images)
    assert 0.05 < (after - before).abs().max() <= EPS + 1e-6
    assert after.min() >= 0
    assert after.max() <= 1


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({"loss": "ard", "clean_noise": 1}, ["clean_noise", "ard"]),
        ({"loss": "kd", "clean_noise": 1, "teacher_logits": "float32"}, ["clean_noise", "teacher_logits"]),
        ({"loss": "kd", "teacher_gradients": "float32"}, ["teacher_gradients", "kdiga"]),
    ],
    ids=["attack", "views", "nothing kept"],
)
def test_options_that_exclude_each_other_are_refused(student, words):
    with pytest.raises(ConfigError) as caught:
        config_of({"name": "s", **student})
    assert [word for word in words if word not in str(caught.value)] == []


def test_an_attack_on_the_teacher_needs_one():
    with pytest.raises(ConfigError, match=r"train_teacher.*no frozen teacher"):
        load({**CONFIG, "train_teacher": {"attack": {"crafted_on": "teacher"}}})


def test_images_crafted_on_the_teacher_are_fgsm_against_it(files, tmp_path):
    seen = []

    def search(predict, objective, images, **options):
        adv = pgd(predict, objective, images, **options)
        seen.append((images.clone(), objective.labels, adv))
        return adv

    attack = {"crafted_on": "teacher", "num_steps": 1, "step_size": 0.1, "start": "zero"}
    train(files, tmp_path, {"name": "s", "loss": "fast_edge", "attack": attack, "epochs": 1}, search=search)
    net, *_ = load_static(files["teacher"], kind="teacher")
    images, labels, adv = seen[-1]
    inputs = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(net(inputs), labels, reduction="sum"), inputs)
    steep = gradient.abs() > 1e-4
    torch.testing.assert_close(adv[steep], (images + 0.1 * gradient.sign()).clamp(0, 1)[steep])


def test_fast_edge_by_hand():
    clean, adv = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    teacher, labels = torch.tensor([[0.0, 1.0]]), torch.tensor([0])
    share = 1 / (1 + math.e)
    soft = -(share * math.log(1 - share) + (1 - share) * math.log(share))
    hard = math.log(1 + math.exp(2))
    found = fast_edge_loss(clean, adv, teacher, labels, beta=3.0)
    assert float(found) == pytest.approx(soft + 3 * hard, rel=1e-5)


# --- the workflow -------------------------------------------------------------------------------------------------


def test_snakemake_trains_the_students_asked_for_with_their_seeds_and_teachers(tmp_path):
    students = [{"name": "plain", "loss": "plain"}, {"name": "s", "loss": "kd", "seeds": [4, 5]}]
    values = {"run": "few", "seed": 2, "experiment": {"defaults": {"epochs": 1}, "trainings": students}}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "snakemake", "train_experiments", "--dry-run", "--printshellcmds"]
    where = ["--snakefile", ROOT / "workflow" / "Snakefile", "--directory", tmp_path, "--configfile", config]
    done = subprocess.run([*command, *where], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "proard.stages.train_experiment " in line]
    assert [f"--weights results/few/train_experiment/{name}/" in "".join(lines) for name in ("plain", "s_seed=5")]
    by_seed = {line.split("--seed ")[1].split()[0]: line for line in lines}
    assert sorted(by_seed) == ["2", "4", "5"]
    assert "--teacher" not in by_seed["2"]
    assert "--teacher results/few/train_teacher/teacher.safetensors" in by_seed["5"]
    assert "train_control" not in done.stdout
