"""The monitor of catastrophic overfitting: its reports, the trainings it ends, its measurements."""

from __future__ import annotations

import pytest
import torch
from helpers import image_sets, save_stripes, tiny_config, tiny_space
from training_runs import no_validation, same, teacher_run

from proard.artifacts import read_table
from proard.config import Attack, Measurement, Threat, TrainingAttack, Validation, job_settings
from proard.data import to_float
from proard.evaluation.meter import Conditions, validation_rows
from proard.stages import train_teacher
from proard.training import StepTally
from proard.training.attacker import Attacker
from proard.training.overfitting import overfitting

SPACE = tiny_space()


@pytest.fixture(scope="module")
def train_set(tmp_path_factory):
    return image_sets(tmp_path_factory.mktemp("images"), train=48, val=12)["train"]


def history(*points, best=None):
    """HISTORY rows of validations: (accuracy under the training's attack, under PGD), two subnets each."""
    return [
        {"epoch": epoch, "best": epoch == best, "val_train_attack_acc": own + tilt, "val_robust_acc": robust + tilt}
        for epoch, (own, robust) in enumerate(points, 1)
        for tilt in (-0.02, 0.02)
    ]


def test_the_monitor_tells_collapse_from_a_weak_attack():
    warn, attack = Validation(overfitting="warn"), TrainingAttack(num_steps=1)
    healthy, collapsed = [(0.3, 0.25), (0.43, 0.284)], [(0.3, 0.25), (0.8, 0.05)]
    assert overfitting(history(*healthy), warn, attack) is None
    text = overfitting(history(*collapsed), warn, attack)
    assert "epoch 2: 80.0%" in text
    assert "5.0% to PGD-10" in text
    assert "attack.start n_fgsm or more attack.num_steps would avoid it" in text
    assert overfitting(history(*collapsed, (0.4, 0.3)), warn, attack) is None, "only the newest validation counts"
    assert overfitting(history((0.11, 0.03)), warn, attack) is None, "within the noise"
    assert overfitting(history(*collapsed), Validation(), attack) == text, "one and two steps are watched by default"
    assert overfitting(history(*collapsed), Validation(), TrainingAttack(num_steps=3)) is None
    assert overfitting(history(*collapsed), Validation(overfitting="off"), attack) is None
    unwatched = [{"epoch": 1, "best": True, "val_robust_acc": 0.0}]
    assert overfitting(unwatched, warn, attack) is None
    stop = Validation(overfitting="stop")
    assert "ends here, with its best weights, those of epoch 1" in overfitting(
        history(*collapsed, best=1), stop, attack
    )


@pytest.mark.parametrize("mode", ["warn", "stop"])
def test_a_collapsing_training_is_reported_or_ended_with_its_best_weights(train_set, tmp_path, capsys, mode):
    points, seen = [(0.4, 0.35), (0.8, 0.0), (0.4, 0.3)], []

    def validate(net):
        own, robust = points[len(seen)]
        seen.append({name: value.detach().clone() for name, value in net.named_parameters()})
        return [dict(no_validation(net)[0], val_train_attack_acc=own, val_robust_acc=robust)]

    validation = {"every_epochs": 1, "num_images": 12, "num_steps": 1, "step_size": 0.05, "overfitting": mode}
    run = teacher_run(train_set, tmp_path, epochs=3, validation=validation, validate=validate)
    assert [row["epoch"] for row in run.rows] == ([1, 2, 3] if mode == "warn" else [1, 2])
    assert same(dict(run.net.named_parameters()), seen[0])
    assert "teacher: catastrophic overfitting at epoch 2: 80.0%" in capsys.readouterr().out


def test_validation_measures_the_training_attack_on_the_same_images(tmp_path):
    """Without steps and noise the accuracy is the clean one; with PGD's own attack it is PGD's, but clean errors."""
    sets = image_sets(tmp_path, train=48, val=30)
    net = teacher_run(sets["train"], tmp_path, objective="plain", epochs=8, lr=0.1, validation={"every_epochs": 8}).net
    common = {
        "recalibration": to_float(sets["train"].images),
        "val": sets["val"],
        "attack": Attack(num_steps=3, step_size=0.1),
        "conditions": Conditions(Threat(eps=0.2), Measurement(accounting="last_iterate"), 0),
    }

    def row(**options):
        attack = {"eps": 0.2, "step_size": 0.1, **options} if options else None
        return validation_rows(net, {"largest": SPACE.largest}, **common, training_attack=attack)[0]

    without = row()
    assert "val_train_attack_acc" not in without
    clean, robust = without["val_clean_acc"], without["val_robust_acc"]
    assert clean > 0.8 > robust + 0.2
    assert row(num_steps=0, start="zero")["val_train_attack_acc"] == clean
    own = row(num_steps=3, start="uniform")["val_train_attack_acc"]
    assert own == pytest.approx(robust, abs=1 - clean + 1e-9)
    assert row(num_steps=1, start="zero")["val_train_attack_acc"] > robust


def test_stage_trains_in_l2_and_watches_itself(tmp_path):
    paths = save_stripes(tmp_path, train=32, val=12)
    attack = {"num_steps": 2, "step_size": 0.05, "first_steps": 1}
    validation = {"num_images": 12, "num_steps": 4, "step_size": 0.05}
    teacher = {"train_teacher__attack": attack, "train_teacher__epochs": 1}
    config = tiny_config(threat={"norm": "l2", "eps": 0.07}, validation=validation, **teacher)
    files = {"train": paths["train"], "val": paths["val"]}
    files |= {"teacher": tmp_path / "teacher.safetensors", "history": tmp_path / "history.parquet"}
    arguments = ["--settings", job_settings(config, "train_teacher"), "--device", "cpu", "--threads", "1"]
    train_teacher.main(arguments + [text for name, path in files.items() for text in (f"--{name}", str(path))])
    attacker = Attacker(config.train_teacher.attack, StepTally(), threat=config.threat, total_steps=2)
    for step, wanted in enumerate([("l2", 1, 1.25 * 0.07), ("l2", 2, 0.05)]):
        attacker.begin([], tiny_space(), step=step, data_pass=0, views=None)
        options = attacker.options(torch.zeros(1))
        assert (options["norm"], options["num_steps"], options["step_size"]) == wanted
    (row,) = read_table(files["history"]).to_dict("records")
    assert 0 <= row["val_robust_acc"] <= row["val_clean_acc"] <= 1
    assert 0 <= row["val_train_attack_acc"] <= 1
