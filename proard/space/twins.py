"""Twins: networks of some archs of the run's space that are trained alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from proard.config import ConfigError, Phase, RunConfig, Student, Twins, parse
from proard.config.experiment import with_equal_gradients
from proard.config.losses import merge
from proard.config.settings import Optimisation
from proard.space.sampling import spread_archs
from proard.space.search_space import SearchSpace


def with_twins(run: RunConfig) -> RunConfig:
    """The run with every entry `twins` expanded, and with `epochs` for networks whose effort is a number of steps.

    A twin has one arch, random initial weights, and the loss, attack and optimisation of the run's last phase. If the
    loss needs a teacher, it is the run's frozen one, even if the phase has a dynamic teacher. The cheapest arch comes
    first.

    Raises
    ------
    ConfigError
        An override is not a key of a network, or the number of steps is not known before the run.
    """
    trainings: list[Any] = []
    for each in run.experiment.trainings:
        trainings += _twins(run, each) if isinstance(each, Twins) else [each]
    for index, each in enumerate(trainings):
        if isinstance(each, Student) and each.effort is not None and each.effort.steps is not None:
            trainings[index] = each.model_copy(update={"epochs": epochs_of_steps(run, each)})
    return run.model_copy(update={"experiment": run.experiment.model_copy(update={"trainings": tuple(trainings)})})


def _twins(run: RunConfig, twins: Twins) -> Iterator[Student]:
    """The trainings of one entry `twins`."""
    last, where = run.train_phase.phases[-1], f"experiment.{twins.name}"
    shared = {name: getattr(last, name) for name in Student.model_fields.keys() & Phase.model_fields.keys()}
    shared = {key: value.model_dump() if hasattr(value, "model_dump") else value for key, value in shared.items()}
    effort = twins.effort.model_dump() if twins.effort is not None else None
    if effort is None and "epochs" not in twins.overrides:
        effort = {"steps": "phases"}
    shared = merge({**shared, "effort": effort, "trains": "twin"}, twins.overrides)
    space = SearchSpace(run.space)
    for index, genotype in enumerate(spread_archs(space, twins.archs, seed=run.seed)):
        arch = json.loads(space.arch(genotype).to_json())
        for seed in twins.seeds:
            own = {"name": f"{twins.name}{index}_seed={seed}", "arch": arch, "seed": seed}
            yield with_equal_gradients(parse(Student, {**shared, **own}, where=where))


def epochs_of_steps(run: RunConfig, student: Student) -> float:
    """Passes over the training images in which a network makes as many optimizer steps as the run's phases.

    Notes
    -----
    A step of a phase trains several subnets, a twin's step trains one. In a step, a subnet has at most one gradient
    evaluation per image, and its twin has exactly one.

    Raises
    ------
    ConfigError
        The length of a phase is known only at its start.
    """
    first, steps = run.train_phase.phases[0], None if student.effort is None else student.effort.steps
    for phase in run.train_phase.phases:
        if phase.forward_equivalents is not None:
            raise ConfigError(
                f"experiment.{student.name}.effort.steps is {steps}, but phase {phase.name} is "
                "scaled to its forward_equivalents; set its epochs to the number in its log instead"
            )

    def epochs(training: Optimisation, passes: int = 1) -> float:
        return training.epochs * passes * student.batch_size / training.batch_size

    total = sum(
        epochs(phase, phase.archs_per_step if phase.sampling == "per_pass" else 1) for phase in run.train_phase.phases
    )
    began_with_teacher = first.warm_start == "teacher" and run.train_teacher.source == "train"
    return total + epochs(run.train_teacher) if steps == "path" and began_with_teacher else total
