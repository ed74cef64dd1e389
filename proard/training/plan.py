"""Which subnets a step trains and on which objective: sampling strategies and teacher modes as plans."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from proard.config import Phase, TrainingSettings
from proard.config.losses import Igdm, Kdiga, Loss
from proard.losses import OBJECTIVES, Memory, Objective, scaled, with_igdm, with_kdiga
from proard.space import Arch, NetSpace, SearchSpace
from proard.training.attentive import at_one_cost

RIVALS = 3  # archs at one cost that compete for a place under `pareto`
OPENED = ("width", "kernel", "depth", "expand")  # `progressive` opens dims in this order, as ProARD's phases do


@dataclass(frozen=True)
class Drawn:
    """One subnet of a step with its objective; `guides` marks the dynamic teacher, the target of the others.

    `rivals` compete with `arch` for its place: the one with the highest loss on the batch is trained.
    """

    arch: Any
    objective: Objective
    options: dict[str, Any]
    guides: bool = False
    rivals: tuple[Arch, ...] = ()


@dataclass(frozen=True)
class Plan:
    """`draw(seed, step, data_pass)` gives a step's subnets; an epoch makes `passes_per_epoch` passes over the data.

    `frozen_weight` is the frozen teacher's share of the target: 1 alone, 0 for the dynamic teacher alone.
    `memory(classes)` is what the loss remembers before the first step, where it does. `reads_target` says whether any
    step reads the frozen teacher's logits at clean images; `loss` is the name of the loss of the subnets. Where a plan
    `opens` choices with the training, its `data_pass` is the pass of the planned schedule, also in a shortened one.
    """

    draw: Callable[[int, int, int], list[Drawn]]
    passes_per_epoch: int = 1
    frozen_weight: float = 1.0
    memory: Callable[[int], Memory] | None = None
    reads_target: bool = True
    loss: str = ""
    opens: bool = False


def bind(loss: Loss, settings: TrainingSettings) -> tuple[Objective, dict[str, Any]]:
    """The objective of a loss with its options, under the attack's own inner objective where one is set."""
    objective, inner = OBJECTIVES[loss.name], settings.attack.objective
    fits = objective.inner is not None and (not inner.startswith("kl_teacher") or objective.needs_teacher)
    if inner != "loss" and fits:
        objective = replace(objective, inner=inner)
    options = loss.options
    if objective.unweighted is not None:
        objective = replace(objective, needs=objective.needs - objective.unweighted(**options))
    return objective, options


def aligned_and_scaled(objective: Objective, alignment: Igdm | Kdiga | None, *, scale: float) -> Objective:
    """An objective with the input-gradient matching of its training, times its scale."""
    if isinstance(alignment, Igdm):
        objective = with_igdm(objective, weight=alignment.weight)
    elif alignment is not None:
        objective = with_kdiga(objective, weight=alignment.weight, norm=alignment.norm, at=alignment.at)
    return objective if scale == 1 else scaled(objective, scale=scale)


def single_plan(arch: Any, loss: Loss, settings: TrainingSettings) -> Plan:
    """Train one network alone: teacher, control, or a student of a frozen teacher."""
    found, options = bind(loss, settings)
    found = aligned_and_scaled(found, settings.alignment, scale=loss.scale)
    drawn = [Drawn(arch, found, options)]
    memory = None if found.memory is None else partial(found.memory, **options)
    return Plan(lambda seed, step, data_pass: drawn, memory=memory, reads_target=found.needs_target, loss=loss.name)


def phase_plan(space: SearchSpace, phase: Phase) -> Plan:
    """Sampling strategy and teacher mode of a phase.

    `per_pass` draws one subnet for a whole pass over the data and makes `archs_per_step` passes an epoch (the released
    ProARD code); `uniform` draws `archs_per_step` subnets in each step; `sandwich` takes the largest and the smallest
    of the open choices and draws the rest (Yu and Huang 2019, arXiv:1903.05134). `progressive` draws as `uniform` does
    among choices that open with the training. `pareto` is the sandwich whose drawn subnets win a comparison at one cost
    (AttentiveNAS, Wang et al. 2021, arXiv:2011.09011). Where there is an `arch_pool`, `uniform` and `sandwich` draw
    from as many subnets, other ones in every pass over the data. A dynamic teacher trains in every step on its own
    objective.

    Raises
    ------
    ValueError
        The phase opens a choice that the space does not have.
    """
    among = space.open_choices(width=phase.width, depth=phase.depth, expand=phase.expand, kernel=phase.kernel)
    objective, options = bind(phase.loss, phase)
    objective = aligned_and_scaled(objective, phase.alignment, scale=phase.loss.scale)
    own, own_options = bind(phase.teacher_objective, phase)
    own = aligned_and_scaled(own, None, scale=phase.teacher_objective.scale)
    guide = Drawn(space.largest, own, own_options, guides=True)
    first = [space.arch([options[0] for options in among]), space.arch([options[-1] for options in among])]

    def draw(seed: int, step: int, data_pass: int) -> list[Drawn]:
        key, count = (data_pass, 1) if phase.sampling == "per_pass" else (step, phase.archs_per_step)
        rng = np.random.default_rng([seed, key])
        fixed = first[::-1][:count] if phase.sampling in ("sandwich", "pareto") else []
        opened = opened_choices(space, phase, data_pass) if phase.sampling == "progressive" else among
        if phase.sampling == "pareto":
            rivals = [at_one_cost(space, among, RIVALS, rng) for _ in range(count - len(fixed))]
        elif phase.arch_pool is not None:
            pool = space.sample(phase.arch_pool, np.random.default_rng([seed, data_pass, phase.arch_pool]), among=among)
            rivals = [[space.arch(pool[row])] for row in rng.choice(len(pool), count - len(fixed), replace=False)]
        else:
            rivals = [[space.arch(row)] for row in space.sample(count - len(fixed), rng, among=opened)]
        if phase.teacher != "frozen":  # the guide is trained anyway
            rivals = [kept for group in rivals if (kept := [arch for arch in group if arch != space.largest])]
            fixed = [arch for arch in fixed if arch != space.largest]
        students = [Drawn(arch, objective, options) for arch in fixed]
        students += [Drawn(group[0], objective, options, rivals=tuple(group[1:])) for group in rivals]
        return students if phase.teacher == "frozen" else [guide, *students]

    passes = phase.archs_per_step if phase.sampling == "per_pass" else 1
    weight = {"frozen": 1.0, "dynamic": 0.0, "both": phase.frozen_weight}[phase.teacher]
    memory = None if objective.memory is None else partial(objective.memory, **options)
    reads_target = objective.needs_target or phase.sampling == "pareto"
    opens = phase.sampling == "progressive"
    return Plan(draw, passes, weight, memory, reads_target=reads_target, loss=phase.loss.name, opens=opens)


@torch.no_grad()
def choose_winners(drawn: list[Drawn], score: Callable[[Arch], Tensor]) -> list[Drawn]:
    """Replace the candidates of each place by the winner of their comparison.

    Parameters
    ----------
    drawn : list of Drawn
        A step's subnets.
    score : callable
        A subnet's loss on the batch, of shape ().

    Returns
    -------
    list of Drawn
        Without rivals; the same list where there were none.
    """
    if not any(place.rivals for place in drawn):
        return drawn
    chosen = []
    for place in drawn:
        if place.rivals:
            archs = [place.arch, *place.rivals]
            losses = torch.stack([score(arch) for arch in archs])
            place = replace(place, arch=archs[int(losses.argmax())], rivals=())
        chosen.append(place)
    return chosen


def pace(space: NetSpace, arch: Arch, *, progress: float, decay: float) -> float:
    """Factor of a subnet's gradients at a share of the training: its learning rate relative to the largest subnet's.

    Returns
    -------
    float
        (1 - progress)^(decay * c), where c = log(M / m(arch)) / log(M / m) for the MACs m(arch), the smallest m and the
        largest M: 1 throughout for the largest subnet, or at decay 0.

    Notes
    -----
    The idea is that of Jeon et al.: small subnets converge early, and at one learning rate for all they go on pulling
    the shared weights from the large ones, so theirs decays faster. The paper changes the decay of the schedule of a
    step that trains one subnet; a step here may train several, so their gradients are scaled instead, which is the same
    for SGD up to momentum and weight decay. This exponent, not the paper's, is what is computed here.

    References
    ----------
    Jeon et al., Subnet-Aware Dynamic Supernet Training for Neural Architecture Search, CVPR 2025, arXiv:2503.10740.
    """
    smallest, largest = (space.spec(end).macs for end in (space.smallest, space.largest))
    if decay == 0 or smallest == largest:
        return 1.0
    simplicity = math.log(largest / space.spec(arch).macs) / math.log(largest / smallest)
    return max(1 - progress, 1e-6) ** (decay * simplicity)


def opened_choices(space: SearchSpace, phase: Phase, data_pass: int) -> list[np.ndarray]:
    """What `progressive` sampling has opened by a pass: one dim more with each equal part of the epochs.

    Dims in which the phase leaves no choice have no part.
    """
    wanted = {dim: getattr(phase, dim) for dim in space.options}
    open_ended = {dim: values or tuple(set().union(*space.options[dim])) for dim, values in wanted.items()}
    dims = [dim for dim in OPENED if len(open_ended.get(dim, ())) > 1]
    begun = int(len(dims) * data_pass / phase.epochs)
    closed = {dim: (max(open_ended[dim]),) for dim in dims[begun + 1 :]}
    return space.open_choices(**(wanted | closed))
