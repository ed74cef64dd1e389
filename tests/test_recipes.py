"""The committed configs: each plans its whole DAG, and the settings of each recipe train its real space by a step."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import image_sets
from test_workflow import planned, snakemake
from training_runs import no_validation

from proard.config import Attack, Measurement, RunConfig, load
from proard.data import to_float
from proard.evaluation import SubnetMeter
from proard.nets import Supernet, extract, fold
from proard.space import DIMS, SearchSpace
from proard.stages.training import AugmentedImages
from proard.training import ResumeState, fit, phase_plan, single_plan

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


@pytest.mark.parametrize("name", [*RECIPES, "cifar10_micro_better", "experiments/sampling"])
def test_a_recipe_plans_its_whole_dag(name, tmp_path):
    where = ["--configfile", ROOT / "config" / f"{name}.yaml", "--directory", tmp_path]
    plan = planned(snakemake("--dry-run", "--snakefile", ROOT / "workflow" / "Snakefile", *where))
    run = recipe(name)
    assert plan["train_phase"] == len(run.train_phase.phases)
    assert plan.get("export_student", 0) == len(run.select_student.budgets)
    seeds, variants = run.train_variant.seeds, run.train_variant.variants.values()
    assert plan.get("train_variant", 0) == len(seeds) * sum(len(variant.phases) for variant in variants)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_share_their_schedule(name):
    run, reference = recipe(name), recipe("cifar10_resnet")
    fields = ("epochs", "warmup_epochs", "lr", "archs_per_step", "batch_size", "weight_decay", "sampling", "loss")
    rows, expected = (
        [[getattr(phase, field) for field in fields] for phase in one.train_phase.phases] for one in (run, reference)
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


@pytest.mark.parametrize("name", RECIPES)
def test_budgets_reach_from_the_smallest_to_the_largest_subnet(name):
    run = recipe(name)
    space = SearchSpace(run.space)
    limits = [
        float(text.removeprefix("macs=")[:-1]) * {"M": 1e6, "G": 1e9}[text[-1]] for text in run.select_student.budgets
    ]
    assert limits == sorted(limits)
    assert space.spec(space.smallest).macs <= limits[0] < 1.2 * space.spec(space.smallest).macs
    assert space.spec(space.largest).macs <= limits[-1] < 1.1 * space.spec(space.largest).macs


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four 32x32 images, with labels below the number of classes."""
    some = image_sets(tmp_path_factory.mktemp("images"), train=6, val=3)["train"]

    def of(classes: int):
        pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
        labels = torch.tensor([0, classes - 1, 1, classes // 2])
        names = tuple(map(str, range(classes)))
        return type(some)(torch.from_numpy(pixels), labels, "checksum", "train", names, (0.5,) * 3, (0.25,) * 3)

    return of


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_its_space_by_a_step_of_teacher_and_supernet(name, images, tmp_path):
    run = recipe(name)
    space, train = SearchSpace(run.space), images(run.space.classes)
    net = Supernet(space, mean=train.mean, std=train.std, generator=torch.Generator().manual_seed(0))
    fewer = {"batch_size": 2, "warmup_epochs": 0, "dtype": "float32"}
    attack = {"num_steps": 2, "dtype": "float32", "curriculum": None}
    teacher = run.train_teacher
    steps = [(teacher, single_plan(space.largest, teacher.objective, teacher))]
    steps += [(phase, phase_plan(space, phase)) for phase in run.train_phase.phases[-1:]]
    guide = fold(extract(net, space.largest).eval())
    for number, (settings, plan) in enumerate(steps):
        one_step = {"epochs": 0.5 / plan.passes_per_epoch, "attack": settings.attack.model_copy(update=attack)}
        shorter = settings.model_copy(update={**fewer, **one_step})
        before = net.head.weight.detach().clone()
        rows = fit(
            net,
            label="step",
            plan=plan,
            settings=shorter,
            eps=run.threat.eps,
            source=AugmentedImages(train, shorter),
            teacher=guide if number else None,
            validate=no_validation,
            state=ResumeState(tmp_path / f"{number}.safetensors", "mark"),
            seed=0,
        )
        assert rows[-1]["step"] == 1
        assert 0 < rows[-1]["loss"] < math.inf
        assert not torch.equal(before, net.head.weight)
    measurement = Measurement(recalibration_images=4, batch_size=2)
    meter = SubnetMeter(net, checksum="net", train=train, threat=run.threat, measurement=measurement, seed=0)
    (row,) = meter.rows(space.smallest, train.first(2), [Attack(num_steps=1)])
    assert row["macs"] == space.spec(space.smallest).macs
    logits = meter.student(space.smallest)(to_float(train.images[:2]))
    assert logits.shape == (2, run.space.classes)
    assert torch.isfinite(logits).all()
