"""What the attacks of a training step start from, how many steps they take, and what one leaves to the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from proard.attacks import start_noise_
from proard.config import TrainingAttack
from proard.data import Views, keyed_generator
from proard.space import SearchSpace
from proard.training.plan import Drawn
from proard.training.ranks import Share

LEVELS = 127  # an int8 value of 127 is eps
CHUNK = 1024  # images whose start noise is drawn at once


def steps_at(attack: TrainingAttack, step: int, total_steps: int) -> int:
    """Attack steps of optimizer step number `step`: `num_steps`, or the curriculum's, each for an equal share."""
    if attack.curriculum is None:
        return attack.num_steps
    first = attack.curriculum.first_steps
    return min(first + step * (attack.num_steps - first + 1) // total_steps, attack.num_steps)


def pgd_options(attack: TrainingAttack, *, eps: float, norm: str, num_steps: int) -> dict[str, Any]:
    """Keyword arguments of `pgd` for an attack of `num_steps`, lengthened as its curriculum says."""
    step_size = attack.step_size
    if attack.curriculum is not None and 0 < num_steps < attack.num_steps:
        step_size = max(step_size, attack.curriculum.reach * eps / num_steps)
    return {
        "eps": eps,
        "norm": norm,
        "step_size": step_size,
        "num_steps": num_steps,
        "start": attack.start,
        "start_scale": attack.start_scale,
        "clip_to_ball": attack.clip_to_ball,
    }


def weakest(attack: TrainingAttack, *, eps: float, norm: str) -> dict[str, Any]:
    """Keyword arguments of `pgd` for the attack that a training begins with: its weakest."""
    return pgd_options(attack, eps=eps, norm=norm, num_steps=steps_at(attack, 0, 1))


class Inner:
    """The inner maximisation of one training, step by step.

    Within a step: `begin`, then for each subnet `options` before its attack and `keep` after it, then `commit`.

    Parameters
    ----------
    attack : TrainingAttack
        Steps, start and what is shared.
    eps : float
        Radius in pixel units, in the norm.
    norm : {'linf', 'l2'}
        Norm of the threat model.
    total_steps : int
        Optimizer steps of the training, which a curriculum is spread over.
    carried : CarriedPerturbations, optional
        Where attacks start instead of at noise.
    share : Share, optional
        The part of every batch that is attacked here; by default all of it.
    """

    def __init__(
        self,
        attack: TrainingAttack,
        *,
        eps: float,
        norm: str = "linf",
        total_steps: int = 1,
        carried: CarriedPerturbations | None = None,
        share: Share | None = None,
    ) -> None:
        self.share = share or Share()
        self.attack, self.eps, self.norm, self.total_steps, self.carried = attack, eps, norm, total_steps, carried
        self.num_steps, self.views = attack.num_steps, None
        self.source: Drawn | None = None
        self.shared: Tensor | None = None
        self.found: Tensor | None = None

    def begin(
        self, drawn: list[Drawn], space: SearchSpace, *, step: int, data_pass: int, views: Views | None
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

    def options(self, images: Tensor) -> dict[str, Any]:
        """Keyword arguments of `pgd` for the next subnet: in full, or its own steps from the shared iterate."""
        options = pgd_options(self.attack, eps=self.eps, norm=self.norm, num_steps=self.num_steps)
        if self.shared is not None:
            size = self.attack.step_size if self.attack.own_step_size is None else self.attack.own_step_size
            own = {"num_steps": min(self.attack.own_steps, self.num_steps), "step_size": size}
            return {**options, **own, "initial": self.shared}
        if self.carried is not None:
            return {**options, "initial": images + self.carried.read(self.views[self.share.part], *images.shape[2:])}
        return {**options, "among": (self.share.count, self.share.part)} if self.share.several else options

    def keep(self, subnet: Drawn, images: Tensor, adversarial: Tensor) -> None:
        """Leave what this subnet's attack found to the others of the step and, the first or shared one, to the next."""
        if subnet is self.source:
            self.shared = adversarial.detach().clone()
        if self.carried is not None and self.found is None and (self.source is None or subnet is self.source):
            self.found = adversarial.detach() - images

    def commit(self, failed: Tensor) -> None:
        """End a step: only now does anything that outlives it change, and nothing where `failed`, of shape (), is 1."""
        if self.found is not None:
            found = self.share.whole(self.found)
            before = self.carried.read(self.views, *found.shape[2:])
            self.carried.write(self.views, torch.where(failed > 0, before, found))

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed training needs, by name."""
        return {} if self.carried is None else self.carried.tensors()


class CarriedPerturbations:
    """One perturbation per training image, carried from one pass over the data to the next.

    Parameters
    ----------
    attack : TrainingAttack
        `carry_passes`: they are drawn anew every so many passes, from its `start`.
    padded_shape : tuple of int
        Of the padded images: (n, height, width, channels). A perturbation belongs to the padded image and follows its
        crop and flip; what a view does not show is left as it was.
    eps : float
        Radius in pixel units.
    norm : {'linf', 'l2'}
        Norm of the threat model.
    seed : int
        Seed of the start noise.
    device : torch.device or str
        Where the images are.

    Notes
    -----
    Stored as int8 in steps of eps / 127: n * height * width * channels bytes, 240 MB for CIFAR-10 padded by 4. Rounding
    moves a pixel by at most eps / 254; the attack clips to the ball what it reads.

    References
    ----------
    Zheng et al., Efficient Adversarial Training with Transferable Adversarial Examples, CVPR 2020, arXiv:1912.11969.
    """

    def __init__(
        self,
        attack: TrainingAttack,
        padded_shape: tuple[int, ...],
        *,
        eps: float,
        norm: str,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        assert attack.carry_passes is not None
        self.attack, self.eps, self.norm, self.seed = attack, eps, norm, seed
        self.store = torch.zeros(padded_shape, dtype=torch.int8, device=device)
        self.period = torch.tensor(-1)

    def refresh(self, data_pass: int) -> None:
        """Draw all perturbations anew where this pass begins another `carry_passes`."""
        period = data_pass // self.attack.carry_passes
        if period == int(self.period):
            return
        self.period.fill_(period)
        generator = keyed_generator(self.seed, data_pass, 2)  # 2: another stream than orders (none) and batches (1)
        start = {"eps": self.attack.start_scale * self.eps, "start": self.attack.start, "norm": self.norm}
        for chunk in self.store.split(CHUNK):
            noise = start_noise_(torch.empty(chunk.shape), **start, generator=generator)
            chunk.copy_(self._levels(noise))

    def read(self, views: Views, height: int, width: int) -> Tensor:
        """Perturbations of shape (batch, channels, height, width) of these views, in pixel units."""
        levels = self.store[views.pixels(height, width)]
        return levels.permute(0, 3, 1, 2).to(torch.float32).mul_(self.eps / LEVELS)

    def write(self, views: Views, perturbations: Tensor) -> None:
        """Put the perturbations of these views back where they belong."""
        levels = self._levels(perturbations.permute(0, 2, 3, 1))
        self.store[views.pixels(*levels.shape[1:3])] = levels

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed training needs, by name."""
        return {"perturbations": self.store, "period": self.period}

    def _levels(self, perturbations: Tensor) -> Tensor:
        """Perturbations in steps of eps / 127."""
        return perturbations.mul(LEVELS / self.eps).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)
