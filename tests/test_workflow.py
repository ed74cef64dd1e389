"""What Snakemake plans: every stage once, only the jobs that an edit affects, and one line for an error of the user.

Nothing is trained: one run is faked by writing its files and letting Snakemake take them for finished.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import yaml
from workflow_runs import CONFIG, ROOT, FakeRun, assert_one_line, planned, snakemake, write_file

from proard.config import COMPARED, NEEDS

RULES = sorted((ROOT / "workflow" / "rules").glob("*.smk"))
BUDGETS = 3
ON_REQUEST = {"train_experiment", "measure_experiment", "compare_experiment", "diagnose", "executorch_student"}
FROM_SELECTION = {
    "select_student": BUDGETS,
    "export_student": BUDGETS,
    "quantize_student": BUDGETS,
    "report": 1,
    "all": 1,
}
FROM_SEARCH = {"search_front": 1, "verify_front": 1, **FROM_SELECTION}
FROM_TABLE = {"merge_table": 1, "fit_predictor": 1, **FROM_SEARCH}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return FakeRun(tmp_path_factory.mktemp("workflow"))


def test_a_second_run_plans_nothing(finished):
    assert finished.plan() == {}


def test_repeating_the_search_repeats_what_follows_and_nothing_else(finished):
    assert finished.plan("-R", "search_front") == FROM_SEARCH


def test_a_budget_nobody_listed_is_selected_and_exported_only(finished):
    assert finished.plan("results/fake/export_student/macs=77K/student.onnx") == {
        "select_student": 1,
        "export_student": 1,
    }


def test_listing_one_more_budget_leaves_the_others_alone(finished):
    budgets = [*CONFIG["select_student"]["budgets"], "macs=200K"]
    plan = finished.plan_after(select_student={"budgets": budgets})
    assert plan == {"select_student": 1, "export_student": 1, "quantize_student": 1, "report": 1, "all": 1}


@pytest.mark.parametrize(
    ("sections", "plan"),
    [
        ({"report": {"title": "Other"}}, {"report": 1, "all": 1}),
        ({"select_student": {"candidates": 2}}, FROM_SELECTION),
        ({"search_front": {"population": 44}}, FROM_SEARCH),
        ({"fit_predictor": {"folds": 3}}, {"fit_predictor": 1, **FROM_SEARCH}),
        (
            {"train_phase": {"phases": [{"name": "wide"}, {"name": "all", "epochs": 7}]}},
            {"train_phase": 1, "evaluate_archs": 3, **FROM_TABLE},
        ),
    ],
    ids=lambda value: next(iter(value)),
)
def test_editing_a_section_plans_its_stage_and_what_follows(finished, sections, plan):
    assert finished.plan_after(**sections) == plan


@pytest.mark.parametrize(("objective", "loss", "asked"), [("hat", "mtard", True), ("mart", "ard", False)])
def test_the_plain_network_is_trained_first_only_where_a_loss_asks_it(tmp_path, objective, loss, asked):
    config = tmp_path / "config.yaml"
    sections = {"train_teacher": {"objective": objective}, "train_phase": {"phases": [{"name": "all", "loss": loss}]}}
    config.write_text(yaml.safe_dump({"run": "asks", **sections}))
    where = ["--snakefile", ROOT / "workflow" / "Snakefile", "--directory", tmp_path, "--configfile", config]
    done = snakemake("train_phases", "--dry-run", "--printshellcmds", *where)
    assert ("train_control" in planned(done)) == asked
    for output in ("--teacher results/asks/train_teacher", "--supernet results/asks/train_phase"):
        line = next(line for line in done.stdout.splitlines() if output in line and "proard.stages" in line)
        assert ("--control results/asks/train_control/control.safetensors" in line) == asked


def test_resources_and_the_rhythm_of_saving_repeat_nothing(finished):
    resources = ["train_phase:gpu=4", "train_phase:runtime=77", "train_teacher:gpu=2"]
    assert finished.plan("--set-resources", *resources) == {}
    assert finished.plan_after(save_every_minutes=2) == {}


@pytest.mark.parametrize(("cores", "threads"), [(2, 1), (6, 3), (32, 8)])
def test_the_control_leaves_half_of_the_cores_to_others(finished, cores, threads):
    plan = finished("-n", "--printshellcmds", "--forcerun", "train_control", "--cores", cores).stdout
    (command,) = (line for line in plan.splitlines() if "proard.stages.train_control " in line)
    assert f"--threads {threads} " in command


REMADE = {
    "export_student": {"export_student": 1, "quantize_student": 1, "report": 1, "all": 1},
    "quantize_student": {"quantize_student": 1, "report": 1, "all": 1},
    "report": {"report": 1, "all": 1},
}


@pytest.mark.parametrize(
    "name",
    [
        "export_student/macs=1M/student.onnx",
        "export_student/macs=1M/labels.txt",
        "quantize_student/macs=1M/student.int8.onnx",
        "report/search.svg",
    ],
)
def test_a_deleted_file_for_people_is_made_again(finished, name):
    path = finished.folder / "results" / "fake" / name
    kept = path.rename(path.with_suffix(".kept"))
    try:
        assert finished.plan() == REMADE[name.split("/")[0]]
    finally:
        kept.rename(path)


@pytest.mark.parametrize("target", ["all", "export_students", "export_experiments", "quantize_students"])
def test_targets_ask_for_every_file_of_their_last_stages(finished, target):
    student = {"name": "one", "arch": "smallest", "loss": "trades"}
    networks = [{"name": "cut", "arch": "smallest"}]
    more = finished.write("more.yaml", {"experiment": {"trainings": [student]}, "diagnose": {"networks": networks}})
    done = finished("--dry-run", "--forcerun", target, target, more=more)
    assert done.returncode == 0, done.stderr
    asked = re.search(rf"^rule {target}:\n    input: (.*)$", done.stdout, re.MULTILINE)[1].split(", ")
    written = {"export_student": 8 * (1 if target == "export_experiments" else BUDGETS)}
    if target in ("all", "quantize_students"):
        written |= {"quantize_student": 3 * BUDGETS, "export_student": 8 * BUDGETS if target == "all" else 0}
    if target == "all":
        written |= {"report": 6, "compare_experiment": 1 + len(COMPARED["networks"]) + len(COMPARED["diagnoses"])}
    for stage, number in written.items():
        assert len([path for path in asked if path.startswith(f"results/fake/{stage}/")]) == number, stage


class FakeStage:
    """One stage whose outputs are there, in a folder of its own."""

    def __init__(self, folder: Path, stage: str, settings: Mapping) -> None:
        (folder / "a.yaml").write_text(yaml.safe_dump({"run": "fake", stage: settings}))
        where = ["--snakefile", ROOT / "workflow" / "Snakefile", "--directory", folder, "--cores", "1"]
        self.call = partial(snakemake, stage, *where, "--configfile", folder / "a.yaml")
        written = [line.split("\t")[0] for line in self.call("--summary").stdout.splitlines()[1:]]
        for name in (*written, f"results/fake/benchmarks/{stage}.tsv"):
            write_file(folder / name, 2)
        assert self.call("--touch", "--forceall").returncode == 0
        assert planned(self.call("--dry-run")) == {}


def test_images_added_or_changed_after_they_were_read_are_read_again(tmp_path):
    first = write_file(tmp_path / "images" / "cat" / "a.png", 1)
    source = {"source": "imagefolder", "train": "images", "classes": ["cat", "dog"], "image_size": 32}
    stage = FakeStage(tmp_path, "prepare_data", source)
    write_file(tmp_path / "images" / ".thumbnails" / "a.png", 3)
    assert planned(stage.call("--dry-run")) == {}
    second = write_file(tmp_path / "images" / "dog" / "b.png", 3)
    done = stage.call("--dry-run")
    assert planned(done) == {"prepare_data": 1}
    assert "Params have changed" in done.stdout
    second.unlink()
    assert planned(stage.call("--dry-run")) == {}
    write_file(first, 4)
    assert planned(stage.call("--dry-run")) == {"prepare_data": 1}


def test_the_file_that_the_teacher_is_taken_from_is_an_input(tmp_path):
    given = write_file(tmp_path / "given.safetensors", 1)
    stage = FakeStage(tmp_path, "train_teacher", {"source": "file", "file": "given.safetensors"})
    given.write_text("other weights")
    assert planned(stage.call("--dry-run")) == {"train_teacher": 1}
    given.unlink()
    assert_one_line(stage.call("--dry-run", "--config", "run=new"), ["train_teacher.file is given.safetensors"])


def test_listed_networks_are_diagnosed_beside_the_teacher_and_shown(finished):
    listed = [{"name": "small", "budget": "macs=100K"}, {"name": "cut", "arch": "smallest"}]
    listed += [{"name": "control", "file": "results/fake/train_control/control.safetensors"}]
    more = finished.write("networks.yaml", {"diagnose": {"networks": listed}})
    assert finished.plan(more=more) == {"diagnose": 4, "compare_experiment": 1, "report": 1, "all": 1}
    done = finished("--dry-run", "--printshellcmds", more=more)
    lines = {
        name: next(line for line in done.stdout.splitlines() if f"--bound results/fake/diagnose/{name}/" in line)
        for name in ("teacher", "small", "cut", "control")
    }
    assert '"networks":[]' in lines["teacher"]
    assert ("--weights" in lines["teacher"], "--supernet" in lines["teacher"]) == (False, False)
    assert "--weights results/fake/export_student/macs=100K/student.safetensors" in lines["small"]
    assert "--weights results/fake/train_control/control.safetensors" in lines["control"]
    assert "--supernet results/fake/train_phase/all/supernet.safetensors --train results/fake/prep" in lines["cut"]
    named = [name for name, line in lines.items() if '"name":"small"' in line]
    assert named == ["small"]  # listing another network changes no job
    shown = next(line for line in done.stdout.splitlines() if "proard.stages.report" in line)
    assert "--diagnosis-summary results/fake/compare_experiment/diagnosis.parquet" in shown


def test_a_network_from_a_budget_nobody_listed_is_exported_first(finished):
    more = finished.write("networks.yaml", {"diagnose": {"networks": [{"name": "a", "budget": "macs=150K"}]}})
    assert finished.plan("results/fake/diagnose/a/bound.parquet", more=more) == {
        "select_student": 1,
        "export_student": 1,
        "diagnose": 1,
    }


def test_white_space_in_a_shell_line_repeats_nothing(finished):
    copy = finished.folder / "copy"
    shutil.copytree(ROOT / "workflow", copy / "workflow")
    shutil.copy(ROOT / "environment.yml", copy)
    for path in (copy / "workflow" / "rules").glob("*.smk"):
        path.write_text(path.read_text("utf-8").replace('" --', '"   \\n --'), "utf-8")
    assert finished.plan(snakefile=copy / "workflow" / "Snakefile") == {}


def test_all_stages_are_planned_and_profiles_are_found_in_both_spellings():
    quickstart = ["--dry-run", "--forceall", "--configfile", "config/quickstart.yaml"]  # it may have been run
    plans = [planned(snakemake(*quickstart, flag, "slurm")) for flag in ("--profile", "--workflow-profile")]
    assert set(plans[0]) == {*NEEDS, "all"} - ON_REQUEST
    assert plans[0] == plans[1]
    assert plans[0]["export_student"] == 3


def test_the_full_run_is_the_default_and_no_other_file_inherits_from_it(tmp_path):
    full = planned(snakemake("--dry-run", "--forceall"))
    assert full == planned(snakemake("--dry-run", "--forceall", "--configfile", "config/cifar10_resnet.yaml"))
    assert (full["train_phase"], full["evaluate_archs"]) == (5, 40)
    small = tmp_path / "small.yaml"
    small.write_text("run: small\n")
    own = planned(snakemake("--dry-run", "--configfile", small, "--directory", tmp_path))
    assert own["train_phase"] == 1
    assert "select_student" not in own


def test_a_later_config_file_changes_the_source_and_keeps_the_rest(tmp_path):
    parquet = tmp_path / "parquet.yaml"
    parquet.write_text(
        "prepare_data: {source: parquet, train: train.parquet, test: test.parquet}\nthreat: {eps: 4/255}"
    )
    configs = ["--configfile", "config/cifar10_micro.yaml", parquet, "--config", "seed=3"]
    done = snakemake("prepare_data", "sample_archs", "--dry-run", "--printshellcmds", *configs)
    assert done.returncode == 0, done.stderr
    command = next(line for line in done.stdout.splitlines() if "proard.stages.prepare_data" in line)
    assert '"source":"parquet"' in command
    assert '"classes":["airplane"' in command
    assert "--seed 3" in command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "sedd=1"], ["sedd", "did you mean seed"]),
        (["--config", "threat={'eps': 8}"], ["threat.eps is 8", "8/255"]),
        (["--config", "select_student={'budgets': ['macs=1K']}"], ["macs=1K", "smallest feasible cost", "macs=29264"]),
    ],
    ids=["unknown key", "eps in 0-255", "budget"],
)
def test_an_error_in_the_config_is_one_line(arguments, words):
    done = snakemake("--dry-run", "--configfile", "config/quickstart.yaml", *arguments)
    assert_one_line(done, words)


@pytest.mark.parametrize("budget", ["macs=1K", "watts=3", "macs=1 M"])
def test_an_impossible_budget_stops_before_the_first_job(finished, budget):
    assert_one_line(finished("--dry-run", f"results/fake/select_student/{budget}/student.parquet"), ["budget", budget])


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_every_job_is_logged_timed_and_sized(path):
    for rule in re.split(r"^rule ", path.read_text("utf-8"), flags=re.MULTILINE)[1:]:
        name = rule.split(":", 1)[0]
        if "shell:" not in rule:
            continue
        needed = ["log:", "benchmark:", "conda:", "mem_mb=", "runtime=", "settings=", "seed=", "2>&1 | tee {log:q}"]
        assert [word for word in needed if word not in rule] == [], name
        assert f"python -m proard.stages.{name} " in rule
        assert f"<results>/{name}/" in rule
        assert ("gpu=1" in rule) == ("--device auto" in rule), name


def test_a_stage_is_a_rule_a_module_and_a_target():
    names = {name for path in RULES for name in re.findall(r"^rule (\w+):", path.read_text("utf-8"), re.MULTILINE)}
    assert set(NEEDS) <= names
    assert {"train_phases", "evaluate", "select_students", "export_students", "quantize_students"} <= names
    assert "executorch_students" in names
    assert {path.stem for path in (ROOT / "proard" / "stages").glob("*.py")} >= set(NEEDS)


def test_examined_students_are_attacked_before_they_are_checked_and_described(finished):
    sections = {"autoattack_student": {"run": True}, "check_student": {"run": True}}
    more = finished.write("examined.yaml", sections)
    each = dict.fromkeys(("autoattack_student", "check_student", "describe_student"), BUDGETS)
    assert finished.plan(more=more) == {**each, "report": 1, "all": 1}
    done = finished("--dry-run", "--printshellcmds", more=more).stdout.splitlines()
    line = next(line for line in done if "--checks results/fake/check_student/macs=1M/checks.parquet" in line)
    for flag in ("--autoattack results/fake/autoattack_student/macs=1M/table.parquet", "--teacher ", "--supernet "):
        assert flag in line
    shown = next(line for line in done if "proard.stages.report" in line)
    assert shown.count("/table.parquet") >= BUDGETS
    assert (
        '"run":true' not in line.split("--settings")[1].split("--seed")[0]
    )  # whether `all` includes it changes no job
    only = finished.write("attacked.yaml", {"autoattack_student": {"run": True}})
    assert finished.plan("results/fake/describe_student/macs=1M/card.md", more=only) == {
        "autoattack_student": 1,
        "describe_student": 1,
    }


def test_executorch_is_planned_with_its_extra_and_refused_in_one_line_without(finished):
    more = finished.write("executorch.yaml", {"executorch_student": {"run": True}})
    if importlib.util.find_spec("executorch") is not None:
        assert finished.plan(more=more) == {"executorch_student": BUDGETS, "all": 1}
        return
    done = finished("--dry-run", more=more)
    assert_one_line(done, ["executorch_student needs ExecuTorch", "pip install -e .[executorch]"])


def test_autoattack_is_left_out_where_there_are_too_few_classes(tmp_path):
    data = {"source": "parquet", "train": "a.parquet", "test": "b.parquet", "classes": ["cat", "dog"]}
    sections = {"run": "two", "prepare_data": data, "autoattack_student": {"run": True}}
    sections["select_student"] = {"budgets": ["macs=1M"]}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(sections))
    where = ["--snakefile", ROOT / "workflow" / "Snakefile", "--directory", tmp_path, "--cores", "1"]
    done = snakemake("--dry-run", *where, "--configfile", tmp_path / "two.yaml")
    assert "autoattack_student" not in planned(done)
    assert "note: AutoAttack needs 4 classes; its stage is left out" in done.stderr
