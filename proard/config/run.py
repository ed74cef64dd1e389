"""The settings of a whole run, what each stage gets of them, and errors that a user can act on."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from proard.config import settings as s
from proard.config.attacks import Threat
from proard.config.diagnosis import Diagnose
from proard.config.fields import ConfigError, Natural, Settings
from proard.config.presets import PRESETS
from proard.config.spaces import Space

Model = TypeVar("Model", bound=BaseModel)

NEEDS: dict[str, tuple[str, ...]] = {
    "prepare_data": ("run", "prepare_data"),
    "train_teacher": ("run", "space", "threat", "train_teacher"),
    "train_control": ("run", "space", "threat", "measurement", "train_teacher", "train_control", "verify_front"),
    "train_phase": ("run", "space", "threat", "train_phase"),
    "sample_archs": ("run", "space", "sample_archs"),
    "evaluate_archs": ("run", "space", "threat", "measurement", "evaluate_archs"),
    "merge_table": ("run",),
    "fit_predictor": ("run", "space", "fit_predictor"),
    "search_front": ("run", "space", "search_front"),
    "verify_front": ("run", "space", "threat", "measurement", "verify_front"),
    "select_student": ("run", "space", "threat", "measurement", "verify_front", "select_student"),
    "export_student": ("run", "space", "threat", "measurement", "export_student"),
    "diagnose": ("run", "space", "threat", "measurement", "diagnose"),
    "compare_diagnoses": ("run", "threat"),
    "report": ("run", "threat", "report"),
}


class RunConfig(Settings):
    """One run: its name, seed, search space, threat model and a section per stage."""

    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", description="Name of the run and of its folders.")]
    seed: Natural = 0
    space: Space = PRESETS["resnet_digits"]
    threat: Threat = Threat()
    measurement: s.Measurement = s.Measurement()
    prepare_data: s.PrepareData = s.PrepareData()
    train_teacher: s.TrainTeacher = s.TrainTeacher()
    train_control: s.TrainControl = s.TrainControl()
    train_phase: s.TrainPhase = s.TrainPhase()
    sample_archs: s.SampleArchs = s.SampleArchs()
    evaluate_archs: s.EvaluateArchs = s.EvaluateArchs()
    fit_predictor: s.FitPredictor = s.FitPredictor()
    search_front: s.SearchFront = s.SearchFront()
    verify_front: s.VerifyFront = s.VerifyFront()
    select_student: s.SelectStudent = s.SelectStudent()
    export_student: s.ExportStudent = s.ExportStudent()
    diagnose: Diagnose = Diagnose()
    report: s.Report = s.Report()

    @model_validator(mode="before")
    @classmethod
    def name_becomes_space(cls, value: Any) -> Any:
        """Replace a preset's name by the preset, in the shape of the data source where one is given."""
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        space = value.get("space", "resnet_digits")
        if isinstance(space, str):
            if space not in PRESETS:
                raise ConfigError(unknown("space", space, PRESETS))
            space = PRESETS[space].model_dump()
        if isinstance(space, Mapping) and "prepare_data" in value:
            try:
                channels, size, classes = s.PrepareData.model_validate(value["prepare_data"]).image_shape()
            except ValidationError:
                pass  # reported with its key when the section itself is validated
            else:
                space = {**space, "image_channels": channels, "image_size": size, "classes": classes}
        value["space"] = space
        return value


def load(config: Mapping[str, Any]) -> RunConfig:
    """Check the settings of a whole run.

    Raises
    ------
    ConfigError
        Names the key, its value, what was expected and, for an unknown key, the nearest valid one. An l2 attack that
        measures and cannot cross its ball is an error too: its accuracies would be too high.
    """
    run = parse(RunConfig, config)
    for key, attack in _measuring_attacks(run).items():
        if run.threat.norm == "l2" and attack.num_steps * attack.step_size < run.threat.eps:
            raise ConfigError(
                f"{key}: {attack.num_steps} steps of {attack.step_size:g} cannot cross an l2 ball of radius "
                f"{run.threat.eps:g}; raise step_size to {2.5 * run.threat.eps / attack.num_steps:.3g} or so"
            )
    return run


def _measuring_attacks(run: RunConfig) -> dict[str, s.Attack | s.Validation]:
    """Attacks whose accuracies are compared or reported, by the key that a user would change."""
    attacks: dict[str, s.Attack | s.Validation] = {
        f"verify_front.attacks.{attack.name}": attack for attack in run.verify_front.attacks
    }
    attacks |= {"evaluate_archs.attack": run.evaluate_archs.attack, "select_student.attack": run.select_student.attack}
    attacks |= {"train_teacher.validation": run.train_teacher.validation}
    attacks |= {"train_control.validation": run.train_control.validation}
    return attacks | {f"train_phase.{phase.name}.validation": phase.validation for phase in run.train_phase.phases}


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
    """One line for one pydantic error: key, value, expectation, way out."""
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
        name = path[-1]
        return f"{key} is {error['input']}; {name} is in pixel units of [0, 1], write {float(error['input']):g}/255"
    return f"{key} is {error['input']!r}; expected: {message.removeprefix('input should be ')}"


def unknown(kind: str, key: str, valid: Any, *, last: str | None = None) -> str:
    """Message for a name that does not exist, with its nearest neighbour."""
    last = last or key
    near = difflib.get_close_matches(last, list(valid), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{key} is no {kind}{hint} (valid: {', '.join(sorted(valid))})"


def _named_path(values: Any, location: tuple[Any, ...]) -> list[Any]:
    """The location as the user wrote it: list entries that carry a name are called by it."""
    path: list[Any] = []
    for part in location:
        if isinstance(part, str) and ("[" in part or part in ("int", "float", "str") or part.startswith("function-")):
            continue  # pydantic's name for a branch of a union
        entry = None
        if isinstance(values, Mapping):
            values = entry = values.get(part)
        elif isinstance(values, (list, tuple)) and isinstance(part, int) and part < len(values):
            values = entry = values[part]
        named = isinstance(part, int) and isinstance(entry, Mapping) and "name" in entry
        path.append(entry["name"] if named else part)
        if named and path[-2:-1] in (["phases"], ["networks"]):
            del path[-2]  # train_phase.depth.eps rather than train_phase.phases.0.eps
    return path


def _keys_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Valid keys of the mapping at `location`, read from the generated schema."""
    schema = model.model_json_schema()
    node: dict[str, Any] = schema
    for part in location:
        node = _resolve(schema, node)
        if isinstance(part, int):
            node = node.get("items", node.get("prefixItems", [{}])[0] if "prefixItems" in node else {})
        else:
            node = node.get("properties", {}).get(part, node)
    return list(_resolve(schema, node).get("properties", {}))


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """Follow `$ref` and the first object branch of a union."""
    while True:
        branches = node.get("anyOf") or node.get("allOf")
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        elif branches:
            node = next((branch for branch in branches if "$ref" in branch), {})
        else:
            return node


def job_settings(config: RunConfig, stage: str, *, phase: str | None = None) -> str:
    """The sections a job reads, as canonical JSON: what stands in its shell line and triggers its reruns.

    Raises
    ------
    ConfigError
        The phase is not in the config.
    """
    sections = config.model_dump(mode="json", include=set(NEEDS[stage]))
    if stage != "verify_front" and "verify_front" in sections:  # these measure under the same attacks, no more
        sections["verify_front"] = {"attacks": sections["verify_front"]["attacks"]}
    if phase is not None:
        phases = {entry["name"]: entry for entry in sections["train_phase"]["phases"]}
        if phase not in phases:
            raise ConfigError(unknown("phase", phase, phases))
        sections["train_phase"] = {"phases": [phases[phase]]}
    return json.dumps(sections, sort_keys=True, separators=(",", ":"))


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a config file, generated from the settings classes."""
    schema = RunConfig.model_json_schema()
    space = schema["properties"]["space"]
    schema["properties"]["space"] = {
        "anyOf": [{"enum": sorted(PRESETS)}, {key: space[key] for key in space if key != "default"}],
        "description": "A preset's name or a space written out.",
        "default": "resnet_digits",
    }
    phase = schema["$defs"]["Phase"]["properties"]
    shared = {key: value for key, value in phase.items() if key not in ("name",)}
    schema["$defs"]["TrainPhase"]["properties"].update(shared)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
