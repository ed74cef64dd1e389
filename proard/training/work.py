"""What a training will spend, from its plan, before its first step: in forward-equivalents and in MACs per image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from proard.config import Phase
from proard.space import SearchSpace
from proard.training.inner import steps_at
from proard.training.plan import Drawn, Plan, phase_plan

SAMPLES = 256  # steps, evenly spread, that stand for all
ASKED_ONCE = frozenset({"teacher_adv", "teacher_mirrored", "control", "control_adv"})
ASKED_TWICE = frozenset({"teacher_gradient", "teacher_gradient_adv"})  # forward, and backward to the image
OWN_PASSES = frozenset({"clean", "adv", "mirrored", "beyond"})


@dataclass(frozen=True)
class Work:
    """Mean work of a step for one image, every pass counted as the trainer counts it.

    Attributes
    ----------
    forward_equivalents : float
        A forward pass is 1 whatever the size of the network.
    macs : float
        The same passes, each weighted by the multiply-accumulates of its network.
    """

    forward_equivalents: float
    macs: float


def subnet_work(subnet: Drawn, phase: Phase, *, num_steps: int) -> tuple[int, int]:
    """Forward-equivalents of one subnet in one step: its own, and those of the networks that it asks."""
    objective, needs = subnet.objective, subnet.objective.needs
    recorded = phase.attack.bn_mode == "clean_batch" and objective.inner is not None
    own = 0
    if objective.needs_clean or recorded or subnet.guides or objective.inner == "kl_clean":
        own += 3 if objective.needs_clean else 1
    asked = len(needs & ASKED_ONCE) + 2 * len(needs & ASKED_TWICE)
    extra = len(needs & ASKED_TWICE)  # backward through the student's own input gradient
    given = {"clean"}
    if objective.inner is not None:
        own, given = own + 2 * num_steps + 3, {"clean", "adv"}
        asked += 2 * num_steps * (objective.inner == "kl_teacher_adv")
    own += 3 * (len(needs & OWN_PASSES - given) + extra)
    if phase.awp_gamma > 0:
        own += 3 * (len(needs & OWN_PASSES) + extra)
    return own, asked


def step_work(space: SearchSpace, phase: Phase, drawn: list[Drawn], *, num_steps: int, teacher_macs: int) -> Work:
    """Work of one step for one image; `teacher_macs` is the size of whoever teaches."""
    costs = [space.spec(subnet.arch).macs for subnet in drawn]
    read = any(subnet.objective.needs_target or subnet.rivals for subnet in drawn)
    asks_frozen = phase.teacher != "dynamic" and read
    work, macs = float(asks_frozen), float(asks_frozen * teacher_macs)
    crafts = _crafting(phase, drawn, costs)
    for subnet, cost, in_full in zip(drawn, costs, crafts, strict=True):
        steps = num_steps if in_full else min(phase.attack.own_steps, num_steps)
        own, asked = subnet_work(subnet, phase, num_steps=steps)
        scored = 1 + len(subnet.rivals) if subnet.rivals else 0
        work += own + asked + scored
        macs += (own + scored) * cost + asked * teacher_macs  # rivals cost about the same
    return Work(work, macs)


def _crafting(phase: Phase, drawn: list[Drawn], costs: list[int]) -> list[bool]:
    """Which subnets of a step attack in full; the others start from a shared attack."""
    if phase.attack.shared is None:
        return [True] * len(drawn)
    largest = phase.attack.shared == "largest"
    able = [i for i, subnet in enumerate(drawn) if subnet.objective.inner and (largest or not subnet.guides)]
    source = (max if largest else min)(able, key=costs.__getitem__) if able else None
    return [index == source or (subnet.guides and not largest) for index, subnet in enumerate(drawn)]


def planned_work(space: SearchSpace, phase: Phase, *, images: int, seed: int, teacher_macs: int = 0) -> Work:
    """Mean work of a phase's steps.

    Parameters
    ----------
    space : SearchSpace
        The space.
    phase : Phase
        Its `epochs` say over which passes the steps are spread.
    images : int
        Training images.
    seed : int
        Seed of the plan's draws.
    teacher_macs : int
        Multiply-accumulates of the teacher for one image.

    Notes
    -----
    Kept teacher logits and the warm-up of AWP are left out of account: with them less is spent than is said here.
    """
    plan: Plan = phase_plan(space, phase)
    per_pass = max(images // phase.batch_size, 1)
    total = max(round(phase.epochs * per_pass * plan.passes_per_epoch), 1)
    steps = np.unique(np.linspace(0, total - 1, min(SAMPLES, total)).round().astype(int)).tolist()
    works = [
        step_work(
            space,
            phase,
            plan.draw(seed, step, step // per_pass),
            num_steps=steps_at(phase.attack, step, total),
            teacher_macs=teacher_macs,
        )
        for step in steps
    ]
    return Work(*(float(np.mean([getattr(work, name) for work in works])) for name in ("forward_equivalents", "macs")))


def within_budget(space: SearchSpace, phase: Phase, *, images: int, seed: int) -> Phase:
    """The phase with `epochs` and `warmup_epochs` stretched so that it spends its `forward_equivalents`.

    Without that key it is the phase as it is. What is spent differs from the budget by less than one step where every
    step costs the same, and by the scatter of the steps otherwise.
    """
    if phase.forward_equivalents is None:
        return phase
    work = planned_work(space, phase, images=images, seed=seed).forward_equivalents
    per_pass = max(images // phase.batch_size, 1)
    passes = phase.archs_per_step if phase.sampling == "per_pass" else 1
    steps = max(round(phase.forward_equivalents / (work * min(phase.batch_size, images))), 1)
    epochs = steps / (per_pass * passes)
    stretched = {"epochs": epochs, "warmup_epochs": phase.warmup_epochs * epochs / phase.epochs}
    return phase.model_copy(update=stretched)
