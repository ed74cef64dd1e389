"""The committed configs: each plans its whole DAG; the published recipes share their schedule."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from workflow_runs import planned, snakemake

from proard.config import RunConfig, load
from proard.space import DIMS, SearchSpace

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "config").glob("cifar*00_*.yaml"))
RECIPES += [f"cifar10_{family}{kind}" for family in ("mobilenet", "resnet") for kind in ("", "_fast")]
PUBLISHED = [name for name in RECIPES if not name.endswith("_fast")]


def recipe(name: str) -> RunConfig:
    return load(yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text("utf-8")))


def test_every_family_and_data_set_has_its_two_recipes():
    names = {
        f"{data}_{family}{kind}"
        for data in ("cifar10", "cifar100")
        for family in ("resnet", "mobilenet")
        for kind in ("", "_fast")
    }
    assert set(RECIPES) == names


@pytest.mark.parametrize("name", [*RECIPES, "cifar10_micro_better", "cifar10_sprint", "experiments/sampling"])
def test_a_recipe_plans_its_whole_dag(name, tmp_path):
    where = ["--configfile", ROOT / "config" / f"{name}.yaml", "--directory", tmp_path]
    plan = planned(snakemake("--dry-run", "--snakefile", ROOT / "workflow" / "Snakefile", *where))
    run = recipe(name)
    assert plan["train_phase"] == len(run.train_phase.phases)
    assert plan.get("export_student", 0) == len(run.select_student.budgets)
    assert plan.get("train_experiment", 0) == sum(len(training.phases) for training in run.experiment.trainings)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_share_their_schedule(name):
    run, reference = recipe(name), recipe("cifar10_resnet")
    fields = ("epochs", "warmup_epochs", "lr", "archs_per_step", "batch_size", "weight_decay", "sampling")
    rows, expected = (
        [[phase.loss.name, phase.loss.options, *(getattr(phase, field) for field in fields)] for phase in phases]
        for phases in (run.train_phase.phases, reference.train_phase.phases)
    )
    assert rows == expected
    assert run.train_teacher == reference.train_teacher
    space = SearchSpace(run.space)
    sizes = []
    for phase in run.train_phase.phases:
        among = space.open_choices(**{dim: getattr(phase, dim) for dim in DIMS})
        sizes.append(math.prod(len(options) for options in among))
    assert sizes == sorted(sizes)  # every phase opens more
    assert sizes[-1] == math.prod(space.choices)  # and the last one everything
    assert run.space.name == ("mobilenet_v3_cifar" if "mobilenet" in name else "resnet_cifar")
    assert run.space.classes == (100 if "cifar100" in name else 10)


@pytest.mark.parametrize("name", [*RECIPES, "cifar10_sprint"])
def test_budgets_reach_from_the_smallest_to_the_largest_subnet(name):
    run = recipe(name)
    space = SearchSpace(run.space)
    limits = [
        float(text.removeprefix("macs=")[:-1]) * {"M": 1e6, "G": 1e9}[text[-1]] for text in run.select_student.budgets
    ]
    assert limits == sorted(limits)
    assert space.spec(space.smallest).macs <= limits[0] < 1.2 * space.spec(space.smallest).macs
    assert space.spec(space.largest).macs <= limits[-1] < 1.1 * space.spec(space.largest).macs


def test_the_sprint_trains_half_of_the_published_space_in_minutes():
    run, whole = recipe("cifar10_sprint"), recipe("cifar10_resnet").space
    halves = [{**unit.model_dump(), "channels": unit.channels // 2} for unit in whole.units]
    stem = {**whole.stem.model_dump(), "channels": whole.stem.channels // 2}
    assert run.space.model_dump() == {
        **whole.model_dump(),
        "name": "resnet_cifar_half",
        "stem": stem,
        "units": tuple(halves),
    }
    space = SearchSpace(run.space)
    widths = set().union(*space.layer_widths(space.open_choices()).values())
    assert {width % 8 for width in widths} == {0}
    assert [round(space.spec(arch).macs / 1e5) for arch in (space.smallest, space.largest)] == [715, 6005]
    trained = [run.train_teacher, *run.train_phase.phases]
    assert sum(training.minutes for training in trained) <= 6
    assert run.sample_archs.num_archs <= run.evaluate_archs.archs_per_shard
