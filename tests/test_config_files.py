"""Config files as users write them: repeated keys, broken YAML, names and numbers that YAML reads differently."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from proard.config import ConfigError, load, read_file
from proard.space import SearchSpace, parse_budget
from proard.space.cost import check_budget

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "config").rglob("*.yaml"))
IMAGES = {"source": "parquet", "train": "a.parquet"}


def refusal(**values) -> str:
    """The one-line error for a config."""
    with pytest.raises(ConfigError) as caught:
        load({"run": "a", **values})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_configs_repeat_no_key_and_keep_the_names_of_their_students(path):
    values = read_file(path)
    assert values == yaml.safe_load(path.read_text("utf-8"))
    if path.parent.name == "config" or "run" in values:
        budgets = load(values).select_student.budgets
        assert list(budgets) == values.get("select_student", {}).get("budgets", [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("threat: {eps: 8/255}\nseed: 1\nthreat:\n  norm: l2\n", "threat is given twice, in line 1 and in line 3"),
        ("a:\n  b:\n    - {c: 1, d: 2,\n       c: 3}\n", "a.b.0.c is given twice, in line 3 and in line 4"),
        ('{\n\t"seed": 1,\n\t"seed": 2}', "seed is given twice, in line 2 and in line 3"),
        ("run: a\nseed: [1\nspace: x\n", ", line 3, column 6: not valid YAML: expected ',' or ']'"),
        ("threat:\n\teps: 8/255\n", ", line 2, column 1: not valid YAML: .*spaces, not with tabs"),
        ("run: a: b\n", ", line 1, column 7: not valid YAML: mapping values"),
        ("seed: 2024-99-99\n", "not valid YAML: month must be"),
        ("- run\n", "has no keys"),
    ],
)
def test_a_file_that_yaml_reads_otherwise_than_meant_is_refused_with_its_lines(tmp_path, text, words):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"my.yaml.*{words}"):
        read_file(tmp_path / "my.yaml")


def test_merged_keys_may_be_overridden(tmp_path):
    (tmp_path / "my.yaml").write_text("a: &all {b: 1, c: 2}\nd:\n  <<: *all\n  b: 3\n")
    assert read_file(tmp_path / "my.yaml")["d"] == {"b": 3, "c": 2}


def test_snakemake_and_the_doctor_refuse_a_repeated_section(tmp_path):
    (tmp_path / "my.yaml").write_text("run: a\nthreat: {eps: 8/255}\nthreat: {norm: l2, eps: 1}\n")
    config = ["--configfile", tmp_path / "my.yaml", "--directory", tmp_path]
    snakefile = ["--snakefile", ROOT / "workflow" / "Snakefile"]
    for command in (["snakemake", "--dry-run", *snakefile], ["proard.cli", "doctor", "--here"]):
        done = subprocess.run(
            [sys.executable, "-m", *map(str, [*command, *config])], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert "threat is given twice, in line 2 and in line 3" in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("classes", [[0, 1], [True, False], {0: "cat"}, "cat, dog", ["cat", None], True])
def test_classes_that_are_no_list_of_names_are_explained(classes):
    line = refusal(prepare_data={**IMAGES, "classes": classes})
    assert line == f"prepare_data.classes is {classes!r}; expected: a list of names; quote numbers, yes and no"


@pytest.mark.parametrize(("classes", "words"), [(["cat"], "at least two"), (["cat", "cat"], "different names")])
def test_classes_are_at_least_two_and_differ(classes, words):
    assert words in refusal(prepare_data={**IMAGES, "classes": classes})


@pytest.mark.parametrize("classes", [2, "2", ["0", "1"]])
def test_classes_are_a_number_or_names(classes):
    assert load({"run": "a", "prepare_data": {**IMAGES, "classes": classes}}).space.classes == 2


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "-x", "a/b", "a b", ""])
def test_names_that_lead_out_of_their_folder_are_refused(name):
    assert f"run is {name!r}; expected: letters, digits" in refusal(run=name)
    assert "expected: letters, digits" in refusal(experiment={"trainings": [{"name": name}]})
    assert "expected: letters, digits" in refusal(diagnose={"networks": [{"name": name, "arch": "largest"}]})


@pytest.mark.parametrize("written", ["2024", "1.5", "2024-01-02", "no"])
def test_a_name_that_yaml_does_not_read_as_text_is_to_be_quoted(written):
    words = "put it in quotes" if written == "no" else f"put it in quotes: '{written}'"
    name = yaml.safe_load(written)
    assert words in refusal(run=name)
    assert words in refusal(train_phase={"phases": [{"name": name}]})
    assert "put it in quotes" in refusal(experiment={"trainings": [{"name": name, "trains": "supernet"}]})


@pytest.mark.parametrize(
    ("texts", "spelling"),
    [
        (["macs=300K", "macs=300k", "macs=0.3M", "macs=3e5", "macs=300000"], "macs=300K"),
        (["params=2.5M", "params=2500k"], "params=2.5M"),
        (["macs=1.2G", "macs=1200M"], "macs=1.2G"),
        (["macs=29264", "macs=29.264K"], "macs=29264"),
        (["macs=1500"], "macs=1.5K"),
        (["latency=5ms", "latency=5000us", "latency=0.005s", "latency=5e-3s"], "latency=5ms"),
        (["latency=250us", "latency=0.25ms"], "latency=250us"),
        (["sram=256K,latency=5ms", "latency=5ms,sram=256k", "latency=0.005s,sram=0.256M"], "latency=5ms,sram=256K"),
        (["params=1M,macs=2M,flash=1e6"], "flash=1M,macs=2M,params=1M"),
    ],
)
def test_a_budget_in_several_spellings_is_one_student(texts, spelling):
    config = {"run": "a", "device": "latency/board.json", "select_student": {"budgets": texts}}
    assert load(config).select_student.budgets == (spelling,)
    assert [parse_budget(text) for text in texts] == [parse_budget(spelling)] * len(texts)
    network = {"name": "a", "budget": texts[-1]}
    assert load({"run": "a", "diagnose": {"networks": [network]}}).diagnose.networks[0].budget == spelling


def test_one_budget_needs_no_list():
    assert load({"run": "a", "select_student": {"budgets": "macs=300k"}}).select_student.budgets == ("macs=300K",)


@pytest.mark.parametrize("budgets", [1e5, [100000], "1e5", [{"macs": "300k"}], "macs=1M, params=2M", ["macs=1e99"]])
def test_budgets_that_are_none_are_explained(budgets):
    assert "write a cost column, a number and K, M or G, as in macs=150M" in refusal(
        select_student={"budgets": budgets}
    )


def test_a_budget_by_latency_needs_a_device():
    assert "device is missing: latency=5ms is the latency on a device" in refusal(
        select_student={"budgets": "latency=5ms"}
    )
    assert "device is missing: search_front.cost: latency" in refusal(search_front={"cost": "latency"})
    assert "max_cost limits macs, params or flash; cost is sram" in refusal(
        search_front={"cost": "sram", "max_cost": 1000}
    )
    assert "device is missing: search_front.cost: latency" in refusal(search_front={"cost": ["macs", "latency"]})
    with pytest.raises(ConfigError, match="budget latency=5ms,macs=1M needs a device"):
        check_budget("macs=1M,latency=5ms", SearchSpace(load({"run": "a"}).space))


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"cost": ["macs", "macs"]}, "search_front.cost: one cost or two different ones are minimised"),
        ({"cost": ["macs", "sram", "flash"]}, "as in [macs, sram]; given: macs, sram, flash"),
        ({"cost": []}, "given: none"),
        ({"cost": None}, "search_front.cost is None; expected: one entry, or a list"),
        ({"cost": "ram"}, "search_front.cost is 'ram'; expected: 'macs', 'params', 'latency', 'sram' or 'flash'"),
        ({"cost": ["macs", "ram"]}, "search_front.cost.1 is 'ram'; expected: 'macs', 'params'"),
        ({"cost": ["macs", "flash"], "max_cost": 3e6}, "max_cost has 1 of 2 limits: write one for each cost (macs, fl"),
        ({"max_cost": [3e6, 1e6]}, "max_cost has 2 of 1 limits"),
        ({"cost": ["macs", "sram"], "max_cost": [3e6, 5e4]}, "cost is sram: leave max_cost out and give a budget"),
        ({"cost": ["macs", "flash"], "max_cost": [3e6, "x"]}, "search_front.max_cost.1 is 'x'; expected: a number"),
    ],
)
def test_costs_of_the_search_that_are_none_are_explained(section, line):
    assert line in refusal(search_front=section)


def test_one_cost_needs_no_list_and_is_written_as_before():
    for given in ("flash", ["flash"]):
        settings = load({"run": "a", "search_front": {"cost": given, "max_cost": "1e6"}}).search_front
        assert (settings.cost, settings.limits) == (("flash",), (1e6,))
        assert settings.model_dump(mode="json") | {"cost": "flash", "max_cost": 1e6} == settings.model_dump(mode="json")
    both = load({"run": "a", "search_front": {"cost": ["macs", "sram"], "max_cost": ["3e6", None]}})
    assert both.search_front.limits == (3e6, math.inf)
    assert both.search_front.model_dump(mode="json")["max_cost"] == [3e6, None]
    assert load(both.model_dump(mode="json")) == both


@pytest.mark.parametrize(
    ("budget", "smallest"),
    [
        ("sram=1K", "sram=3072"),
        ("flash=3K", "flash=3728"),
        ("macs=1M,sram=2K", "sram=3072"),
        ("params=9", "params=966"),
    ],
)
def test_a_budget_below_every_subnet_names_the_smallest_feasible_cost(budget, smallest):
    space = SearchSpace(load({"run": "a"}).space)
    with pytest.raises(ConfigError, match=f"smallest feasible cost is {smallest} "):
        check_budget(budget, space)
    assert check_budget(smallest, space) == ""


def test_a_budget_is_compared_with_the_smallest_and_the_largest_subnet():
    space = SearchSpace(load({"run": "a"}).space)
    largest = space.spec(space.largest).macs
    assert check_budget(f"macs={largest}", space) == ""
    assert f"above the largest subnet, macs={largest}" in check_budget(f"macs={largest + 1}", space)
    with pytest.raises(ConfigError, match="smallest feasible cost is macs=29264"):
        check_budget("macs=1K", space)


@pytest.mark.parametrize("budget", ["macs=300k", "macs=0.3M"])
def test_a_student_asked_for_in_another_spelling_is_named_in_its_own(tmp_path, budget):
    (tmp_path / "my.yaml").write_text("run: a\n")
    arguments = ["--configfile", "my.yaml", "--snakefile", ROOT / "workflow" / "Snakefile", "--dry-run"]
    command = ["snakemake", f"results/a/export_student/{budget}/student.onnx", *map(str, arguments)]
    done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "use the target results/a/export_student/macs=300K/student.onnx" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "value",
    ["1e400", "-1e400", "1e999999999", f"{10**400}/3", float("inf"), float("nan"), 10**400, ".inf", "nan"],
    ids=lambda value: str(value)[:12],
)
@pytest.mark.parametrize(
    ("section", "key"),
    [("train_teacher", "lr"), ("train_teacher", "batch_size"), ("threat", "eps"), ("search_front", "max_cost")],
)
def test_numbers_beyond_float_are_refused_in_one_line(section, key, value):
    line = refusal(**{section: {key: value}})
    assert line.startswith(f"{section}.{key} is ")
    assert "number" in line
    assert len(line) < 200


def test_seeds_grids_and_ratios_are_bounded_too():
    assert "seed is 9223372036854775808; expected: an integer below 9.2e18" in refusal(seed=2**63)
    assert refusal(threat={"eps": "510/255"}).endswith("write 2/255")
    for attack in ({"num_steps": -1}, {"num_steps": 10**400}):
        student = {"name": "a", "effort": {"gradients": 10}, "attack": attack}
        assert "num_steps" in refusal(experiment={"trainings": [student]})


def test_an_unknown_key_names_the_three_nearest():
    line = refusal(trian_teacher={})
    assert line.startswith("trian_teacher is no setting; did you mean train_teacher? (nearest: train_teacher, ")
    assert line.count(",") == 2


@pytest.mark.parametrize(("held_out", "folds"), [(80, 5), (60, 2), (50, 5)])
def test_archs_that_do_not_suffice_for_the_predictor_are_refused_at_once(held_out, folds):
    line = refusal(sample_archs={"num_archs": 60}, fit_predictor={"held_out": held_out, "folds": folds})
    assert f"fit_predictor.held_out is {held_out}" in line
    assert "sample_archs.num_archs is 60" in line
