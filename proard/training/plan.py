"""Who is trained in a step, and on what: sampling strategies and teacher modes as plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from proard.config import Phase
from proard.losses import OBJECTIVES, Objective
from proard.space import Arch, SearchSpace


@dataclass(frozen=True)
class Drawn:
    """One subnet of a step with its objective; `guides` marks the dynamic teacher, whose logits guide the others."""

    arch: Arch
    objective: Objective
    options: dict[str, Any]
    guides: bool = False


@dataclass(frozen=True)
class Plan:
    """`draw(seed, step, data_pass)` gives a step's subnets; an epoch makes `passes_per_epoch` passes over the data.

    `frozen_weight` is the frozen teacher's share of the target: 1 alone, 0 for the dynamic teacher alone.
    """

    draw: Callable[[int, int, int], list[Drawn]]
    passes_per_epoch: int = 1
    frozen_weight: float = 1.0


def bind(name: str, settings: Any) -> tuple[Objective, dict[str, Any]]:
    """An objective by name, under the attack's own inner objective where one is set, with its options."""
    objective, inner = OBJECTIVES[name], settings.attack.objective
    fits = objective.inner is not None and (inner != "kl_teacher" or objective.needs_teacher)
    if inner != "loss" and fits:
        objective = replace(objective, inner=inner)
    return objective, {option: getattr(settings, option) for option in objective.options}


def single_plan(arch: Arch, objective: str, settings: Any) -> Plan:
    """Train one network alone: teacher and control."""
    drawn = [Drawn(arch, *bind(objective, settings))]
    return Plan(lambda seed, step, data_pass: drawn)


def phase_plan(space: SearchSpace, phase: Phase) -> Plan:
    """Sampling strategy and teacher mode of a phase.

    `per_pass` draws one subnet for a whole pass over the data and makes `archs_per_step` passes an epoch (the released
    ProARD code); `uniform` draws `archs_per_step` subnets in each step; `sandwich` takes the largest and the smallest
    of the open choices and draws the rest (Yu and Huang 2019, arXiv:1903.05134). A dynamic teacher trains in every
    step on its own objective.

    Raises
    ------
    ValueError
        The phase opens a choice that the space does not have.
    """
    among = space.open_choices(width=phase.width, depth=phase.depth, expand=phase.expand, kernel=phase.kernel)
    loss = bind(phase.loss, phase)
    guide = Drawn(space.largest, *bind(phase.teacher_objective, phase), guides=True)
    first = [space.arch([options[0] for options in among]), space.arch([options[-1] for options in among])]

    def draw(seed: int, step: int, data_pass: int) -> list[Drawn]:
        key, count = (data_pass, 1) if phase.sampling == "per_pass" else (step, phase.archs_per_step)
        rng = np.random.default_rng([seed, key])
        fixed = first[::-1][:count] if phase.sampling == "sandwich" else []
        archs = fixed + [space.arch(row) for row in space.sample(count - len(fixed), rng, among=among)]
        students = [Drawn(arch, *loss) for arch in archs]
        if phase.teacher == "frozen":
            return students
        return [guide] + [student for student in students if student.arch != space.largest]

    passes = phase.archs_per_step if phase.sampling == "per_pass" else 1
    weight = {"frozen": 1.0, "dynamic": 0.0, "both": phase.frozen_weight}[phase.teacher]
    return Plan(draw, passes, weight)
