"""Twins: networks of some archs of the run's space that are trained alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from proard.config import ConfigError, Phase, RunConfig, Student, SupernetTraining, Twins, parse
from proard.config.experiment import with_equal_gradients
from proard.config.losses import merge
from proard.config.settings import Optimisation
from proard.space.sampling import spread_archs
from proard.space.search_space import SearchSpace

Phases = tuple[Phase, ...]


def with_twins(run: RunConfig) -> RunConfig:
    """The run with every entry `twins` expanded, and with `epochs` for networks whose effort is a number of steps.

    A twin has one arch, and the start, loss, attack and optimisation of the supernet that it is compared with. If the
    loss needs a teacher, it is the run's frozen one, even if the phase has a dynamic teacher. The cheapest arch comes
    first.

    Raises
    ------
    ConfigError
        An override is not a key of a network, the supernet beside a twin is not in the experiment, or the number of
        steps is not known before the run.
    """
    supernets = {each.name: each.phases for each in run.experiment.trainings if isinstance(each, SupernetTraining)}
    trainings: list[Any] = []
    for each in run.experiment.trainings:
        trainings += _twins(run, each, supernets) if isinstance(each, Twins) else [each]
    for index, each in enumerate(trainings):
        if isinstance(each, Student) and each.effort is not None and each.effort.steps is not None:
            phases = run.train_phase.phases if each.beside is None else supernets[each.beside]
            trainings[index] = each.model_copy(update={"epochs": epochs_of_steps(run, each, phases)})
    return run.model_copy(update={"experiment": run.experiment.model_copy(update={"trainings": tuple(trainings)})})


def _twins(run: RunConfig, twins: Twins, supernets: Mapping[str, Phases]) -> Iterator[Student]:
    """The trainings of one entry `twins`."""
    where, space = f"experiment.{twins.name}", SearchSpace(run.space)
    for index, genotype in enumerate(spread_archs(space, twins.archs, seed=run.seed)):
        arch = json.loads(space.arch(genotype).to_json())
        for seed in twins.seeds:
            beside = None if twins.beside is None else _supernet_of_seed(twins.beside, seed, supernets, where)
            phases = run.train_phase.phases if beside is None else supernets[beside]
            own = {"name": f"{twins.name}{index}_seed={seed}", "arch": arch, "seed": seed, "beside": beside}
            yield with_equal_gradients(parse(Student, {**_shared(twins, phases), **own}, where=where))


def _shared(twins: Twins, phases: Phases) -> dict[str, Any]:
    """Settings of every twin: those of the phases, then the overrides."""
    first, last = phases[0], phases[-1]
    shared = {name: getattr(last, name) for name in Student.model_fields.keys() & Phase.model_fields.keys()}
    shared = {key: value.model_dump() if hasattr(value, "model_dump") else value for key, value in shared.items()}
    effort = twins.effort.model_dump() if twins.effort is not None else None
    if effort is None and "epochs" not in twins.overrides:
        effort = {"steps": "phases"}
    if effort is not None:
        shared["minutes"] = None
    return merge({**shared, "warm_start": first.warm_start, "effort": effort, "trains": "twin"}, twins.overrides)


def _supernet_of_seed(name: str, seed: int, supernets: Mapping[str, Phases], where: str) -> str:
    """Full name of the supernet training that a twin of this seed is compared with.

    Raises
    ------
    ConfigError
        The experiment has no such training.
    """
    for full in (f"{name}_seed={seed}", name):
        if full in supernets:
            return full
    listed = ", ".join(supernets) or "none"
    raise ConfigError(f"{where}.beside is {name}, seed {seed}; supernets of the experiment: {listed}")


def epochs_of_steps(run: RunConfig, student: Student, phases: Phases) -> float:
    """Passes over the training images in which a network makes as many optimizer steps as the phases of a supernet.

    Notes
    -----
    A step of a phase trains several subnets, a twin's step trains one. In a step, a subnet has at most one gradient
    evaluation per image, and its twin has exactly one. `steps: path` adds the steps of the teacher, if the supernet
    started from its weights and the network does not.

    Raises
    ------
    ConfigError
        The length of a phase is known only at its start, or that of a training with `minutes` only at its end.
    """
    steps = None if student.effort is None else student.effort.steps
    began_with_teacher = phases[0].warm_start == "teacher" and run.train_teacher.source == "train"
    ahead = steps == "path" and began_with_teacher and student.warm_start == "random"
    counted = {f"phase {phase.name}": phase for phase in phases} | ({"the teacher": run.train_teacher} if ahead else {})
    for name, training in counted.items():
        if training.minutes is not None:
            raise ConfigError(
                f"experiment.{student.name}.effort.steps is {steps}, but {name} has minutes: its number of steps is "
                "known only at its end; set its epochs to the number in its log instead"
            )
    for phase in phases:
        if phase.forward_equivalents is not None:
            raise ConfigError(
                f"experiment.{student.name}.effort.steps is {steps}, but phase {phase.name} is "
                "scaled to its forward_equivalents; set its epochs to the number in its log instead"
            )

    def epochs(training: Optimisation, passes: int = 1) -> float:
        return training.epochs * passes * student.batch_size / training.batch_size

    total = sum(epochs(phase, phase.archs_per_step if phase.sampling == "per_pass" else 1) for phase in phases)
    return total + epochs(run.train_teacher) if ahead else total
