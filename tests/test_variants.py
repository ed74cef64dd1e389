"""Variants of the training: their settings, their statistics, and the stages from the trainings to table and figure."""

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
from workflow_runs import CONFIG as WORKFLOW
from workflow_runs import FakeRun

from proard.artifacts import ArtifactError, load_tensors, read_header, read_table
from proard.artifacts.variants import COMPARED
from proard.config import ConfigError, UserError, job_settings, load
from proard.evaluation.comparison import accuracy_of, estimate, gain_over, image_weights
from proard.stages import compare_variants, measure_variant, sample_archs, train_teacher, train_variant
from proard.stages.measure_variant import spread

ATTACK = {"num_steps": 2, "step_size": 0.05}
PHASE = {**TINY["train_phase"]["phases"][0], "forward_equivalents": 3000}
HALVES = [{**PHASE, "name": "wide", "depth": [1]}, {**PHASE, "name": "all"}]
VARIANTS = {
    "drawn": {"sampling": "uniform"},
    "phases": {"phases": [{**half, "sampling": "per_pass", "forward_equivalents": 1500} for half in HALVES]},
}
SECTIONS = {
    "train_variant": {"seeds": [0, 5], "variants": VARIANTS},
    "sample_archs": {"num_archs": 8, "strata": 2},
    "measure_variant": {
        "num_archs": 4,
        "num_val_images": 20,
        "num_test_images": 24,
        "attack": ATTACK,
        "test_attacks": [{"name": "pgd2", **ATTACK}, {"name": "cw2", "objective": "margin", **ATTACK}],
    },
    "compare_variants": {"bootstraps": 50, "tolerance": 0.2},
}
CONFIG = tiny_config(train_teacher__epochs=1, phase__forward_equivalents=3000, **SECTIONS)


# Settings.


def variants_of(variants: dict, **train_phase: object) -> dict:
    """The parsed variants of a run."""
    return load(
        {"run": "a", "train_phase": train_phase, "train_variant": {"variants": variants}}
    ).train_variant.variants


def test_a_variant_changes_every_phase_or_replaces_the_list():
    phases = [{"name": "a", "lr": 0.3, "attack": {"num_steps": 3}}, {"name": "b"}]
    found = variants_of(
        {
            "plain": None,
            "changed": {"lr": 0.1, "attack": {"step_size": 0.01}},
            "replaced": {"lr": 0.1, "phases": [{"name": "c", "lr": 0.2}, {"name": "d"}]},
        },
        sampling="uniform",
        phases=phases,
    )
    rows = {name: [(p.name, p.lr, p.attack.num_steps) for p in variant.phases] for name, variant in found.items()}
    assert rows["plain"] == [("a", 0.3, 3), ("b", 0.1, 10)]
    assert rows["changed"] == [("a", 0.1, 3), ("b", 0.1, 10)]
    assert {p.attack.step_size for p in found["changed"].phases} == {0.01}
    assert rows["replaced"] == [("c", 0.2, 10), ("d", 0.1, 10)]
    assert {p.sampling for variant in found.values() for p in variant.phases} == {"uniform"}


def test_a_variants_loss_brings_its_papers_values():
    (phase,) = variants_of({"ard": {"loss": "ard"}}, loss="rslad", phases=[{"name": "all"}])["ard"].phases
    assert (phase.name, phase.loss, phase.temperature) == ("all", "ard", 30)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train_variant": {"variants": {"a": {"samplng": "uniform"}}}}, ["samplng", "did you mean sampling", "a"]),
        ({"train_variant": {"variants": {"a": 3}}}, ["train_variant.variants.a is 3", "keys of train_phase"]),
        ({"train_variant": {"variants": {"a/b": {}}}}, ["train_variant.variants", "a/b"]),
        ({"train_variant": {"seeds": [1, 1]}}, ["train_variant", "different numbers", "[1, 1]"]),
        (
            {"train_variant": {"variants": {"ab": None}}, "compare_variants": {"baseline": "aa"}},
            ["compare_variants.baseline aa", "did you mean ab"],
        ),
        ({"measure_variant": {"test_attacks": [{"name": "worst"}]}}, ["measure_variant", "`worst`"]),
        (
            {"threat": {"norm": "l2", "eps": 2}, "train_variant": {"variants": {"a": None}}},
            ["cannot cross an l2 ball"],
        ),
    ],
    ids=str,
)
def test_errors_name_key_value_and_way_out(sections, words):
    with pytest.raises(ConfigError) as caught:
        load({"run": "a", **sections})
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_training_knows_only_its_own_phase_and_reads_it_back():
    text = job_settings(CONFIG, "train_variant", phase="all", variant="phases")
    sections = json.loads(text)
    assert list(sections["train_variant"]) == ["variants"]
    assert [p["name"] for p in sections["train_variant"]["variants"]["phases"]["phases"]] == ["all"]
    again = load(sections)
    assert again.train_variant.variants["phases"].phases == CONFIG.train_variant.variants["phases"].phases[1:]
    assert job_settings(again, "train_variant", phase="all", variant="phases") == text
    for wrong in ({"phase": "all", "variant": "phase"}, {"phase": "wid", "variant": "phases"}):
        with pytest.raises(ConfigError, match=r"did you mean (phases|wide)"):
            job_settings(CONFIG, "train_variant", **wrong)


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


class Files:
    """Every file of a small experiment, and the flags of its stages."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, save_stripes(folder)
        self.teacher, self.archs = folder / "teacher.safetensors", folder / "archs.parquet"
        data = {name: self.images[name] for name in ("train", "val")}
        run(train_teacher, "train_teacher", **data, teacher=self.teacher, history=folder / "teacher.parquet")
        run(sample_archs, "sample_archs", archs=self.archs)
        self.keys = [(name, seed) for name in VARIANTS for seed in (0, 5)]

    def leg(self, variant: str, seed: int, phase: str) -> Path:
        return self.folder / variant / f"seed={seed}" / phase

    def flags(self, variant: str, seed: int, phase: str, *, folder: Path | None = None) -> list[str]:
        """Command line of one training."""
        folder = folder or self.leg(variant, seed, phase)
        folder.mkdir(parents=True, exist_ok=True)
        files = {"train": self.images["train"], "val": self.images["val"], "teacher": self.teacher}
        files |= {"supernet": folder / "supernet.safetensors", "history": folder / "history.parquet"}
        if variant == "phases" and phase == "all":
            files["previous"] = self.leg(variant, seed, "wide") / "supernet.safetensors"
        settings = job_settings(CONFIG, "train_variant", phase=phase, variant=variant)
        return command(settings, seed=seed, **files)

    def measured(self, variant: str, seed: int, name: str) -> Path:
        return self.folder / f"{variant}-{seed}-{name}"


def command(settings: str, *, seed: int = 0, **files: object) -> list[str]:
    flags = ["--settings", settings, "--seed", str(seed), "--device", "cpu", "--threads", "1"]
    for name, value in files.items():
        values = value if isinstance(value, list) else [value]
        flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    return flags


def run(stage, name: str, **files: object) -> None:
    stage.main(command(job_settings(CONFIG, name), **files))


LEGS = {"drawn": ["all"], "phases": ["wide", "all"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The experiment up to its measurements."""
    files = Files(tmp_path_factory.mktemp("experiment"))
    for variant, seed in files.keys:
        for phase in LEGS[variant]:
            train_variant.main(files.flags(variant, seed, phase))
        outputs = {
            "table": files.measured(variant, seed, "table.parquet"),
            "outcomes": files.measured(variant, seed, "outcomes.safetensors"),
        }
        supernet = files.leg(variant, seed, "all") / "supernet.safetensors"
        who = {"variant": variant, "train_seed": seed, "cache": files.folder / "cache"}
        run(measure_variant, "measure_variant", supernet=supernet, archs=files.archs, **files.images, **who, **outputs)
    return files


def compare(files: Files, folder: Path, **changes: list) -> Path:
    """Run the comparison into a folder."""
    inputs = {
        "tables": [files.measured(*key, "table.parquet") for key in files.keys],
        "outcomes": [files.measured(*key, "outcomes.safetensors") for key in files.keys],
        "histories": [
            files.leg(variant, seed, phase) / "history.parquet"
            for variant, seed in files.keys
            for phase in LEGS[variant]
        ],
    }
    outputs = {"table": folder / "table.parquet", "figure": folder / "variants.svg"}
    seen = {"train": files.images["train"], "teacher": files.teacher}
    run(compare_variants, "compare_variants", **seen, **{**inputs, **changes}, **outputs)
    return folder / "table.parquet"


def test_trainings_differ_by_seed_and_variant_and_phases_follow_each_other(files):
    marks = {
        (variant, seed, phase): read_header(files.leg(variant, seed, phase) / "supernet.safetensors")["checksum"]
        for variant, seed in files.keys
        for phase in LEGS[variant]
    }
    assert len(set(marks.values())) == len(marks)
    header = read_header(files.leg("phases", 5, "all") / "supernet.safetensors")
    assert [opened.get("depth") for opened in header["opened"]] == [[1], None]
    assert header["provenance"]["seed"] == 5


def test_every_variant_is_measured_at_the_same_archs_with_the_same_noise(files):
    tables = [read_table(files.measured(*key, "table.parquet")) for key in files.keys]
    listed = read_table(files.archs)
    for table, (variant, seed) in zip(tables, files.keys, strict=True):
        assert set(table["variant"]) == {variant}
        assert set(table["train_seed"]) == {seed}
        assert set(table["seed"]) == {0}
        assert table["arch_id"].tolist() == tables[0]["arch_id"].tolist()
        assert {listed["macs"].min(), listed["macs"].max()} <= set(table["macs"])
        assert table.groupby(["split", "attack"], sort=False)["num_images"].first().to_dict() == {
            ("val", "pgd20"): 20,
            ("test", "pgd2"): 24,
            ("test", "cw2"): 24,
            ("test", "worst"): 24,
        }
        tensors, _ = load_tensors(files.measured(variant, seed, "outcomes.safetensors"), kind="outcomes")
        worst = table[table["attack"] == "worst"]
        assert worst["robust_acc"].tolist() == tensors["test.worst"].double().mean(1).tolist()
        assert bool((tensors["test.worst"] == tensors["test.pgd2"] & tensors["test.cw2"]).all())
        assert worst["clean_acc"].tolist() == tensors["test.clean"].double().mean(1).tolist()


def test_nothing_is_measured_or_read_from_the_cache_twice(files):
    costs = read_table(files.folder / "costs.parquet").iloc[0]  # of the last measurement
    assert costs["stage"] == "measure_variant"
    assert (costs["cached_macs"], costs["cached_seconds"]) == (0, 0)


def test_the_table_says_what_was_measured_and_what_it_took(files, tmp_path, capsys):
    table = read_table(compare(files, tmp_path))
    assert set(COMPARED) == set(table.columns)
    assert len(table) == 2 * 4 * 4  # variants, attacks on a split, subnets
    assert set(table["baseline"]) == {"drawn"}
    measured = {key: read_table(files.measured(*key, "table.parquet")) for key in files.keys}
    for name in VARIANTS:
        rows = table[(table["variant"] == name) & (table["split"] == "test") & (table["attack"] == "cw2")]
        own = [measured[name, seed].query("split == 'test' and attack == 'cw2'")["robust_acc"] for seed in (0, 5)]
        expected = {
            "mean": np.mean([accuracy.mean() for accuracy in own]),
            "worst": np.mean([accuracy.min() for accuracy in own]),
            "smallest": np.mean([accuracy.iloc[0] for accuracy in own]),
            "largest": np.mean([accuracy.iloc[-1] for accuracy in own]),
        }
        assert rows.set_index("subnet")["robust_acc"].to_dict() == pytest.approx(expected)
        assert (rows["robust_acc_low"] <= rows["robust_acc"]).all()
        histories = [read_table(files.leg(name, 0, phase) / "history.parquet").iloc[-1] for phase in LEGS[name]]
        assert set(rows["forward_equivalents"]) == {sum(row["forward_equivalents"] for row in histories)}
        assert set(rows["steps"]) == {sum(row["step"] for row in histories)}
    gains = table[table["variant"] == "drawn"][["clean_gain", "robust_gain", "robust_gain_low", "robust_gain_high"]]
    assert (gains == 0).all(axis=None)
    assert (table["training_macs"] > 0).all()
    svg = (tmp_path / "variants.svg").read_text()
    assert all(text in svg for text in ("drawn", "phases", "worst of 4 subnets", "Robust accuracy"))
    assert "drawn" in capsys.readouterr().out


def test_the_order_of_the_files_does_not_matter(files, tmp_path):
    first = read_table(compare(files, tmp_path / "a"))
    turned = files.keys[::-1]
    tables = [files.measured(*key, "table.parquet") for key in turned]
    outcomes = [files.measured(*key, "outcomes.safetensors") for key in turned]
    second = read_table(compare(files, tmp_path / "b", tables=tables, outcomes=outcomes))
    assert first.to_dict("list") == second.to_dict("list")


def test_unequal_work_and_missing_measurements_are_refused(files, tmp_path):
    with pytest.raises(UserError, match=r"variant drawn took .* forward-equivalents.*tolerance"):
        compare_variants.check_equal_work(
            {"drawn": {"forward_equivalents": 130}, "phases": {"forward_equivalents": 100}}, 0.2
        )
    tables = [files.measured(*key, "table.parquet") for key in files.keys[1:]]
    with pytest.raises(ArtifactError, match=r"drawn seed 0; rerun measure_variant"):
        compare(files, tmp_path, tables=tables, outcomes=tables)
    assert not (tmp_path / "table.parquet").exists()


def test_archs_are_spread_over_macs_with_both_ends():
    listed = pd.DataFrame({"macs": [5, 1, 9, 3, 7], "arch": list("caebd")})
    assert spread(listed, 3) == ["a", "c", "e"]
    assert spread(listed, 2) == ["a", "e"]
    assert spread(listed, 50) == ["a", "b", "c", "d", "e"]


def test_a_killed_training_continues_to_the_same_weights(files, tmp_path):
    text = job_settings(
        tiny_config(phase__forward_equivalents=20_000, phase__save_every_minutes=0.0005, **SECTIONS),
        "train_variant",
        phase="all",
        variant="drawn",
    )
    weights = []
    for name in ("killed", "whole"):
        flags = files.flags("drawn", 0, "all", folder=tmp_path / name)
        flags[1] = text
        if name == "killed":
            process = subprocess.Popen([sys.executable, "-m", "proard.stages.train_variant", *flags], env=os.environ)
            deadline = time.monotonic() + 120
            while not (tmp_path / name / "supernet.state").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not (tmp_path / name / "supernet.safetensors").exists()
        train_variant.main(flags)
        weights.append(read_header(tmp_path / name / "supernet.safetensors")["checksum"])
        names = {path.name for path in (tmp_path / name).iterdir()}
        assert names == {"supernet.safetensors", "history.parquet", "costs.parquet"}
    assert weights[0] == weights[1]


# The workflow.

EXPERIMENT = {
    **WORKFLOW,
    "run": "variants",
    "train_variant": {
        "seeds": [0, 1],
        "variants": {"a": None, "b": {"phases": [{"name": "first"}, {"name": "second"}]}},
    },
}
MEASURED_AGAIN = {"compare_variants": 1, "all": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return FakeRun(tmp_path_factory.mktemp("workflow"), EXPERIMENT)


def test_the_comparison_is_one_dag_and_needs_no_other_stage(finished):
    assert finished.plan() == {}
    again = finished.plan("compare_variants", "--forceall")
    assert again == {
        "prepare_data": 1,
        "train_teacher": 1,
        "sample_archs": 1,
        "train_variant": 2 * (2 + 2),  # phases of `train_phase` for a, its own for b
        "measure_variant": 4,
        "compare_variants": 1,
    }


def test_an_edit_repeats_the_variant_it_touches_and_a_new_seed_nothing(finished):
    variants = EXPERIMENT["train_variant"]["variants"]
    edited = {**variants, "b": {"phases": [{"name": "first"}, {"name": "second", "lr": 0.3}]}}
    plan = finished.plan_after(train_variant={"seeds": [0, 1], "variants": edited})
    assert plan == {"train_variant": 2, "measure_variant": 2, **MEASURED_AGAIN}
    plan = finished.plan_after(train_variant={"seeds": [0, 1, 7], "variants": variants})
    assert plan == {"train_variant": 2 + 2, "measure_variant": 2, **MEASURED_AGAIN}
    assert finished.plan_after(compare_variants={"bootstraps": 7}) == MEASURED_AGAIN


def test_without_variants_nothing_of_it_is_planned(tmp_path):
    assert not {"train_variant", "measure_variant", "compare_variants"} & set(FakeRun(tmp_path).plan("--forceall"))
