"""The attacks of a training step: start, number of steps, attacked network, and what later attacks start from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from proard.attacks import pgd, start_point, take_steps
from proard.config import Threat, TrainingAttack
from proard.data import Views
from proard.kernels import CapturedSteps
from proard.losses import INNER_OBJECTIVES, Batch, Objective
from proard.nets.modules import present
from proard.nets.trainee import Statistics, View
from proard.space import NetSpace
from proard.training.carried import CarriedPerturbations
from proard.training.counted import Counted, Forward, StepTally
from proard.training.plan import Drawn
from proard.training.ranks import BatchPart
from proard.training.teachers import Guidance

START = {"n_fgsm": {"start": "uniform", "start_scale": 2.0, "clip_to_ball": False}}  # others are starts of `pgd`
CROSSING = 1.25  # length of all steps together, in eps, of an attack with fewer steps than at the end of the training


def steps_at(attack: TrainingAttack, step: float, total_steps: int) -> int:
    """Attack steps of optimizer step number `step`: `num_steps`, or a number that grows to it."""
    if attack.first_steps is None:
        return attack.num_steps
    first = attack.first_steps
    return min(first + int(step * (attack.num_steps - first + 1) // total_steps), attack.num_steps)


def pgd_options(attack: TrainingAttack, *, eps: float, norm: str, num_steps: int) -> dict[str, Any]:
    """Keyword arguments of `pgd` for an attack of `num_steps`, longer steps where they are fewer."""
    step_size = attack.step_size
    if attack.first_steps is not None and 0 < num_steps < attack.num_steps:
        step_size = max(step_size, CROSSING * eps / num_steps)
    return {
        "eps": eps,
        "norm": norm,
        "step_size": step_size,
        "num_steps": num_steps,
        **START.get(attack.start, {"start": attack.start}),
    }


def weakest(attack: TrainingAttack, *, eps: float, norm: str) -> dict[str, Any]:
    """Keyword arguments of `pgd` for the attack that a training begins with: its weakest."""
    return pgd_options(attack, eps=eps, norm=norm, num_steps=steps_at(attack, 0, 1))


class Attacker:
    """The attacks of a training step: where they start, how many steps they take, on which network.

    Within a step: `begin`, then `craft` for each subnet in the order that `begin` returned, then `commit`.

    Parameters
    ----------
    attack : TrainingAttack
        Steps, start and what is shared.
    tally : StepTally
        Receives the passes of every attack.
    threat : Threat
        Norm and radius, in pixel units.
    total_steps : int
        Optimizer steps that the training plans; `begin` is given the position of a step among them.
    carried : CarriedPerturbations, optional
        Where attacks start instead of at noise.
    part : BatchPart, optional
        The part of every batch that is attacked here; by default all of it.
    dtype : torch.dtype
        Type in which a folded network is attacked.
    batch_size : int, optional
        Images of a full batch of this part: their attack steps may be captured as CUDA graphs.
    recurring : int
        Number of subnets that recur within a pass over the data: so many graphs are kept, at least 16.
    search : callable
        The attack itself, with the arguments of `pgd`.
    """

    def __init__(
        self,
        attack: TrainingAttack,
        tally: StepTally,
        *,
        threat: Threat,
        total_steps: int = 1,
        carried: CarriedPerturbations | None = None,
        part: BatchPart | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int | None = None,
        recurring: int = 0,
        search: Callable[..., Tensor] = pgd,
    ) -> None:
        self.attack, self.tally, self.threat, self.total_steps = attack, tally, threat, total_steps
        self.carried, self.part, self.dtype, self.search = carried, part or BatchPart(), dtype, search
        self.take_steps: Callable[..., Tensor] = take_steps
        if batch_size is not None:
            self.take_steps = CapturedSteps(take_steps, batch_size=batch_size, capacity=max(recurring, 16))
        self.num_steps = attack.num_steps
        self.views: Views | None = None
        self.source: Drawn | None = None
        self.shared: Tensor | None = None
        self.found: Tensor | None = None

    def begin(
        self, drawn: list[Drawn], space: NetSpace, *, step: float, data_pass: int, views: Views | None
    ) -> list[Drawn]:
        """Begin a step: its subnets in the order in which they attack.

        Where the attack is shared, a dynamic teacher stays first, and the subnet that crafts follows; all others keep
        their order.
        """
        self.num_steps, self.views = steps_at(self.attack, step, self.total_steps), views
        self.source, self.shared, self.found = None, None, None
        if self.carried is not None:
            self.carried.refresh(data_pass)
        if self.attack.shared is None:
            return drawn
        largest = self.attack.shared == "largest"
        able = [subnet for subnet in drawn if subnet.objective.inner and (largest or not subnet.guides)]
        if not able:
            return drawn
        self.source = (max if largest else min)(able, key=lambda subnet: space.spec(subnet.arch).macs)
        return sorted(drawn, key=lambda subnet: (not subnet.guides, subnet is not self.source))

    def needs_statistics(self, objective: Objective) -> bool:
        """Whether an attack needs batch norm's statistics of the clean batch."""
        on_student = self.attack.crafted_on == "student"
        return on_student and objective.inner is not None and self.attack.bn_mode == "clean_batch"

    def craft(
        self,
        student: Counted[View],
        subnet: Drawn,
        known: Batch,
        statistics: Statistics | None,
        guidance: Guidance,
        generator: torch.Generator,
        *,
        initial: Tensor | None = None,
        take: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Adversarial images for one subnet.

        Parameters
        ----------
        student : Counted
            The subnet's view.
        subnet : Drawn
            Its objective says what the attack ascends.
        known : Batch
            Clean images, labels and the clean logits that the attack may need, without graph.
        statistics : dict, optional
            Batch norm's statistics of the clean batch, where `needs_statistics`.
        guidance : Guidance
            The teacher, where the attack differentiates it.
        generator : torch.Generator
            Source of the start noise.
        initial : Tensor of the shape of the images, optional
            What `start` gave, in place of noise.
        take : callable, optional
            Takes the attack's steps; by default they may be captured.

        Returns
        -------
        Tensor of the shape of the images
            Without gradient.
        """
        images, view = known.images, student.net
        options = self.options(images) | ({} if initial is None else {"initial": initial})
        attacked: Counted[Any] = student
        predict: Forward
        if self.attack.crafted_on == "teacher":
            assert isinstance(guidance.teacher, Counted)
            attacked, predict = guidance.teacher, guidance.teacher.net
        elif self.attack.bn_mode == "batch":
            predict = partial(view, frozen=True)
        else:
            predict = view.folded(view.running_statistics() if statistics is None else statistics, dtype=self.dtype)
        if subnet.objective.inner == "kl_teacher_adv":  # the teacher counts its own passes
            predict = side_by_side(predict, present(guidance.teacher))
        inner = INNER_OBJECTIVES[present(subnet.objective.inner)](known)
        steps = take or self.take_steps
        adversarial = self.search(predict, inner, images, **options, generator=generator, steps=steps)
        attacked.count(2 * options["num_steps"])  # a replayed CUDA graph makes no calls
        self.tally.gradients += options["num_steps"]
        self._keep(subnet, images, adversarial)
        return adversarial

    def start(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Where an attack in full starts: what `craft` would draw."""
        options = self.options(images)
        names = ("eps", "norm", "start", "clip_to_ball")
        return start_point(
            images,
            generator=generator,
            scale=options.get("start_scale", 1.0),
            **{name: options[name] for name in names if name in options},
        )

    def options(self, images: Tensor) -> dict[str, Any]:
        """Keyword arguments of `pgd` for the next subnet: in full, or its own steps from the shared iterate."""
        options = pgd_options(self.attack, eps=self.threat.eps, norm=self.threat.norm, num_steps=self.num_steps)
        if self.shared is not None:
            size = self.attack.step_size if self.attack.own_step_size is None else self.attack.own_step_size
            own = {"num_steps": min(self.attack.own_steps, self.num_steps), "step_size": size}
            return {**options, **own, "initial": self.shared}
        if self.carried is not None:
            return {
                **options,
                "initial": images + self.carried.read(present(self.views)[self.part.rows], *images.shape[2:]),
            }
        return {**options, "among": (self.part.count, self.part.rows)} if self.part.several else options

    def commit(self, failed: Tensor) -> None:
        """End a step: store the perturbations for the next pass, unless `failed`, of shape (), is 1."""
        if self.carried is not None and self.found is not None:
            found, views = self.part.whole(self.found), present(self.views)
            before = self.carried.read(views, *found.shape[2:])
            self.carried.write(views, torch.where(failed > 0, before, found))

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed training needs, by name."""
        return {} if self.carried is None else self.carried.tensors()

    def _keep(self, subnet: Drawn, images: Tensor, adversarial: Tensor) -> None:
        """Keep what this attack found for the others of the step and, of the first or shared one, for the next pass."""
        if subnet is self.source:
            self.shared = adversarial.detach().clone()
        if self.carried is not None and self.found is None and (self.source is None or subnet is self.source):
            self.found = adversarial.detach() - images


def side_by_side(student: Forward, teacher: Forward) -> Forward:
    """Logits of both networks for the same images, (batch, 2 * classes): an attack's gradient passes through both."""
    return lambda images: torch.cat([student(images), teacher(images)], 1)
