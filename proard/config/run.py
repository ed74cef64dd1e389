"""The settings of a whole run, the part of them that each stage reads, and messages for invalid settings."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from proard.config import settings as s
from proard.config.attacks import Threat
from proard.config.budgets import parse_budget
from proard.config.diagnosis import Diagnose
from proard.config.experiment import Experiment, SupernetTraining, group_of, write_out
from proard.config.fields import (
    NUMBER_SCHEMA,
    ConfigError,
    FolderName,
    Natural,
    Positive,
    Settings,
    shown,
)
from proard.config.images import PrepareData
from proard.config.losses import NAMED_KEYS, AnyLoss
from proard.config.presets import IMAGENET_SIZE, PRESETS
from proard.config.quantisation import ExecutorchStudent, QuantizeStudent
from proard.config.search import SearchFront
from proard.config.spaces import Space
from proard.config.trust import AutoattackStudent, CheckStudent

Model = TypeVar("Model", bound=BaseModel)

NEEDS: dict[str, tuple[str, ...]] = {
    "prepare_data": ("run", "prepare_data"),
    "train_teacher": ("run", "space", "threat", "validation", "train_teacher"),
    "train_control": (
        "run",
        "space",
        "threat",
        "measurement",
        "validation",
        "train_teacher",
        "train_control",
        "verify_front",
    ),
    "train_phase": ("run", "space", "threat", "validation", "train_phase"),
    "train_experiment": ("run", "space", "threat", "validation", "experiment"),
    "measure_experiment": ("run", "space", "threat", "measurement", "experiment"),
    "compare_experiment": ("run", "threat", "experiment"),
    "sample_archs": ("run", "space", "device", "sample_archs"),
    "evaluate_archs": ("run", "space", "threat", "measurement", "evaluate_archs"),
    "merge_table": ("run",),
    "fit_predictor": ("run", "space", "fit_predictor"),
    "search_front": ("run", "space", "device", "search_front"),
    "verify_front": ("run", "space", "threat", "measurement", "verify_front"),
    "select_student": ("run", "space", "device", "threat", "measurement", "verify_front", "select_student"),
    "export_student": ("run", "space", "threat", "measurement", "export_student"),
    "autoattack_student": ("run", "threat", "measurement", "autoattack_student"),
    "check_student": ("run", "space", "threat", "measurement", "check_student"),
    "describe_student": ("run", "export_student"),
    "quantize_student": ("run", "space", "threat", "measurement", "train_phase", "verify_front", "quantize_student"),
    "executorch_student": ("run", "threat", "measurement", "verify_front", "quantize_student", "executorch_student"),
    "diagnose": ("run", "space", "threat", "measurement", "diagnose"),
    "report": ("run", "threat", "report"),
}
LOSS_OPTIONS = {option for loss in get_args(get_args(AnyLoss)[0]) for option in loss().options}
REPLACED = {  # settings of earlier versions: what to write in their place
    "start_scale": "start: n_fgsm, the one use of it",
    "clip_to_ball": "start: n_fgsm for clip_to_ball: false",
}
OF_EXPERIMENT = {  # keys of the section `experiment` that a stage reads
    "train_experiment": ("trainings",),
    "measure_experiment": ("trainings", "measure"),
    "compare_experiment": ("title", "baseline", "bootstraps"),
}


class RunConfig(Settings):
    """One run: its name, seed, search space, threat model and a section per stage."""

    run: Annotated[FolderName, Field(description="Name of the run and of its folders.")]
    seed: Natural = 0
    space: Space = PRESETS["resnet_digits"]
    device: Annotated[
        str | None,
        Field(description="Latency table of the device (docs/latency.md); budgets and costs by latency need it."),
    ] = None
    threat: Threat = Threat()
    measurement: s.Measurement = s.Measurement()
    validation: s.Validation = s.Validation()
    save_every_minutes: Positive = 5
    prepare_data: PrepareData = PrepareData()
    train_teacher: s.TrainTeacher = s.TrainTeacher()
    train_control: s.TrainControl = s.TrainControl()
    train_phase: s.TrainPhase = s.TrainPhase()
    sample_archs: s.SampleArchs = s.SampleArchs()
    evaluate_archs: s.EvaluateArchs = s.EvaluateArchs()
    fit_predictor: s.FitPredictor = s.FitPredictor()
    search_front: SearchFront = SearchFront()
    verify_front: s.VerifyFront = s.VerifyFront()
    select_student: s.SelectStudent = s.SelectStudent()
    export_student: s.ExportStudent = s.ExportStudent()
    autoattack_student: AutoattackStudent = AutoattackStudent()
    check_student: CheckStudent = CheckStudent()
    quantize_student: QuantizeStudent = QuantizeStudent()
    executorch_student: ExecutorchStudent = ExecutorchStudent()
    diagnose: Diagnose = Diagnose()
    experiment: Experiment = Experiment()
    report: s.Report = s.Report()

    @model_validator(mode="before")
    @classmethod
    def name_becomes_space(cls, value: Any) -> Any:
        """Replace a preset's name by the preset, adapted to the shape of the data source if one is given.

        The user's own images without an image size get the side of a named ImageNet-size preset.
        """
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        space = value.get("space", "resnet_digits")
        if isinstance(space, str):
            if space not in PRESETS:
                raise ConfigError(unknown("space", space, PRESETS))
            space = PRESETS[space].model_dump()
            data = value.get("prepare_data")
            own = isinstance(data, Mapping) and data.get("source") in ("parquet", "imagefolder")
            if own and data.get("image_size") is None and space["image_size"] == IMAGENET_SIZE:
                value["prepare_data"] = {**data, "image_size": IMAGENET_SIZE}
        if isinstance(space, Mapping) and "prepare_data" in value:
            try:
                channels, size, classes = PrepareData.model_validate(value["prepare_data"]).image_shape()
            except ValidationError:
                pass  # reported with its key when the section is validated
            else:
                space = {**space, "image_channels": channels, "image_size": size, "classes": classes}
        value["space"] = space
        return value

    @model_validator(mode="before")
    @classmethod
    def trainings_are_written_out(cls, value: Any) -> Any:
        """Expand the experiment's trainings: defaults, grids, seeds and phases."""
        section = value.get("experiment") if isinstance(value, Mapping) else None
        if not isinstance(section, Mapping):
            return value
        return {**value, "experiment": write_out(section, value.get("train_phase"), parse)}


def load(config: Mapping[str, Any]) -> RunConfig:
    """Validate the settings of a whole run.

    Raises
    ------
    ConfigError
        A setting is not valid; the message names the key, its value, what was expected and, for an unknown key, the
        nearest valid ones. It is also an error if an l2 attack of a measurement cannot cross its ball (its accuracies
        would be too high), or if there are too few archs to fit the predictor. The latter is allowed in an experiment,
        which may need a few archs but no predictor.
    """
    run = parse(RunConfig, config)
    sampled, fitted = run.sample_archs.num_archs, run.fit_predictor
    if sampled < fitted.least_archs and not run.experiment.trainings:
        raise ConfigError(
            f"fit_predictor.held_out is {fitted.held_out}, with folds {fitted.folds}; expected: at least "
            f"{fitted.least_archs} archs (3 per fold beside those held out), but sample_archs.num_archs is {sampled}: "
            "raise it, or lower them"
        )
    by_latency = [text for text in run.select_student.budgets if "latency" in parse_budget(text).limits]
    by_latency += ["search_front.cost: latency"] if "latency" in run.search_front.cost else []
    if by_latency and run.device is None:
        raise ConfigError(
            f"device is missing: {by_latency[0]} is the latency on a device; make its table with proard latency plan "
            "and proard latency fit, then write device: latency/DEVICE.json"
        )
    supernets = [group_of(each.name) for each in run.experiment.trainings if isinstance(each, SupernetTraining)]
    baseline = run.experiment.baseline
    if baseline is not None and baseline not in supernets:
        raise ConfigError(unknown("supernet", f"experiment.baseline {baseline}", supernets, last=baseline))
    for key, attack in _measuring_attacks(run).items():
        steps, eps = attack.step_lengths(run.threat.eps), run.threat.eps
        if run.threat.norm == "l2" and sum(steps) < eps:
            lengths = f"{len(steps)} steps of {' to '.join(f'{step:g}' for step in dict.fromkeys(steps))}"
            raise ConfigError(
                f"{key}: {lengths} cannot cross an l2 ball of radius {eps:g}; "
                f"raise step_size to {2.5 * eps / len(steps):.3g} or so"
            )
    return run


def _measuring_attacks(run: RunConfig) -> dict[str, s.Attack | s.Validation]:
    """Attacks of measurements that are compared or reported, by their key in the config."""
    attacks: dict[str, s.Attack | s.Validation] = {
        f"verify_front.attacks.{attack.name}": attack for attack in run.verify_front.attacks
    }
    attacks |= {"evaluate_archs.attack": run.evaluate_archs.attack, "select_student.attack": run.select_student.attack}
    attacks |= {"validation": run.validation}
    measure, trainings = run.experiment.measure, run.experiment.trainings
    measured = (*measure.attacks, *measure.val_attacks) if trainings else ()
    attacks |= {f"experiment.measure.{attack.name}": attack for attack in measured}
    return attacks


def parse(model: type[Model], values: Mapping[str, Any] | str, *, where: str = "") -> Model:
    """Parse `values` (a mapping, or its JSON) as `model`; `where` is the section's name in messages."""
    try:
        if isinstance(values, str):
            values = json.loads(values)
        return model.model_validate(values)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where or 'settings'}: not valid JSON: {error}") from None
    except ValidationError as error:
        first = min(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
        raise ConfigError(explain(model, values, first, where)) from None


def explain(model: type[BaseModel], values: Any, error: Mapping[str, Any], where: str) -> str:
    """One line for one pydantic error: key, value, what was expected, and how to correct it."""
    path = [str(part) for part in ([where] if where else []) + _named_path(values, error["loc"])]
    key = ".".join(path) or "settings"
    if error["type"] == "extra_forbidden":
        return unknown("setting", key, _keys_at(model, error["loc"][:-1]), last=str(error["loc"][-1]))
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if error["type"] == "missing":
        return f"{key} is missing: {message}"
    if error["type"] == "value_error":
        return f"{key}: {message}" if path else message
    if error["type"] == "pixel_units":
        value = error["ctx"]["text"]
        return f"{key} is {error['input']}; {path[-1]} is in pixel units of [0, 1], write {value}/255"
    if error["type"] == "union_tag_not_found":
        return f"{key} needs a name: write {path[-1]}: NAME, or {path[-1]}: {{name: NAME, OPTION: VALUE}}"
    if error["type"] == "union_tag_invalid":
        return unknown(path[-1], f"{key} {error['ctx']['tag']}", _tags(error), last=error["ctx"]["tag"])
    if error["type"] == "invalid_key":
        return f"{key} is a key that YAML does not read as text; put it in quotes"
    if error["type"] == "string_type" and isinstance(error["input"], bool):
        return f"{key} is {error['input']}, because YAML converts unquoted yes, no, on and off; put it in quotes"
    if error["type"] == "string_type" and isinstance(error["input"], (int, float, date)):
        return f"{key} is {error['input']}, which YAML does not read as text; put it in quotes: '{error['input']}'"
    return f"{key} is {shown(error['input'])}; expected: {message.removeprefix('input should be ')}"


def unknown(kind: str, key: str, valid: Any, *, last: str | None = None) -> str:
    """Message for an unknown name, with the three nearest valid names."""
    name, names = last or key, list(valid)
    if name in LOSS_OPTIONS and kind == "setting":
        return f"{key} is no setting of its own; it is an option of a loss: write loss: {{name: NAME, {name}: VALUE}}"
    if name in REPLACED and kind == "setting":
        return f"{key} is a setting of an earlier version; remove it, or write {REPLACED[name]}"
    if name in RunConfig.model_fields and kind == "setting":
        return f"{key} is no setting of this section; {name} is a key of the whole run"
    alike = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {alike[0]}?" if alike else ""
    return f"{key} is no {kind}{hint} (nearest: {', '.join(difflib.get_close_matches(name, names, n=3, cutoff=0))})"


def _tags(error: Mapping[str, Any]) -> list[str]:
    """The names that a union of settings allows."""
    return [tag.strip("' ") for tag in error["ctx"]["expected_tags"].split(",")]


def _named_path(values: Any, location: tuple[Any, ...]) -> list[Any]:
    """The location with names in place of indices, for list entries that have a name."""
    path: list[Any] = []
    for part in location:
        if isinstance(part, str) and ("[" in part or part in ("int", "float", "str") or part.startswith("function-")):
            continue  # pydantic's name of a branch of a union
        given = values if isinstance(values, Mapping) else {}
        if part not in given and (part == given.get("family", "") or (path[-1:] and path[-1] in NAMED_KEYS)):
            continue  # pydantic's name of the branch of a family or of a loss
        if isinstance(part, int) and values is None:  # an entry that the file does not write out
            path.pop()
            continue
        if isinstance(part, int) and not isinstance(values, (list, tuple, Mapping)):  # a single entry without its list
            continue
        entry = None
        if isinstance(values, Mapping):
            values = entry = values.get(part)
        elif isinstance(values, (list, tuple)) and isinstance(part, int) and part < len(values):
            values = entry = values[part]
        name = entry.get("name") if isinstance(part, int) and isinstance(entry, Mapping) else None
        named = name is not None
        path.append(name if named else part)
        if named and path[-2:-1] in (["phases"], ["networks"]):
            del path[-2]  # train_phase.depth.eps rather than train_phase.phases.0.eps
    return path


def _keys_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Valid keys of the mapping at `location`, from the generated schema."""
    schema = model.model_json_schema()
    node: dict[str, Any] = schema
    for part in location:
        node = _resolve(schema, node)
        if isinstance(part, int):
            node = node.get("items", node.get("prefixItems", [{}])[0] if "prefixItems" in node else {})
        else:
            chosen = node.get("discriminator", {}).get("mapping", {}).get(part)
            named = [*node.get("patternProperties", {}).values(), node][0]  # a mapping with arbitrary keys
            node = {"$ref": chosen} if chosen else node.get("properties", {}).get(part, named)
    return list(_resolve(schema, node).get("properties", {}))


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """Follow `$ref` and the first object branch of a union."""
    while True:
        branches = node.get("anyOf") or node.get("allOf")
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        elif branches:
            node = next((branch for branch in branches if "$ref" in branch or "discriminator" in branch), {})
        else:
            return node


def job_settings(
    config: RunConfig,
    stage: str,
    *,
    phase: str | None = None,
    training: str | None = None,
) -> str:
    """The sections that a job reads, as canonical JSON: part of its shell command, so that changes rerun the job.

    Raises
    ------
    ConfigError
        The phase or the training of the experiment is not in the config.
    """
    if training is not None:
        chosen = tuple(each for each in config.experiment.trainings if each.name == training)
        if not chosen:
            raise ConfigError(unknown("training", training, [each.name for each in config.experiment.trainings]))
        section = config.experiment.model_copy(update={"trainings": chosen})
        config = config.model_copy(update={"experiment": section})
    sections = config.model_dump(mode="json", include=set(NEEDS[stage]))
    if stage != "verify_front" and "verify_front" in sections:  # these stages use only the attacks of that section
        sections["verify_front"] = {"attacks": sections["verify_front"]["attacks"]}
    sections.get(stage, {}).pop("run", None)  # whether `all` includes a stage changes none of its jobs
    if stage in OF_EXPERIMENT:
        part = {key: sections["experiment"][key] for key in OF_EXPERIMENT[stage]}
        if phase is not None:
            (entry,) = part["trainings"]
            part["trainings"] = [{**entry, **_only_phase(entry, phase)}]
        sections["experiment"] = part
    elif phase is not None:
        sections["train_phase"] = _only_phase(sections["train_phase"], phase)
    elif stage == "quantize_student":  # it trains on images augmented as in the last phase
        sections["train_phase"] = {"phases": sections["train_phase"]["phases"][-1:]}
    return json.dumps(sections, sort_keys=True, separators=(",", ":"))


def _only_phase(section: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The list of phases of a section, reduced to one phase."""
    phases = {phase["name"]: phase for phase in section["phases"]}
    if name not in phases:
        raise ConfigError(unknown("phase", name, phases))
    return {"phases": [phases[name]]}


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a config file, generated from the settings classes."""
    schema = RunConfig.model_json_schema()
    space = schema["properties"]["space"]
    schema["properties"]["space"] = {
        "anyOf": [{"enum": sorted(PRESETS)}, {key: space[key] for key in space if key != "default"}],
        "description": "A preset's name, or the settings of a space.",
        "default": "resnet_digits",
    }
    defined = schema["$defs"]
    shared = {key: value for key, value in defined["Phase"]["properties"].items() if key != "name"}
    defined["TrainPhase"]["properties"].update(shared)
    training = defined["ExperimentTraining"]
    training["properties"]["trains"] = {"enum": ["network", "supernet", "twin", "twins"], "default": "network"}
    training["properties"] |= {
        "grid": {"type": "object", "additionalProperties": {"type": "array", "minItems": 1}},
        "seeds": {"type": "array", "items": NUMBER_SCHEMA, "minItems": 1},
    }
    training["required"] = ["name"]
    training["additionalProperties"] = True  # keys of its kind, checked when the config is loaded
    _allow_names(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _allow_names(node: Any) -> None:
    """Allow a name alone wherever the schema has a union of mappings with different names."""
    for child in list(node.values() if isinstance(node, dict) else node if isinstance(node, list) else []):
        _allow_names(child)
    if not isinstance(node, dict) or node.get("discriminator", {}).get("propertyName") != "name":
        return
    union = {key: node.pop(key) for key in ("discriminator", "oneOf")}
    node["anyOf"] = [{"enum": sorted(union["discriminator"]["mapping"])}, union]
