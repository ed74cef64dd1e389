"""Networks trained one by one: grids written out, the stage from settings to files, and what Snakemake plans."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import CONFIG, TINY, save_stripes, tiny_space
from training_runs import plain_network, same

from proard.artifacts import Provenance, read_header, read_table
from proard.config import ConfigError, UserError, job_settings, load
from proard.config.students import expand
from proard.nets import load_static, save_static
from proard.nets.elastic import Supernet
from proard.nets.subnet import extract
from proard.stages import train_student

ROOT = Path(__file__).parents[1]
SHORT = {key: value for key, value in CONFIG["train_phase"]["phases"][0].items() if key != "name"}


def config_of(*students, **shared):
    """The tiny run with these students."""
    return load({**CONFIG, "train_student": {**SHORT, **shared, "students": list(students)}})


def names(config):
    return [student.name for student in config.train_student.students]


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
    assert [student.lr for student in config.train_student.students] == [0.1, 0.25, 0.3]
    assert {student.epochs for student in config.train_student.students} == {7}
    assert [student.temperature for student in config.train_student.students] == [30, 30, 1]
    again = load(json.loads(job_settings(config, "train_student")))
    assert again.train_student == config.train_student


def test_a_job_is_told_of_its_own_student_alone():
    before = config_of({"name": "a", "grid": {"lr": [0.1, 0.2]}})
    after = config_of({"name": "a", "grid": {"lr": [0.1, 0.2, 0.3]}}, {"name": "c"})
    one, other = (job_settings(config, "train_student", student="a_lr=0.2") for config in (before, after))
    assert one == other
    assert [entry["name"] for entry in json.loads(one)["train_student"]["students"]] == ["a_lr=0.2"]
    with pytest.raises(ConfigError, match=r"a_lr=0\.4 is no student.*did you mean a_lr=0\.[12]"):
        job_settings(before, "train_student", student="a_lr=0.4")


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({"name": "a", "grid": {"lr": 0.1}}, ["train_student.a.grid", "lists"]),
        ({"name": "a", "grid": {"lr": []}}, ["train_student.a.grid", "lists"]),
        ({"name": "a", "seeds": 3}, ["train_student.a.seeds", "list"]),
        ({"name": "a", "grid": {"attack.num_step": [1]}}, ["num_step", "did you mean", "num_steps"]),
        ({"name": "a", "grid": {"lr": [0.1, 0.1]}}, ["different names", "a_lr=0.1"]),
        ({"name": "a", "loss": "kd", "kdiga_weight": 1, "kdiga_at": "adv"}, ["a", "no attack", "kdiga_at"]),
        ({"name": "a", "loss": "trades", "teacher_logits": "float32"}, ["teacher_logits", "trades"]),
        ({"name": "a", "loss": "rslat"}, ["train_student.a.loss", "rslat", "rslad"]),
        ({"name": "a", "attack": {"step_size": 2}}, ["train_student.a", "2/255"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(sorted(value)),
)
def test_a_wrong_student_is_one_clear_line(student, words):
    with pytest.raises(ConfigError) as caught:
        config_of(student)
    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


# --- the stage ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    paths = save_stripes(folder)
    space = tiny_space()
    net = extract(Supernet(space, mean=[0.4], std=[0.3], generator=torch.Generator().manual_seed(7)), space.largest)
    for kind in ("teacher", "control"):
        paths[kind] = folder / f"{kind}.safetensors"
        made_by = Provenance("tiny", f"train_{kind}")
        save_static(paths[kind], net.eval(), space=space, arch=space.largest, kind=kind, provenance=made_by)
    return paths


def train(files, folder, student, *, seed=0, networks=("teacher", "control")):
    """Run the stage for one student; the network, its space and arch, its history and its files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {"student": folder / "student.safetensors", "history": folder / "history.parquet"}
    flags = {**{name: files[name] for name in ("train", "val", *networks)}, **written}
    settings = job_settings(config_of(student), "train_student", student=student["name"])
    argv = ["--settings", settings, "--seed", str(seed), "--threads", "1", "--device", "cpu"]
    train_student.main([*argv, *(word for name, path in flags.items() for word in (f"--{name}", str(path)))])
    net, space, arch, _ = load_static(written["student"], kind="trained_student")
    return net, space, arch, read_table(written["history"]), written


@pytest.mark.parametrize("loss", ["plain", "pgd_at", "kd", "ard", "rslad", "adaad", "mtard", "absld"])
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
    assert read_header(written["student"])["provenance"]["stage"] == "train_student"


def test_the_seed_and_the_loss_decide_the_weights(files, tmp_path):
    student = {"name": "s", "loss": "rslad"}
    runs = [train(files, tmp_path / str(i), student, seed=seed)[0].state_dict() for i, seed in enumerate([0, 0, 1])]
    other = train(files, tmp_path / "other", {"name": "s", "loss": "ard"})[0].state_dict()
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])
    assert not same(runs[0], other)


def test_a_loss_that_asks_a_teacher_needs_its_file_and_others_do_not(files, tmp_path):
    with pytest.raises(UserError, match=r"train_student\.s: its loss asks a teacher.*--teacher"):
        train(files, tmp_path, {"name": "s", "loss": "kd"}, networks=())
    with pytest.raises(UserError, match=r"--control"):
        train(files, tmp_path, {"name": "s", "loss": "hat"}, networks=("teacher",))
    train(files, tmp_path, {"name": "s", "loss": "pgd_at"}, networks=())


def test_the_gradient_term_changes_what_is_learned(files, tmp_path):
    weights = [
        train(files, tmp_path / str(gamma), {"name": "s", "loss": "kd", "kdiga_weight": gamma})[0].state_dict()
        for gamma in (0, 10)
    ]
    assert not same(*weights)


def test_an_arch_is_written_out_and_a_preset_takes_the_runs_images(files, tmp_path):
    student = {"name": "s", "loss": "plain", "arch": {"depth": [1, 0], "width": [1, 0.5, 1], "expand": [1, 0.5, 1, 0]}}
    _, space, arch, *_ = train(files, tmp_path / "own", student)
    assert space.genotype(arch) == tiny_space(TINY).genotype(arch)
    assert arch.depth == (1, 0)
    _, space, arch, *_ = train(files, tmp_path / "preset", {**student, "net": "resnet_digits", "arch": "smallest"})
    assert (space.settings.name, space.settings.classes, arch) == ("resnet_digits", 3, space.smallest)
    with pytest.raises(ConfigError, match=r"train_student\.s\.arch lists depth, width and expand"):
        train(files, tmp_path / "wrong", {**student, "arch": {"depth": [1]}})
    with pytest.raises(ConfigError, match=r"train_student.s: net is .resnet_tiny."):
        train(files, tmp_path / "wrong", {**student, "net": "resnet_tiny"})


def test_the_frozen_teacher_is_the_one_in_the_file(files):
    config = config_of({"name": "s", "loss": "kd"})
    job = type("Job", (), {"files": type("Files", (), {"teacher": files["teacher"]}), "device": "cpu"})
    teacher = train_student.frozen_teacher(job, config.train_student.students[0])
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    net, *_ = load_static(files["teacher"], kind="teacher")
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), net(images))
        assert not torch.allclose(teacher(images), plain_network(seed=3)(images))


# --- the workflow -------------------------------------------------------------------------------------------------


def test_snakemake_trains_the_students_asked_for_with_their_seeds_and_teachers(tmp_path):
    students = [{"name": "plain", "loss": "plain"}, {"name": "s", "loss": "kd", "seeds": [4, 5]}]
    values = {"run": "few", "seed": 2, "train_student": {"epochs": 1, "students": students}}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "snakemake", "train_students", "--dry-run", "--printshellcmds"]
    where = ["--snakefile", ROOT / "workflow" / "Snakefile", "--directory", tmp_path, "--configfile", config]
    done = subprocess.run([*command, *where], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "proard.stages.train_student " in line]
    assert [f"--student results/few/train_student/{name}/" in "".join(lines) for name in ("plain", "s_seed=5")]
    by_seed = {line.split("--seed ")[1].split()[0]: line for line in lines}
    assert sorted(by_seed) == ["2", "4", "5"]
    assert "--teacher" not in by_seed["2"]
    assert "--teacher results/few/train_teacher/teacher.safetensors" in by_seed["5"]
    assert "train_control" not in done.stdout
