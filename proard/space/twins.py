"""Twins: some archs of the supernet's space as networks that are trained alone."""

from __future__ import annotations

import json
from collections.abc import Sequence

from proard.config import ConfigError, Phase, RunConfig, Student, parse
from proard.config.settings import Optimisation, merge
from proard.space.arch import Arch
from proard.space.sampling import spread_archs
from proard.space.search_space import SearchSpace


def twin_name(index: int, seed: int) -> str:
    """Name of a twin's training; `index` counts the archs from the cheapest."""
    return f"twin{index}_seed={seed}"


def twin_students(run: RunConfig) -> tuple[Student, ...]:
    """The trainings of all twins, cheapest arch first; none where the config has no section `compare_twins`.

    A twin has the loss, the attack and the optimisation of the run's last phase, one arch, random initial weights and,
    where the loss asks one, the run's frozen teacher, in place of a dynamic one too.

    Raises
    ------
    ConfigError
        An override is no key of a student.
    """
    settings = run.compare_twins
    if settings is None:
        return ()
    last = run.train_phase.phases[-1]
    shared = {name: getattr(last, name) for name in Student.model_fields.keys() & Phase.model_fields.keys()}
    shared = {key: value.model_dump() if hasattr(value, "model_dump") else value for key, value in shared.items()}
    shared = merge({**shared, "epochs": twin_epochs(run)}, settings.student)
    students = []
    for index, arch in enumerate(twin_archs(SearchSpace(run.space), settings.num_archs, seed=run.seed)):
        for seed in settings.seeds:
            own = {"name": twin_name(index, seed), "arch": json.loads(arch.to_json()), "seed": seed}
            students.append(parse(Student, {**shared, **own}, where="compare_twins.student"))
    if any(student.net is not None for student in students):
        raise ConfigError("compare_twins.student.net: a twin is an arch of the run's own space; leave it out")
    return tuple(students)


def twin_archs(space: SearchSpace, number: int, *, seed: int) -> Sequence[Arch]:
    """One arch, neither the smallest nor the largest, from each of equal parts of the range of log-MACs."""
    return [space.arch(genotype) for genotype in spread_archs(space, number, seed=seed)]


def twin_epochs(run: RunConfig) -> float:
    """Passes over the training images that a twin makes; its batches are those of the last phase.

    Notes
    -----
    A step of a phase trains several subnets, a twin's step one: a subnet had at most one gradient evaluation of each
    image of a step, its twin has exactly one.

    Raises
    ------
    ConfigError
        The budget is that of phases whose length is known only when they begin.
    """
    settings, (first, *_), last = run.compare_twins, run.train_phase.phases, run.train_phase.phases[-1]
    assert settings is not None
    if not isinstance(settings.budget, str):
        return settings.budget
    for phase in run.train_phase.phases:
        if phase.forward_equivalents is not None:
            raise ConfigError(
                f"compare_twins.budget is {settings.budget}, but phase {phase.name} is stretched to its "
                f"forward_equivalents: give a number of epochs, the one that its log names"
            )
    batch = settings.student.get("batch_size", last.batch_size)

    def epochs(training: Optimisation, passes: int = 1) -> float:
        return training.epochs * passes * batch / training.batch_size

    total = sum(
        epochs(phase, phase.archs_per_step if phase.sampling == "per_pass" else 1) for phase in run.train_phase.phases
    )
    began_with_teacher = first.warm_start == "teacher" and run.train_teacher.source == "train"
    return total + epochs(run.train_teacher) if settings.budget == "path" and began_with_teacher else total
