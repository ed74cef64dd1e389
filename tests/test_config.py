"""Settings of a run: strict, exact, and the one source of the JSON schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from proard.config import NEEDS, ConfigError, job_settings, json_schema, load
from proard.config.losses import Trades
from proard.config.schema import PATH, schema_text

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.name for path in (ROOT / "config").glob("*.yaml"))


def committed(name: str) -> dict:
    return yaml.safe_load((ROOT / "config" / name).read_text("utf-8"))


@pytest.mark.parametrize("name", CONFIGS)
def test_committed_configs_are_valid(name):
    load(committed(name))
    jsonschema.validate(committed(name), json_schema())


def test_committed_schema_is_the_generated_one():
    assert (ROOT / PATH).read_text("utf-8") == schema_text()
    jsonschema.Draft202012Validator.check_schema(yaml.safe_load(schema_text()))


def test_a_file_of_networks_to_diagnose_goes_with_its_run():
    more = yaml.safe_load((ROOT / "config" / "experiments" / "diagnose_micro.yaml").read_text("utf-8"))
    run = load(committed("cifar10_micro.yaml") | more)
    jsonschema.validate(committed("cifar10_micro.yaml") | more, json_schema())
    asked = {network.budget for network in run.diagnose.networks} - {None}
    assert asked <= set(run.select_student.budgets)


@pytest.mark.parametrize("eps", [8 / 255, "8/255", " 8 / 255 ", "0.03137254901960784"])
def test_numbers_may_be_text(eps):
    assert load({"run": "a", "threat": {"eps": eps}}).threat.eps == 8 / 255


def test_scientific_notation_without_a_point_is_a_number():
    values = yaml.safe_load("{run: a, train_teacher: {lr: 1e-3, epochs: '12', ema_decay: 0}}")
    assert values["train_teacher"]["lr"] == "1e-3"  # YAML 1.1 reads it as text
    teacher = load(values).train_teacher
    assert (teacher.lr, teacher.epochs, teacher.ema_decay) == (1e-3, 12, 0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sedd": 1}, ["sedd", "seed"]),
        ({"threat": {"epss": 0.1}}, ["threat.epss", "eps"]),
        ({"threat": {"eps": 8}}, ["threat.eps is 8", "[0, 1]", "8/255"]),
        ({"threat": {"eps": True}}, ["threat.eps", "True", "number"]),
        ({"threat": {"norm": "l1"}}, ["threat.norm", "'l1'", "linf"]),
        ({"space": "resnet_digit"}, ["resnet_digit", "did you mean resnet_digits"]),
        ({"train_teacher": {"lr": "fast"}}, ["train_teacher.lr", "'fast'", "number"]),
        ({"train_teacher": {"lr": -1}}, ["train_teacher.lr", "-1", "greater than 0"]),
        ({"train_teacher": {"objective": {"name": "trades", "beta": None}}}, ["train_teacher.objective.beta", "None"]),
        ({"train_phase": {"phases": [{"name": "depth", "attack": {"step_size": 2}}]}}, ["train_phase.depth", "2/255"]),
        ({"train_phase": {"phases": [{"name": "a"}, {"name": "a"}]}}, ["train_phase", "different names"]),
        ({"prepare_data": {"source": "parquet", "classes": 2}}, ["prepare_data", "`train`"]),
        ({"select_student": {"budgets": ["flops=1M"]}}, ["select_student.budgets", "flops=1M"]),
    ],
)
def test_errors_name_key_value_and_way_out(values, words):
    with pytest.raises(ConfigError) as caught:
        load({"run": "a", **values})
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def measuring(**keys):
    """A run's only measuring attack, and the run's radius."""
    run = load({"run": "r", "verify_front": {"attacks": [keys]}})
    return run.verify_front.attacks[0], run.threat.eps


@pytest.mark.parametrize(
    ("step_size", "num_steps", "lengths"),
    [
        ("2/255", 2, [2 / 255] * 2),
        ("eps", 1, [8 / 255]),
        ("eps / 4", 2, [2 / 255] * 2),
        (["eps", "eps/4", "1/255"], 3, [8 / 255, 2 / 255, 1 / 255]),
        (["eps", "eps/16"], 5, [8 / 255] * 3 + [0.5 / 255] * 2),
    ],
)
def test_step_lengths_follow_the_radius_and_the_schedule(step_size, num_steps, lengths):
    attack, eps = measuring(name="a", step_size=step_size, num_steps=num_steps)
    assert attack.step_lengths(eps) == pytest.approx(lengths)
    assert type(attack).model_validate_json(attack.model_dump_json()) == attack
    assert attack.scaled(3).step_lengths(3 * eps) == pytest.approx([3 * length for length in lengths])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"step_size": 2}, ["step_size is 2", "2/255"]),
        ({"step_size": ["eps", 2]}, ["step_size", "2/255"]),
        ({"step_size": "eps/0"}, ["step_size", "eps/4"]),
        ({"step_size": "2eps"}, ["step_size", "'2eps'", "eps/4"]),
        ({"step_size": []}, ["step_size", "a list of lengths"]),
        ({"step_size": True}, ["step_size", "True"]),
        ({"step_size": -1}, ["step_size", "-1", "above 0"]),
        ({"step_size": ["eps"] * 3, "num_steps": 2}, ["3 parts", "num_steps is 2"]),
        ({"targets": 5}, ["targets", "objective is ce"]),
        ({"objective": "targeted", "targets": 0}, ["targets", "0", "greater than or equal to 1"]),
    ],
)
def test_a_measuring_attack_that_cannot_be_meant_is_refused(keys, words):
    with pytest.raises(ConfigError) as caught:
        measuring(name="a", **keys)
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def test_measurements_take_the_strong_attacks_unless_told_otherwise():
    run = load({"run": "r"})
    assert run.verify_front.attacks == run.experiment.measure.attacks
    assert [attack.num_targets for attack in run.verify_front.attacks] == [None, None, 5]
    assert run.evaluate_archs.attack == run.select_student.attack == run.verify_front.attacks[1]
    assert measuring(name="t", objective="targeted")[0].num_targets == 5
    assert measuring(name="t", objective="targeted", targets=9)[0].num_targets == 9


@pytest.mark.parametrize("step_size", ["eps/20", ["eps/30", "eps/60"]])
def test_an_l2_schedule_that_cannot_cross_its_ball_is_refused(step_size):
    attack = {"name": "weak", "objective": "targeted", "num_steps": 10, "step_size": step_size}
    run = {"run": "r", "threat": {"norm": "l2", "eps": 0.5}, "verify_front": {"attacks": [attack]}}
    run |= {"validation": {"step_size": 0.1}}
    with pytest.raises(ConfigError, match=r"verify_front\.attacks\.weak.*cannot cross"):
        load(run)
    attack["step_size"] = ["eps", "eps/4"]
    assert load(run).verify_front.attacks[0].step_lengths(0.5) == [0.5] * 5 + [0.125] * 5


def test_run_is_required_and_safe_as_a_folder():
    for values in ({}, {"run": "../a"}, {"run": ""}):
        with pytest.raises(ConfigError, match="run"):
            load(values)


def test_space_takes_the_shape_of_the_data():
    space = load({"run": "a", "space": "resnet_micro", "prepare_data": {"source": "cifar100"}}).space
    assert (space.image_channels, space.image_size, space.classes) == (3, 32, 100)
    other_source = {"source": "parquet", "train": "a.parquet", "classes": ["x", "y"], "image_size": 48}
    space = load({"run": "a", "space": "resnet_micro", "prepare_data": other_source}).space
    assert (space.image_channels, space.image_size, space.classes) == (3, 48, 2)


@pytest.mark.parametrize("source", ["imagefolder", "parquet"])
def test_own_images_take_the_size_of_an_imagenet_preset(source):
    data = {"source": source, "train": "train", "classes": 5}
    of = lambda **more: load({"run": "r", "space": "mobilenet_v3_imagenet", "prepare_data": {**data, **more}})  # noqa: E731
    assert (of().prepare_data.image_size, of().space.image_size) == (224, 224)
    assert (of(image_size=64).prepare_data.image_size, of(image_size=64).space.image_size) == (64, 64)
    small = load({"run": "r", "space": "mobilenet_v3_cifar", "prepare_data": data})
    assert (small.prepare_data.image_size, small.space.image_size) == (None, 32)


def test_phases_inherit_and_override_shared_keys():
    shared = {"lr": 0.2, "attack": {"num_steps": 3}}
    phases = [{"name": "a"}, {"name": "b", "lr": 0.1, "attack": {"start": "zero"}}]
    first, second = load({"run": "r", "train_phase": {**shared, "phases": phases}}).train_phase.phases
    assert (first.lr, first.attack.num_steps, first.attack.start) == (0.2, 3, "uniform")
    assert (second.lr, second.attack.num_steps, second.attack.start) == (0.1, 3, "zero")


@pytest.mark.parametrize("section", [name for name in NEEDS if name != "merge_table"])
def test_a_section_reaches_only_the_stages_that_need_it(section):
    config = load({"run": "a", "select_student": {"budgets": ["macs=1M"]}})
    settings = {stage: json.loads(job_settings(config, stage)) for stage in NEEDS}
    assert {stage for stage, sections in settings.items() if section in sections} == {
        stage for stage, needs in NEEDS.items() if section in needs
    }


def test_a_job_of_one_phase_knows_only_its_phase():
    values = {"run": "a", "train_phase": {"phases": [{"name": "first"}, {"name": "second"}]}}
    edited = {"run": "a", "train_phase": {"phases": [{"name": "first"}, {"name": "second", "epochs": 7}]}}
    before, after = load(values), load(edited)
    same = [job_settings(config, "train_phase", phase="first") for config in (before, after)]
    other = [job_settings(config, "train_phase", phase="second") for config in (before, after)]
    assert same[0] == same[1]
    assert other[0] != other[1]
    of_int8 = json.loads(job_settings(after, "quantize_student"))["train_phase"]
    assert [phase["name"] for phase in of_int8["phases"]] == ["second"]  # whose augmentation its training has


def test_settings_survive_their_json():
    config = load(committed("quickstart.yaml"))
    again = load(json.loads(job_settings(config, "train_teacher")))
    assert again.train_teacher == config.train_teacher
    assert again.space == config.space


def test_full_run_is_the_published_schedule():
    config = load(committed("cifar10_resnet.yaml"))
    phases = config.train_phase.phases
    rows = [(p.name, p.epochs, p.warmup_epochs, p.lr, p.archs_per_step, p.depth, p.expand) for p in phases]
    assert rows == [
        ("width", 125, 5, 3e-2, 1, (2,), (0.35,)),
        ("depth1", 25, 0, 2.5e-3, 2, (1, 2), (0.35,)),
        ("depth2", 125, 5, 7.5e-3, 2, (0, 1, 2), (0.35,)),
        ("expand1", 25, 0, 2.5e-3, 4, (0, 1, 2), (0.25, 0.35)),
        ("expand2", 125, 5, 7.5e-3, 4, (0, 1, 2), (0.2, 0.25, 0.35)),
    ]
    assert sum(phase.epochs * phase.archs_per_step for phase in phases) == 1025  # passes, one subnet each
    assert {phase.sampling for phase in phases} == {"per_pass"}
    assert {(phase.batch_size, phase.weight_decay) for phase in phases} == {(64, 3e-5)}
    teacher = config.train_teacher
    assert (teacher.objective, teacher.epochs, teacher.weight_decay) == (Trades(beta=6), 125, 2e-4)
    assert config.sample_archs.num_archs == 2000
    assert config.evaluate_archs.attack.num_steps == 20
    assert config.threat.eps == 8 / 255


def test_the_default_config_is_the_full_run():
    assert committed("config.yaml") == committed("cifar10_resnet.yaml")
