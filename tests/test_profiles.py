"""Profiles: a site edits one place, and its values apply to the right rules; a workstation's GPUs are counted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from profiles import ROOT, edited_profile, rules_with_a_gpu
from workflow_runs import planned, snakemake

QUICKSTART = ["--dry-run", "--configfile", "config/quickstart.yaml"]


def resources(output: str) -> dict[str, str]:
    """Resources of each planned rule."""
    found = {}
    for job in output.split("\nrule ")[1:]:
        line = next((line for line in job.splitlines() if line.strip().startswith("resources: ")), "")
        found[job.split(":")[0]] = line
    return found


def test_only_stages_that_train_or_measure_ask_for_a_gpu():
    stages = {"train_teacher", "train_control", "train_phase", "evaluate_archs", "verify_front"}
    assert rules_with_a_gpu() >= {*stages, "select_student", "export_student"}
    assert not rules_with_a_gpu() & {"prepare_data", "sample_archs", "merge_table", "fit_predictor", "search_front"}


def test_the_place_for_a_site_lists_every_rule_with_a_gpu(tmp_path):
    profile = yaml.safe_load((edited_profile(tmp_path, partition="p", gpu_partition="g") / "profile.yaml").read_text())
    assert set(profile["set-resources"]) == rules_with_a_gpu()
    assert all(asked == {"slurm_partition": "g", "gpu_model": "h200"} for asked in profile["set-resources"].values())


@pytest.mark.parametrize("flag", ["--profile", "--workflow-profile"])
def test_partition_and_model_reach_the_rules_they_are_for(tmp_path, flag):
    folder = edited_profile(tmp_path, partition="cpus", gpu_partition="gpus")
    done = snakemake(*QUICKSTART, flag, folder, "--directory", tmp_path)
    assert set(planned(done)) >= {"train_teacher", "merge_table"}
    asked = resources(done.stdout)
    for rule, line in asked.items():
        if rule in rules_with_a_gpu():
            assert "gpu=1" in line
            assert "gpu_model=h200" in line
            assert "slurm_partition=gpus" in line
        else:
            assert "gpu" not in line
            assert "slurm_partition=cpus" in line


def test_the_workstation_profile_counts_gpus_and_uses_all_cores():
    local = yaml.safe_load((ROOT / "workflow" / "profiles" / "local" / "profile.yaml").read_text("utf-8"))
    assert local["resources"] == {"gpu": 1}
    assert local["cores"] == "all"
    assert "executor" not in local
    done = snakemake(*QUICKSTART, "--workflow-profile", "local")
    assert planned(done) == planned(snakemake(*QUICKSTART))


def test_no_job_asks_for_more_gpus_than_a_workstation_has(tmp_path):
    done = snakemake(*QUICKSTART, "--workflow-profile", "local", "--directory", tmp_path)
    assert {re.search(r"gpu=(\d+)", line)[1] for line in resources(done.stdout).values() if "gpu=" in line} == {"1"}


def test_arrays_are_short_enough_and_a_profile_says_when_they_are_safe():
    text = (Path(ROOT) / "slurm" / "profile.yaml").read_text("utf-8")
    assert re.search(r"(?m)^# slurm-array-jobs: evaluate_archs$", text)
    assert int(re.search(r"(?m)^# slurm-array-limit: (\d+)$", text)[1]) <= 50
