"""Twins: which archs, how long they are trained, the paired gap, and the stages of the experiment."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers import random_supernet, save_stripes, tiny_config, tiny_space

from proard.artifacts import ArtifactError, Provenance, read_table
from proard.config import PRESETS, ConfigError, RunConfig, UserError, job_settings, load
from proard.config.losses import Ard
from proard.data import load_split
from proard.nets import Supernet, extract, implant, load_static, save_static, save_supernet
from proard.report.twins import gaps_of
from proard.space import Arch, SearchSpace
from proard.space.sampling import spread_archs
from proard.space.twins import with_twins
from proard.stages import compare_experiment, export_student, measure_experiment, train_experiment
from proard.stages.export_student import EXPORTED

CONFIG = Path(__file__).parents[1] / "config"
TWINS = {"trains": "twins", "archs": 2, "seeds": [0, 1]}


def run_with(twins: dict, *, measure: dict | None = None, **changes: object) -> RunConfig:
    """The tiny run with twins."""
    section = {"trainings": [twins], "bootstraps": 300, "measure": measure or {}}
    return with_twins(tiny_config(experiment=section, **changes))


def test_one_arch_comes_from_each_part_of_the_range_and_no_end():
    space = SearchSpace(PRESETS["resnet_micro"])
    found = spread_archs(space, 4, seed=0)
    macs = np.log(space.costs(found)["macs"])
    low, high = np.log(space.spec(space.smallest).macs), np.log(space.spec(space.largest).macs)
    assert ((macs - low) / (high - low) * 4).astype(int).tolist() == [0, 1, 2, 3]
    assert low < macs.min()
    assert macs.max() < high
    assert (spread_archs(space, 4, seed=0) == found).all()
    assert (spread_archs(space, 4, seed=1) != found).any()


def test_more_parts_than_the_space_can_fill_is_an_error():
    with pytest.raises(
        ValueError, match=r"archs is 400 for twins; space tiny has no arch in \d+ of that many equal parts"
    ):
        spread_archs(tiny_space(), 400, seed=0)


@pytest.mark.parametrize(
    ("twins", "changes", "epochs"),
    [
        ({}, {}, 2),
        ({"effort": {"steps": "path"}}, {}, 2),  # it starts from the teacher's weights, as the supernet did
        ({"effort": {"steps": "path"}, "warm_start": "random"}, {}, 2 + 2),
        ({"effort": {"steps": "path"}}, {"phase__warm_start": "random"}, 2),
        ({"epochs": 0.5}, {}, 0.5),
        ({"effort": {"gradients": 6}}, {}, 2),  # two attack steps and an update
        ({}, {"phase__sampling": "per_pass", "phase__archs_per_step": 3}, 6),
        ({"batch_size": 32}, {}, 4),  # as many steps of twice as many images
    ],
)
def test_a_twin_makes_as_many_steps_as_its_subnet_went_through(twins, changes, epochs):
    run = run_with({**TWINS, **twins}, **changes)
    assert {training.epochs for training in run.experiment.trainings} == {epochs}


@pytest.mark.parametrize("steps", ["phases", "path"])
def test_epochs_of_stretched_phases_must_be_a_number(steps):
    with pytest.raises(ConfigError, match=r"phase all is scaled .*set its epochs"):
        run_with({**TWINS, "effort": {"steps": steps}}, phase__forward_equivalents=1e4)
    run = run_with({**TWINS, "epochs": 1.5}, phase__forward_equivalents=1e4)
    assert {training.epochs for training in run.experiment.trainings} == {1.5}


def test_twins_inherit_the_last_phase_and_take_their_overrides():
    students = run_with({**TWINS, "attack": {"num_steps": 1}, "lr": 0.5}, phase__loss="ard").experiment.trainings
    assert [student.name for student in students] == [f"twin{arch}_seed={seed}" for arch in (0, 1) for seed in (0, 1)]
    first = students[0]
    assert (first.loss, first.lr, first.seed) == (Ard(), 0.5, 0)
    assert (first.attack.num_steps, first.attack.step_size) == (1, 0.05)  # the phase's own step size stays
    space = tiny_space()
    macs = [space.spec(Arch.from_dims(student.arch)).macs for student in students]
    assert macs[0] == macs[1] < macs[2] == macs[3]
    with pytest.raises(ConfigError, match=r"experiment.twin.lrr is no setting; did you mean lr\?"):
        run_with({**TWINS, "lrr": 1})
    with pytest.raises(ConfigError, match=r"experiment.twin: a twin is an arch of the run's own space"):
        run_with({**TWINS, "net": "resnet18"})


def test_a_twin_starts_as_the_supernet_did_and_has_its_seed_beside():
    supernet = {"name": "shared", "trains": "supernet", "seeds": [0, 1], "epochs": 3, "lr": 0.3}
    twins = {**TWINS, "beside": "shared"}

    def trainings(*listed: dict, **changes: object) -> tuple:
        return with_twins(tiny_config(experiment={"trainings": list(listed)}, **changes)).experiment.trainings

    students = trainings(supernet, twins)[2:]
    assert [student.beside for student in students] == ["shared_seed=0", "shared_seed=1"] * 2
    assert {(student.epochs, student.lr, student.warm_start) for student in students} == {(3, 0.3, "teacher")}
    assert {each.warm_start for each in trainings(TWINS, phase__warm_start="random")} == {"random"}
    with pytest.raises(ConfigError, match=r"experiment.twin.beside is shared, seed 2; .* shared_seed=0, shared_seed=1"):
        trainings(supernet, {**twins, "seeds": [2]})
    with pytest.raises(ConfigError, match="beside is for twins"):
        trainings(supernet, {"name": "one", "beside": "shared"})
    with pytest.raises(ConfigError, match="warm_start: teacher is for archs of the run's own space"):
        trainings({"name": "one", "net": "resnet20", "warm_start": "teacher"})


def test_in_the_committed_experiment_twins_and_supernet_differ_in_sharing_alone():
    run = with_twins(load(yaml.safe_load((CONFIG / "experiments" / "twin.yaml").read_text())))
    supernets, twins = run.experiment.trainings[:3], run.experiment.trainings[3:]
    assert len(twins) == 12
    for twin in twins:
        (supernet,) = (each for each in supernets if each.name == twin.beside)
        (phase,) = supernet.phases
        assert supernet.seed == twin.seed
        alike = type(twin).model_fields.keys() & type(phase).model_fields.keys()
        assert {name for name in alike if getattr(twin, name) != getattr(phase, name)} == {"name"}
        assert phase.teacher == "frozen"
        assert phase.warm_start == "teacher"
    assert run.experiment.measure.num_test_images is None
    assert run.experiment.measure.attacks == run.verify_front.attacks


def test_a_warm_start_is_the_teachers_weights(tmp_path):
    run = run_with({**TWINS, "seeds": [5], "lr": 1e-9}, phase__epochs=0.1)  # the update changes nothing
    images = {name: str(path) for name, path in save_stripes(tmp_path).items()}
    space, teacher = tiny_space(), tmp_path / "teacher.safetensors"
    largest = extract(random_supernet(space, dtype=torch.float32, seed=3), space.largest)
    save_static(
        teacher,
        largest,
        space=space,
        arch=space.largest,
        kind="teacher",
        provenance=Provenance("tiny", "train_teacher"),
    )
    student = run.experiment.trainings[0]
    weights = tmp_path / "weights.safetensors"
    words = ["--settings", job_settings(run, "train_experiment", training=student.name), "--seed", "5"]
    for flag in ("train", "val"):
        words += [f"--{flag}", images[flag]]
    words += ["--weights", str(weights), "--history", str(tmp_path / "history.parquet"), "--device", "cpu"]
    train_experiment.main([*words, "--teacher", str(teacher)])
    net, *_ = load_static(weights, kind="trained_student")
    supernet = Supernet(space, mean=(0.5,), std=(0.25,))
    implant(supernet, largest)
    expected = extract(supernet, Arch.from_dims(student.arch))
    found, wanted = dict(net.named_parameters()), dict(expected.named_parameters())
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="needs a teacher"):
        train_experiment.main(words)


# The gap, computed by hand.


def outcome(role, arch, robust, *, seed=0, macs=1):
    robust = [bool(int(bit)) for bit in robust]
    return {
        "arch_id": arch, "genotype": [0], "arch": "{}", "macs": macs, "params": 1, "role": role, "train_seed": seed,
        "split": "test", "attack": "worst", "num_images": len(robust), "clean": [True] * len(robust), "robust": robust,
    }  # fmt: skip


def test_gap_and_discordant_images_by_hand():
    rows = [outcome("subnet", "a", "1110"), outcome("twin", "a", "1001")]
    rows += [outcome("subnet", "a", "1111", seed=1), outcome("twin", "a", "1000", seed=1)]
    for seed in (0, 1):
        rows += [outcome("subnet", "b", "0000", macs=2, seed=seed), outcome("twin", "b", "1111", macs=2, seed=seed)]
    found = {(row["arch_id"], row["measure"]): row for row in gaps_of(pd.DataFrame(rows), bootstraps=200, seed=0)}
    a, b, mean = (found[name, "robust"] for name in ("a", "b", "mean"))
    assert (a["num_seeds"], a["subnet_acc"], a["twin_acc"]) == (2, 0.875, 0.375)
    assert a["gap"] == pytest.approx(0.5)  # 1/4 and 3/4
    assert (a["subnet_only"], a["twin_only"]) == (5 / 8, 1 / 8)
    assert a["gap_sd_over_seeds"] == pytest.approx(np.std([0.25, 0.75], ddof=1))
    over_seeds = 12.706 * np.std([0.25, 0.75], ddof=1) / np.sqrt(2)  # Student's t for two seeds
    assert a["gap_high"] - a["gap"] == pytest.approx(a["gap"] - a["gap_low"])
    assert a["gap_high"] - a["gap"] > over_seeds
    assert (b["gap"], b["gap_low"], b["gap_high"]) == (-1, -1, -1)  # every image differs: no sample changes that
    assert mean["gap"] == pytest.approx((0.5 - 1) / 2)
    assert all(row["gap"] == row["gap_low"] == row["gap_high"] == 0 for key, row in found.items() if key[1] == "clean")


def test_the_interval_is_the_paired_one():
    rng = np.random.default_rng(0)
    twin = rng.random(2000) < 0.4
    subnet = twin ^ (rng.random(2000) < 0.05)  # they differ on 5 % of the images
    bits = {"subnet": subnet, "twin": twin}
    rows = [outcome(role, "a", "".join(str(int(bit)) for bit in bits[role])) for role in bits]
    row = next(row for row in gaps_of(pd.DataFrame(rows), bootstraps=2000, seed=0) if row["measure"] == "robust")
    difference = subnet.astype(float) - twin
    half = 1.96 * difference.std() / np.sqrt(2000)
    assert row["gap_high"] - row["gap_low"] == pytest.approx(2 * half, rel=0.1)
    unpaired = 1.96 * np.sqrt(2 * 0.24 / 2000)
    assert half < 0.5 * unpaired


def test_an_arch_without_its_twin_and_other_images_are_errors():
    with pytest.raises(ArtifactError, match="arch a lacks its twin"):
        gaps_of(pd.DataFrame([outcome("subnet", "a", "10")]), bootstraps=10, seed=0)
    with pytest.raises(ArtifactError, match="different numbers of images"):
        gaps_of(pd.DataFrame([outcome("subnet", "a", "10"), outcome("twin", "a", "101")]), bootstraps=10, seed=0)


# The stages.


def test_twins_are_trained_measured_and_compared(tmp_path):
    attacks = [{"name": "pgd2", "num_steps": 2, "step_size": 0.05}, {"name": "cw2", "objective": "margin"}]
    attacks[1] |= {"num_steps": 2, "step_size": 0.05}
    run = run_with({**TWINS, "seeds": [5]}, measure={"attacks": attacks, "val_attacks": attacks}, phase__epochs=0.5)
    students = run.experiment.trainings
    images = {name: str(path) for name, path in save_stripes(tmp_path).items()}
    supernet, teacher = tmp_path / "supernet.safetensors", tmp_path / "teacher.safetensors"
    space, provenance = tiny_space(), Provenance("tiny", "train_phase")
    net = random_supernet(space, dtype=torch.float32)
    save_supernet(supernet, net, provenance)
    described = {"space": space, "arch": space.largest, "kind": "teacher", "provenance": provenance}
    save_static(teacher, extract(net, space.largest), **described)

    def stage(main, settings, seed, **files):
        words = ["--settings", settings, "--seed", str(seed), "--device", "cpu", "--threads", "1"]
        for flag, value in files.items():
            words += [f"--{flag}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        main(words)

    outcomes = []
    for student in students:
        folder = tmp_path / "train_experiment" / student.name
        files = {"train": images["train"], "val": images["val"], "teacher": teacher}
        files |= {"weights": folder / "weights.safetensors", "history": folder / "history.parquet"}
        settings = job_settings(run, "train_experiment", training=student.name)
        stage(train_experiment.main, settings, student.seed, **files)
        outcomes.append(tmp_path / "measure_experiment" / student.name / "outcomes.parquet")
        files = {"supernet": supernet, "weights": files["weights"], "histories": files["history"]}
        settings = job_settings(run, "measure_experiment", training=student.name)
        stage(measure_experiment.main, settings, 0, **files, **images, cache=tmp_path / "c", outcomes=outcomes[-1])
    first = read_table(outcomes[0])
    assert set(first["role"]) == {"subnet", "twin"}
    assert set(first["train_seed"]) == {5}
    assert set(first["trains"]) == {"twin"}
    assert first["arch"].unique().tolist() == [Arch.from_dims(students[0].arch).to_json()]
    for _, row in first.iterrows():
        assert np.mean(row["robust"]) == pytest.approx(row["robust_acc"])
        assert np.mean(row["clean"]) == pytest.approx(row["clean_acc"])
        assert len(row["clean"]) == row["num_images"] == 30
    on_test = first[(first["role"] == "twin") & (first["split"] == "test")].set_index("attack")["robust"]
    assert (on_test["worst"] == on_test["pgd2"] & on_test["cw2"]).all()

    files = {"trained": tmp_path / "train_experiment" / students[0].name / "weights.safetensors", **images}
    files |= {"student": outcomes[0], "manifest": tmp_path / "manifest.json", "budget": students[0].name}
    splits = {split: {"count": len(load_split(images[split]))} for split in images}
    files["manifest"].write_text(
        json.dumps({"source": "digits", "classes": ["left", "right", "low"], "splits": splits})
    )
    written = {name: tmp_path / "export" / name for name in EXPORTED}
    del files["val"]
    stage(export_student.main, job_settings(run, "export_student"), 0, **files, **written)
    parity = json.loads(written["parity"].read_text())
    of_twin = first[(first["role"] == "twin") & (first["split"] == "test")]
    assert parity["onnx_test_accuracy"] == of_twin["clean_acc"].iloc[0]

    written = {name: tmp_path / "compare" / name for name in ("table", "gaps", "gaps-figure")}
    inputs = {"outcomes": outcomes, "budgets": [], "bounds": [], "all-radii": [], "diagnoses": []}
    stage(compare_experiment.main, job_settings(run, "compare_experiment"), 0, **inputs, **written)
    assert len(read_table(written["gaps"])) == 2 * 3 * 2 * 3  # splits, attacks and worst case, measures, archs and mean
    assert "<svg" in written["gaps-figure"].read_text()

    trained = tmp_path / "train_experiment" / students[0].name
    costs = read_table(trained / "costs.parquet").iloc[0]
    assert (costs["stage"], costs["job"]) == ("train_experiment", students[0].name)
    assert costs["weight_gradients"] == read_table(trained / "history.parquet")["images"].iloc[-1]


def test_an_experiment_without_trainings_says_so(tmp_path):
    words = ["--settings", job_settings(tiny_config(), "compare_experiment"), "--device", "cpu"]
    words += ["--outcomes", "--budgets", "--bounds", "--all-radii", "--diagnoses"]
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_experiment.main([*words, "--table", str(tmp_path / "t.parquet")])
