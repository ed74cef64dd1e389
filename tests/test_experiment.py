"""Supernets of an experiment: their settings, their statistics, and the stages from trainings to tables and figure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import CONFIG as TINY
from helpers import save_stripes, tiny_config
from test_workflow import CONFIG as WORKFLOW
from test_workflow import FakeRun

from proard.artifacts import GAINS, TRAININGS, ArtifactError, read_header, read_table
from proard.config import ConfigError, UserError, job_settings, load
from proard.config.losses import Ard
from proard.evaluation.comparison import accuracy_of, check_equal_effort, estimate, gain_over, image_weights
from proard.stages import compare_experiment, measure_experiment, sample_archs, train_experiment, train_teacher
from proard.stages.measure_experiment import spread

ATTACK = {"num_steps": 2, "step_size": 0.05}
PHASE = {**TINY["train_phase"]["phases"][0], "forward_equivalents": 3000}
HALVES = [{**PHASE, "name": "wide", "depth": [1]}, {**PHASE, "name": "all"}]
LISTED = [
    {"name": "drawn", "sampling": "uniform"},
    {"name": "phases", "phases": [{**half, "sampling": "per_pass", "forward_equivalents": 1500} for half in HALVES]},
]
SECTIONS = {
    "experiment": {
        "defaults": {"trains": "supernet", "seeds": [0, 5], "effort": {"forward_equivalents": 3000, "tolerance": 0.2}},
        "trainings": LISTED,
        "bootstraps": 50,
        "measure": {
            "num_archs": 4,
            "num_val_images": 20,
            "num_test_images": 24,
            "eps": [0.05, 0.1],
            "val_attacks": [ATTACK],
            "attacks": [{"name": "pgd2", **ATTACK}, {"name": "cw2", "objective": "margin", **ATTACK}],
        },
    },
    "sample_archs": {"num_archs": 8, "strata": 2},
}
CONFIG = tiny_config(train_teacher__epochs=1, phase__forward_equivalents=3000, **SECTIONS)


# Settings.


def supernets(*trainings: dict, **train_phase: object) -> dict:
    """Phases of the trainings of a run, by name."""
    listed = [{"trains": "supernet", **training} for training in trainings]
    run = load({"run": "a", "train_phase": train_phase, "experiment": {"trainings": listed}})
    return {training.name: training.phases for training in run.experiment.trainings}


def test_a_training_changes_every_phase_or_replaces_the_list():
    phases = [{"name": "a", "lr": 0.3, "attack": {"num_steps": 3}}, {"name": "b"}]
    found = supernets(
        {"name": "plain"},
        {"name": "changed", "lr": 0.1, "attack": {"step_size": 0.01}},
        {"name": "replaced", "lr": 0.1, "phases": [{"name": "c", "lr": 0.2}, {"name": "d"}]},
        sampling="uniform",
        phases=phases,
    )
    rows = {name: [(p.name, p.lr, p.attack.num_steps) for p in phases] for name, phases in found.items()}
    assert rows["plain"] == [("a", 0.3, 3), ("b", 0.1, 10)]
    assert rows["changed"] == [("a", 0.1, 3), ("b", 0.1, 10)]
    assert {p.attack.step_size for p in found["changed"]} == {0.01}
    assert rows["replaced"] == [("c", 0.2, 10), ("d", 0.1, 10)]
    assert {p.sampling for phases in found.values() for p in phases} == {"uniform"}


def test_a_loss_brings_its_papers_values():
    (phase,) = supernets({"name": "ard", "loss": "ard"}, loss="rslad", phases=[{"name": "all"}])["ard"]
    assert (phase.name, phase.loss) == ("all", Ard(temperature=30))


def test_equal_effort_is_shared_among_the_phases():
    phases = [{"name": "a", "epochs": 12}, {"name": "b", "epochs": 88}, {"name": "c", "forward_equivalents": 7}]
    training = {"name": "t", "effort": {"forward_equivalents": 1000}}
    assert [p.forward_equivalents for p in supernets({**training, "phases": phases[:2]})["t"]] == [120, 880]
    assert [p.forward_equivalents for p in supernets({**training, "phases": phases[2:]})["t"]] == [7]


def test_seeds_and_grids_name_supernets_too():
    found = supernets({"name": "s", "grid": {"attack.num_steps": [1, 2]}, "seeds": [3, 4]})
    assert list(found) == [f"s_num_steps={steps}_seed={seed}" for steps in (1, 2) for seed in (3, 4)]
    assert found["s_num_steps=2_seed=4"][0].attack.num_steps == 2


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"trainings": [{"samplng": "uniform"}]}, ["samplng", "did you mean sampling", "experiment.a"]),
        ({"trainings": [3]}, ["experiment.trainings holds 3", "mapping"]),
        ({"trainings": [{"name": "a/b"}]}, ["experiment.a/b", "letters, digits"]),
        ({"trainings": [{"seeds": [1, 1]}]}, ["experiment", "different names", "a_seed=1"]),
        ({"trainings": [{"trains": "subnet"}]}, ["experiment.a.trains is 'subnet'", "network, supernet, twin"]),
        ({"trainings": [{"effort": {"gradients": 3}}]}, ["experiment.a.effort", "use forward_equivalents"]),
        ({"trainings": [{"name": "ab"}], "baseline": "aa"}, ["experiment.baseline aa", "did you mean ab"]),
        ({"measure": {"attacks": [{"name": "worst"}]}}, ["experiment.measure", "`worst`"]),
        ({"threat": {"norm": "l2", "eps": 2}, "trainings": [{}]}, ["cannot cross an l2 ball"]),
    ],
    ids=str,
)
def test_errors_name_key_value_and_way_out(section, words):
    section = dict(section)
    more = {key: section.pop(key) for key in ("threat",) if key in section}
    defaults = {"trains": "supernet", "name": "a"}
    with pytest.raises(ConfigError) as caught:
        load({"run": "a", **more, "experiment": {"defaults": defaults, **section}})
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_training_knows_only_its_own_phase_and_reads_it_back():
    text = job_settings(CONFIG, "train_experiment", phase="all", training="phases_seed=5")
    sections = json.loads(text)
    (entry,) = sections["experiment"]["trainings"]
    assert [p["name"] for p in entry["phases"]] == ["all"]
    again = load(sections)
    whole = next(each for each in CONFIG.experiment.trainings if each.name == "phases_seed=5")
    assert again.experiment.trainings[0].phases == whole.phases[1:]
    assert job_settings(again, "train_experiment", phase="all", training="phases_seed=5") == text
    for wrong in ({"phase": "all", "training": "phase_seed=5"}, {"phase": "wid", "training": "phases_seed=5"}):
        with pytest.raises(ConfigError, match=r"did you mean (phases_seed=5|wide)"):
            job_settings(CONFIG, "train_experiment", **wrong)


# Statistics.


def test_interval_by_hand():
    found = estimate(np.array([0.2, 0.4, 0.6]), np.array([0.39, 0.41]))
    over_seeds = 4.302652729696142 * 0.2 / 3**0.5
    over_images = 1.959963984540054 * np.std([0.39, 0.41], ddof=1)
    half = (over_seeds**2 + over_images**2) ** 0.5
    assert (found.value, found.low, found.high) == pytest.approx((0.4, 0.4 - half, 0.4 + half))
    alone = estimate(np.array([0.4]), np.array([0.39, 0.41]))
    assert alone.high - alone.value == pytest.approx(over_images)


def test_subnets_are_told_apart_and_the_worst_is_the_worst_of_each_seed():
    right = np.zeros((2, 3, 10), dtype=bool)  # seeds, archs by rising MACs, images
    for seed, counts in enumerate([(4, 2, 9), (3, 8, 7)]):
        for arch, count in enumerate(counts):
            right[seed, arch, :count] = True
    weights = np.ones((2, 10), dtype=int)
    found = {name: accuracy_of(right, weights, name) for name in ("mean", "worst", "smallest", "largest")}
    values = {name: one.value for name, one in found.items()}
    assert values == pytest.approx({"mean": 33 / 60, "worst": 0.25, "smallest": 0.35, "largest": 0.8})
    spread_of_largest = 12.706204736432095 * np.std([0.9, 0.7], ddof=1) / 2**0.5
    assert found["largest"].high - 0.8 == pytest.approx(spread_of_largest)


def test_a_gain_is_paired_by_image_and_seed():
    rng = np.random.default_rng(0)
    base = rng.random((3, 4, 400)) < 0.5
    better = base.copy()
    better[:, :, :40] = True  # the same images of every subnet
    weights = image_weights(400, bootstraps=300, seed=0)
    assert weights.sum(axis=1).tolist() == [400] * 300
    nothing = gain_over(base, base, weights, "mean")
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)
    gain, plain = gain_over(better, base, weights, "mean"), accuracy_of(better, weights, "mean")
    assert gain.value == pytest.approx(better.mean() - base.mean())
    assert 0 < gain.low < gain.value
    assert gain.high - gain.low < plain.high - plain.low
    with pytest.raises(ValueError, match="shape"):
        gain_over(base[:2], base, weights, "mean")


def test_interval_over_images_is_that_of_a_share():
    right = (np.arange(900) % 3 == 0)[None, None]
    found = accuracy_of(right, image_weights(900, bootstraps=4000, seed=1), "mean")
    assert found.high - found.value == pytest.approx(1.96 * (1 / 3 * 2 / 3 / 900) ** 0.5, rel=0.05)


# The stages.

LONG = [{"name": "drawn", "effort": None, "sampling": "uniform"}]
LONG[0]["forward_equivalents"] = 20_000


class Files:
    """Every file of a small experiment, and the flags of its stages."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, save_stripes(folder)
        self.teacher, self.archs = folder / "teacher.safetensors", folder / "archs.parquet"
        data = {name: self.images[name] for name in ("train", "val")}
        run(train_teacher, job_settings(CONFIG, "train_teacher"), **data, **self.outputs("teacher", self.teacher))
        run(sample_archs, job_settings(CONFIG, "sample_archs"), archs=self.archs)

    def outputs(self, name: str, path: Path) -> dict[str, Path]:
        return {name: path, "history": path.with_name(f"{path.stem}.history.parquet")}

    def weights(self, training: str, phase: str) -> Path:
        return self.folder / "train_experiment" / training / phase / "weights.safetensors"

    def flags(self, training: str, phase: str, *, folder: Path | None = None) -> list[str]:
        """Command line of one job of a training."""
        path = self.weights(training, phase) if folder is None else folder / "weights.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        files = {"train": self.images["train"], "val": self.images["val"], "teacher": self.teacher}
        files |= {"weights": path, "history": path.with_name("history.parquet")}
        if phase != PHASES[training][0]:
            files["previous"] = self.weights(training, PHASES[training][0])
        settings = job_settings(CONFIG, "train_experiment", phase=phase, training=training)
        return [*command(settings, seed=int(training[-1]), **files), "--save-every-minutes", "0.0005"]

    def outcomes(self, training: str) -> Path:
        return self.folder / "measure_experiment" / training / "outcomes.parquet"

    def histories(self, training: str) -> list[Path]:
        return [self.weights(training, phase).with_name("history.parquet") for phase in PHASES[training]]


def command(settings: str, *, seed: int = 0, **files: object) -> list[str]:
    flags = ["--settings", settings, "--seed", str(seed), "--device", "cpu", "--threads", "1"]
    for name, value in files.items():
        values = value if isinstance(value, list) else [value]
        flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    return flags


def run(stage, settings: str, **files: object) -> None:
    stage.main(command(settings, **files))


PHASES = {training.name: [phase.name for phase in training.phases] for training in CONFIG.experiment.trainings}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The experiment up to its measurements."""
    files = Files(tmp_path_factory.mktemp("experiment"))
    for training, phases in PHASES.items():
        for phase in phases:
            train_experiment.main(files.flags(training, phase))
        beside = {"archs": files.archs, "cache": files.folder / "cache", **files.images}
        made = {"weights": files.weights(training, phases[-1]), "histories": files.histories(training)}
        settings = job_settings(CONFIG, "measure_experiment", training=training)
        run(measure_experiment, settings, **beside, **made, outcomes=files.outcomes(training))
    return files


def compare(files: Files, folder: Path, trainings=tuple(PHASES)) -> Path:
    """Run the comparison into a folder."""
    outputs = {"table": "table.parquet", "gains": "gains.parquet", "gains_figure": "gains.svg"}
    inputs = {"outcomes": [files.outcomes(name) for name in trainings], "budgets": [], "bounds": [], "all_radii": []}
    written = {name: folder / file for name, file in outputs.items()}
    run(compare_experiment, job_settings(CONFIG, "compare_experiment"), **inputs, diagnoses=[], **written)
    return folder / "gains.parquet"


def test_trainings_differ_by_seed_and_phases_follow_each_other(files):
    headers = [read_header(files.weights(name, phase)) for name, phases in PHASES.items() for phase in phases]
    assert len({header["checksum"] for header in headers}) == len(headers) == 6
    header = read_header(files.weights("phases_seed=5", "all"))
    assert [opened.get("depth") for opened in header["opened"]] == [[1], None]
    assert header["provenance"]["seed"] == 5
    costs = read_table(files.weights("phases_seed=5", "all").with_name("costs.parquet")).iloc[0]
    assert (costs["stage"], costs["job"]) == ("train_experiment", "phases_seed=5/all")


def test_every_supernet_is_measured_at_the_same_archs_with_the_same_noise(files):
    tables = {name: read_table(files.outcomes(name), columns=TRAININGS) for name in PHASES}
    listed, first = read_table(files.archs), tables["drawn_seed=0"]
    for name, table in tables.items():
        assert {(row.training, row.group) for row in table.itertuples()} == {(name, name[:-7])}
        assert set(table["train_seed"]) == {int(name[-1])}
        assert set(table["seed"]) == {0}
        assert table["arch_id"].tolist() == first["arch_id"].tolist()
        assert {listed["macs"].min(), listed["macs"].max()} <= set(table["macs"])
        assert table.groupby(["split", "attack"], sort=False)["num_images"].first().to_dict() == {
            ("val", "pgd20"): 20,
            ("test", "pgd2"): 24,
            ("test", "cw2"): 24,
            ("test", "worst"): 24,
        }
        assert table.groupby("split")["eps"].unique().map(list).to_dict() == {"val": [0.1], "test": [0.05, 0.1]}
        assert set(table.loc[table["attack"] == "cw2", "step_size"]) == {0.025, 0.05}
        for _, rows in table[table["split"] == "test"].groupby(["arch_id", "eps"]):
            by = rows.set_index("attack")
            assert (by.at["worst", "robust"] == by.at["pgd2", "robust"] & by.at["cw2", "robust"]).all()
            assert by.at["worst", "robust_acc"] == by.at["worst", "robust"].mean()
            assert by.at["worst", "clean_acc"] == by.at["worst", "clean"].mean()
        ends = [read_table(path).iloc[-1] for path in files.histories(name)]
        assert set(table["train_forward_equivalents"]) == {sum(end["forward_equivalents"] for end in ends)}
        assert set(table["train_macs"]) == {sum(end["work_macs"] for end in ends)}
        assert set(table["optimizer_steps"]) == {sum(end["step"] for end in ends)}


def test_nothing_is_measured_or_read_from_the_cache_twice(files):
    costs = read_table(files.outcomes("phases_seed=5").with_name("costs.parquet")).iloc[0]
    assert (costs["stage"], costs["job"]) == ("measure_experiment", "phases_seed=5")
    assert (costs["cached_macs"], costs["cached_seconds"]) == (0, 0)


def test_the_gains_say_what_was_measured_and_what_it_took(files, tmp_path, capsys):
    table = read_table(compare(files, tmp_path))
    assert set(GAINS) == set(table.columns)
    assert len(table) == 2 * (1 + 2 * 3) * 4  # groups, attacks on val and at both radii on test, subnets
    assert set(table["baseline"]) == {"drawn"}
    assert list(read_table(tmp_path / "table.parquet").columns) == list(TRAININGS)
    for name in ("drawn", "phases"):
        rows = table[(table["group"] == name) & (table["split"] == "test") & (table["attack"] == "cw2")]
        rows = rows[rows["eps"] == 0.1]
        measured = [read_table(files.outcomes(f"{name}_seed={seed}")) for seed in (0, 5)]
        own = [part.query("split == 'test' and attack == 'cw2' and eps == 0.1")["robust_acc"] for part in measured]
        expected = {
            "mean": np.mean([accuracy.mean() for accuracy in own]),
            "worst": np.mean([accuracy.min() for accuracy in own]),
            "smallest": np.mean([accuracy.iloc[0] for accuracy in own]),
            "largest": np.mean([accuracy.iloc[-1] for accuracy in own]),
        }
        assert rows.set_index("subnet")["robust_acc"].to_dict() == pytest.approx(expected)
        assert (rows["robust_acc_low"] <= rows["robust_acc"]).all()
        assert set(rows["optimizer_steps"]) == {measured[0]["optimizer_steps"].iloc[0]}
    gains = table[table["group"] == "drawn"][["clean_gain", "robust_gain", "robust_gain_low", "robust_gain_high"]]
    assert (gains == 0).all(axis=None)
    assert (table["train_macs"] > 0).all()
    svg = (tmp_path / "gains.svg").read_text()
    assert all(text in svg for text in ("drawn", "phases", "worst of 4 subnets", "Robust accuracy"))
    assert "drawn" in capsys.readouterr().out


def test_unequal_effort_and_missing_measurements_are_refused(files, tmp_path):
    rule = json.dumps({"forward_equivalents": 100, "tolerance": 0.2})
    rows = pd.DataFrame({"training": ["drawn", "phases"], "effort": rule, "train_forward_equivalents": [130, 100]})
    with pytest.raises(UserError, match=r"drawn took 130 forward-equivalents, phases 100.*tolerance"):
        check_equal_effort(rows)
    check_equal_effort(rows.assign(effort=[rule, None]))
    with pytest.raises(ArtifactError, match=r"phases and drawn were not measured with the same seeds"):
        compare(files, tmp_path, [name for name in PHASES if name != "drawn_seed=5"])
    assert not (tmp_path / "gains.parquet").exists()


def test_archs_are_spread_over_macs_with_both_ends():
    listed = pd.DataFrame({"macs": [5, 1, 9, 3, 7], "arch": list("caebd")})
    assert spread(listed, 3) == ["a", "c", "e"]
    assert spread(listed, 2) == ["a", "e"]
    assert spread(listed, 50) == ["a", "b", "c", "d", "e"]


def test_a_killed_training_continues_to_the_same_weights(files, tmp_path):
    config = tiny_config(**{**SECTIONS, "experiment": {**SECTIONS["experiment"], "trainings": LONG}})
    text = job_settings(config, "train_experiment", phase="all", training="drawn_seed=0")
    weights = []
    for name in ("killed", "whole"):
        flags = files.flags("drawn_seed=0", "all", folder=tmp_path / name)
        flags[1] = text
        if name == "killed":
            process = subprocess.Popen([sys.executable, "-m", "proard.stages.train_experiment", *flags], env=os.environ)
            deadline = time.monotonic() + 120
            while not (tmp_path / name / "weights.state").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not (tmp_path / name / "weights.safetensors").exists()
        train_experiment.main(flags)
        weights.append(read_header(tmp_path / name / "weights.safetensors")["checksum"])
        names = {path.name for path in (tmp_path / name).iterdir()}
        assert names == {"weights.safetensors", "history.parquet", "costs.parquet"}
    assert weights[0] == weights[1]


# The workflow.

SUPERNETS = [{"name": "a"}, {"name": "b", "phases": [{"name": "first"}, {"name": "second"}]}]
DEFAULTS = {"trains": "supernet", "seeds": [0, 1]}
EXPERIMENT = {**WORKFLOW, "run": "trainings", "experiment": {"defaults": DEFAULTS, "trainings": SUPERNETS}}
COMPARED_AGAIN = {"compare_experiment": 1, "all": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return FakeRun(tmp_path_factory.mktemp("workflow"), EXPERIMENT)


def test_the_comparison_is_one_dag_and_needs_no_other_stage(finished):
    assert finished.plan() == {}
    again = finished.plan("compare_experiment", "--forceall")
    assert again == {
        "prepare_data": 1,
        "train_teacher": 1,
        "sample_archs": 1,
        "train_experiment": 2 * (2 + 2),  # phases of `train_phase` for a, its own for b
        "measure_experiment": 4,
        "compare_experiment": 1,
    }


def test_an_edit_repeats_the_training_it_touches_and_a_new_seed_nothing(finished):
    edited = [SUPERNETS[0], {"name": "b", "phases": [{"name": "first"}, {"name": "second", "lr": 0.3}]}]
    plan = finished.plan_after(experiment={"trainings": edited})
    assert plan == {"train_experiment": 2, "measure_experiment": 2, **COMPARED_AGAIN}
    plan = finished.plan_after(experiment={"defaults": {**DEFAULTS, "seeds": [0, 1, 7]}})
    assert plan == {"train_experiment": 2 + 2, "measure_experiment": 2, **COMPARED_AGAIN}
    assert finished.plan_after(experiment={"bootstraps": 7}) == COMPARED_AGAIN
    assert finished.plan_after(experiment={"measure": {"num_archs": 3}}) == {"measure_experiment": 4, **COMPARED_AGAIN}


def test_a_network_beside_supernets_is_planned_alone_and_exported_by_its_name(finished):
    listed = [*SUPERNETS, {"name": "n", "trains": "network", "loss": "plain", "seeds": [3]}]
    more = finished.write("edit.yaml", {"experiment": {"trainings": listed}})
    plan = finished.plan(more=more)
    assert plan == {"train_experiment": 1, "measure_experiment": 1, "report": 1, **COMPARED_AGAIN}
    plan = finished.plan("results/trainings/export_student/n_seed=3/student.onnx", more=more)
    assert plan == {"train_experiment": 1, "measure_experiment": 1, "export_student": 1}


def test_without_trainings_nothing_of_it_is_planned(tmp_path):
    stages = {"train_experiment", "measure_experiment", "compare_experiment"}
    assert not stages & set(FakeRun(tmp_path).plan("--forceall"))
