"""One perturbation per training image, carried from one pass over the data to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from proard.attacks import start_noise_
from proard.config import TrainingAttack
from proard.data import Views, keyed_generator
from proard.nets.modules import present

LEVELS = 127  # an int8 value of 127 is eps
CHUNK = 1024  # images whose start noise is drawn at once


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
        self.carry_passes = present(attack.carry_passes)
        self.attack, self.eps, self.norm, self.seed = attack, eps, norm, seed
        self.store = torch.zeros(padded_shape, dtype=torch.int8, device=device)
        self.period = torch.tensor(-1)

    def refresh(self, data_pass: int) -> None:
        """Draw all perturbations anew where this pass begins another `carry_passes`."""
        period = data_pass // self.carry_passes
        if period == int(self.period):
            return
        self.period.fill_(period)
        generator = keyed_generator(self.seed, data_pass, 2)  # 2: another stream than orders (none) and batches (1)
        for chunk in self.store.split(CHUNK):
            noise = torch.empty(chunk.shape)
            start_noise_(noise, eps=self.eps, start=self.attack.start, norm=self.norm, generator=generator)
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
