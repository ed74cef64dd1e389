"""Experiments: named trainings with overrides, grids, seeds and an equal-effort rule, measured and compared alike."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from proard.config.attacks import STRONG, Attack
from proard.config.fields import ConfigError, Count, FolderName, Int, Natural, Positive, Settings, shown
from proard.config.losses import merge
from proard.config.settings import Phase, TrainPhase
from proard.config.students import ExperimentTraining, Student

COMPARED: dict[str, dict[str, str]] = {  # files of compare_experiment beside its table, by kind of comparison
    "networks": {
        "summary": "summary.parquet",
        "accuracy_figure": "accuracy.svg",
        "own_figure": "own_attack.svg",
        "eps_figure": "eps.svg",
        "cost_figure": "cost.svg",
    },
    "supernets": {"gains": "gains.parquet", "gains_figure": "gains.svg"},
    "twins": {"gaps": "gaps.parquet", "gaps_figure": "gaps.svg"},
    "diagnoses": {
        "bound": "bound.parquet",
        "radii": "radii.parquet",
        "diagnosis": "diagnosis.parquet",
        "pairs": "pairs.parquet",
        "bound_figure": "bound.svg",
        "radius_figure": "radius.svg",
    },
}


class SupernetTraining(ExperimentTraining):
    """An experiment's training of the supernet: overrides of the run's `train_phase`.

    Its keys override the shared keys of `train_phase` and the keys of every phase. If it has `phases`, these replace
    the list, and the keys beside them are their shared defaults. The supernet of the last phase is measured.
    """

    trains: Literal["supernet"]
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]


class Twins(ExperimentTraining):
    """Archs of the run's space that are trained alone and compared with the run's subnets of the same arch.

    The range of log-MACs is divided into `archs` equal parts. One arch is drawn from each part, independently of its
    accuracy, and trained once per seed. All other keys override those of the last phase. Without `effort` and `epochs`
    a twin makes as many optimizer steps as all phases together.

    `beside` is the name of a `supernet` training of the experiment: its phases are meant then, and the twin of a seed
    is compared with the subnet of the supernet of that seed. Without it, both are the run's.
    """

    trains: Literal["twins"]
    name: FolderName = "twin"
    archs: Annotated[Int, Field(ge=2)] = 4
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)] = (0,)
    beside: FolderName | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def other_keys_are_overrides(cls, value: Any) -> Any:
        """Collect the keys of a network's training; they are checked when the list of twins is expanded."""
        if not isinstance(value, Mapping):
            return value
        own = {key: entry for key, entry in value.items() if key in cls.model_fields}
        others = {key: entry for key, entry in value.items() if key not in cls.model_fields}
        return {**own, "overrides": merge(own.get("overrides", {}), others)}


class MeasureExperiment(Settings):
    """The measurement of every training of an experiment, independent of how it was trained.

    `attacks` and their worst case are measured on the first `num_test_images` of test, at every radius of `eps`
    (default: the threat's). At x times the threat's radius a step is x times as long. `val_attacks` on `num_val_images`
    of val serve choices between trainings. A network that was trained with an attack is also measured under that attack
    (`own`), as in some papers. Of a supernet, `num_archs` of `sample_archs` are measured, evenly spread over MACs,
    including the smallest and the largest.
    """

    eps: tuple[Positive, ...] = ()
    num_archs: Annotated[Int, Field(ge=2)] = 12
    num_val_images: Count | None = None
    val_attacks: tuple[Attack, ...] = ()
    num_test_images: Annotated[Int, Field(ge=2)] | None = None
    attacks: Annotated[tuple[Attack, ...], Field(min_length=1)] = STRONG

    @model_validator(mode="after")
    def names_differ(self) -> MeasureExperiment:
        """Require different names of attacks: they are keys of the tables."""
        for key in ("attacks", "val_attacks"):
            names = [attack.name for attack in getattr(self, key)]
            if len(set(names)) < len(names) or {"worst", "own"} & set(names):
                raise ValueError(f"{key} need different names other than `worst` and `own`; they are {names}")
        return self


class Experiment(Settings):
    """Trainings that are measured alike and compared in one table.

    Every entry of `trainings` has a `name` and a kind in `trains`: one `network` (the default), a `supernet`, a `twin`
    or several `twins`. Its other keys are overrides. `defaults` are keys that all entries share. `grid` (lists of
    values by dotted key) and `seeds` (a list) expand an entry into one training per combination, named
    NAME_key=value_seed=1. Gains of supernets are relative to `baseline` (by default the first supernet). Intervals come
    from `bootstraps` redraws of the images. `budgets: true` adds the students of `select_student.budgets` to the same
    table.
    """

    title: str = "Trainings compared"
    defaults: dict[str, Any] = Field(default_factory=dict)
    trainings: tuple[SerializeAsAny[ExperimentTraining], ...] = ()  # objects of a kind, by `write_out`
    measure: MeasureExperiment = MeasureExperiment()
    baseline: str | None = None
    bootstraps: Count = 1000
    budgets: bool = False

    @model_validator(mode="after")
    def names_differ(self) -> Experiment:
        """Require different names of trainings: a name is also a folder."""
        names = [training.name for training in self.trainings]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"trainings need different names; {', '.join(twice)} occurs more than once")
        return self


def group_of(name: str) -> str:
    """The name of a training without its seed."""
    return re.sub(r"_seed=\d+$", "", name)


def write_out(section: Mapping[str, Any], train_phase: Any, parse: Callable[..., Any]) -> Mapping[str, Any]:
    """Expand the section `experiment`: every training with all its settings.

    Parameters
    ----------
    section : mapping
        The section as in the config: `defaults`, and `trainings` with `grid` and `seeds`.
    train_phase : mapping
        The run's section as in the config; trainings of supernets override it.
    parse : callable
        `proard.config.parse`.

    Raises
    ------
    ConfigError
        A training is not valid; the message names the training and its key.
    """
    listed, defaults = section.get("trainings"), section.get("defaults") or {}
    if not isinstance(listed, (list, tuple)) or not isinstance(defaults, Mapping):
        return section
    trainings = []
    for entry in listed:
        if not isinstance(entry, Mapping):
            raise ConfigError(f"experiment.trainings holds {shown(entry)}; expected: a mapping with a name")
        merged = merge(dict(defaults), dict(entry))
        for one in [merged] if merged.get("trains") == "twins" else expand(merged):
            trainings.append(_parsed(one, train_phase, parse))
    return {**{key: value for key, value in section.items() if key != "defaults"}, "trainings": tuple(trainings)}


def _parsed(entry: dict[str, Any], train_phase: Any, parse: Callable[..., Any]) -> Student | SupernetTraining | Twins:
    """One training, checked, with the epochs that its equal-effort rule requires."""
    kind, where = entry.get("trains", "network"), f"experiment.{entry.get('name', 'trainings')}"
    if kind == "supernet":
        return _supernet(entry, train_phase if isinstance(train_phase, Mapping) else {}, where, parse)
    if kind == "twins":
        return parse(Twins, entry, where=where)
    if kind not in ("network", "twin"):
        raise ConfigError(f"{where}.trains is {shown(kind)}; expected: network, supernet, twin or twins")
    student = parse(Student, entry, where=where)
    effort = student.effort
    if effort is not None and effort.forward_equivalents is not None:
        raise ConfigError(f"{where}.effort: forward_equivalents is for supernets; use gradients or steps")
    return with_equal_gradients(student)


def with_equal_gradients(student: Student) -> Student:
    """A network's training, with the epochs that its `effort` requires if this is a number of gradients."""
    if student.effort is None or student.effort.gradients is None:
        return student
    return student.model_copy(update={"epochs": student.effort.gradients / (student.attack_steps + 1)})


def _supernet(entry: dict[str, Any], train_phase: Mapping[str, Any], where: str, parse: Callable) -> SupernetTraining:
    """A training of the supernet: the run's phases with its overrides."""
    outer = {key: entry[key] for key in ("trains", "name", "seed", "effort") if key in entry}
    own = {key: value for key, value in entry.items() if key not in outer and key != "phases"}
    shared = {key: value for key, value in train_phase.items() if key != "phases"}
    phases = entry.get("phases", train_phase.get("phases", [{"name": "all"}]))
    if "phases" not in entry and isinstance(phases, (list, tuple)):
        phases = [merge(dict(phase), own) if isinstance(phase, Mapping) else phase for phase in phases]
    written = parse(TrainPhase, {**merge(shared, own), "phases": phases}, where=where).phases
    training = parse(SupernetTraining, {**outer, "phases": written}, where=where)
    effort = training.effort
    if effort is None:
        return training
    if effort.forward_equivalents is None:
        raise ConfigError(f"{where}.effort: gradients and steps are for networks; use forward_equivalents")
    timed = [phase.name for phase in written if phase.minutes is not None]
    if timed:
        raise ConfigError(f"{where}: effort and minutes of phase {timed[0]} both set its length; remove one")
    whole = sum(phase.epochs for phase in written)
    parts = [phase.forward_equivalents or effort.forward_equivalents * phase.epochs / whole for phase in written]
    stretched = [
        phase.model_copy(update={"forward_equivalents": part}) for phase, part in zip(written, parts, strict=True)
    ]
    return training.model_copy(update={"phases": tuple(stretched)})


def expand(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Expand one training of the config into one for every combination of its `grid` and `seeds`.

    Parameters
    ----------
    entry : mapping
        `grid` maps (dotted) keys to lists of values, `seeds` lists seeds. Both may be absent.

    Returns
    -------
    list of dict
        Trainings without `grid` and `seeds`. The seed varies fastest, then the last key of the grid. `_KEY=VALUE` is
        appended to the name for every key of the grid (KEY is its last part; 8/255 becomes `8-255`), then `_seed=N`.

    Raises
    ------
    ConfigError
        The grid is not a mapping of keys to lists, or the seeds are not a list.
    """
    own = {key: value for key, value in entry.items() if key not in ("grid", "seeds")}
    name, grid, seeds = own.get("name"), entry.get("grid", {}), entry.get("seeds", [None])
    if not isinstance(grid, Mapping) or not all(_is_list(values) for values in grid.values()):
        raise ConfigError(f"experiment.{name}.grid is {grid!r}; expected: a mapping of keys to lists of values")
    if not _is_list(seeds):
        raise ConfigError(f"experiment.{name}.seeds is {seeds!r}; expected: a list of seeds")
    expanded = []
    for *values, seed in itertools.product(*grid.values(), seeds):
        training, ending = copy.deepcopy(own), ""
        for key, value in zip(grid, values, strict=True):
            training = merge(training, _nested(key.split("."), value))
            ending += f"_{key.split('.')[-1]}={_text(value)}"
        if seed is not None:
            training["seed"], ending = seed, f"{ending}_seed={seed}"
        expanded.append({**training, "name": f"{name}{ending}"} if ending else training)
    return expanded


def _is_list(value: Any) -> bool:
    """Whether this is a list with at least one entry."""
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0


def _nested(path: Sequence[str], value: Any) -> Any:
    """`value` below a path of keys."""
    for key in reversed(path):
        value = {key: value}
    return value


def _text(value: Any) -> str:
    """A value as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "", str(value).replace("/", "-")) or "none"
