"""The measuring attack: PGD with restarts that computes gradients only for images not yet misclassified.

Every step of the attack is the same, so images at different steps can share a batch. A working set of fixed size is
refilled from a queue whenever an image is misclassified or has had all its steps. Start noise depends on image and
restart alone. Every arch is attacked from the same noise on the same images, so differences between archs are far more
precise than their accuracies (paired comparison).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from proard.attacks import ascend_, clipper, differentiate, pgd, start_noise_
from proard.config import Attack
from proard.data import keyed_generator
from proard.losses import CrossEntropy, InnerObjective, Margin

ATTACK_LOSSES: dict[str, Callable[[Tensor], InnerObjective]] = {"ce": CrossEntropy, "margin": Margin}


@runtime_checkable
class Rounds(Protocol):
    """A network that can also compute in another floating-point type."""

    def rounded(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Return the same network in that type."""


@runtime_checkable
class Deployed(Protocol):
    """A network in a runtime, which gives logits but no gradient; `attacked` is differentiated in its place."""

    attacked: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of the runtime."""


@dataclass(frozen=True)
class Outcome:
    """Result of an attack on a set of images.

    Attributes
    ----------
    robust : Tensor of shape (n,)
        bool: classified correctly, clean and under the attack.
    gradients : int
        Number of input gradients that the attack computed, each of one image.
    forwards : int
        Number of forward passes without a gradient, each of one image: of last iterates, and of images that a rounded
        network misclassified, to confirm the mistake.
    """

    robust: Tensor
    gradients: int
    forwards: int


@torch.no_grad()
def clean_correct(predict: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, *, batch_size: int) -> Tensor:
    """Which clean images are classified correctly; bool of shape (n,)."""
    parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return torch.cat([predict(batch).argmax(1) == truth for batch, truth in parts])


def attack_images(
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    correct: Tensor,
    *,
    attack: Attack,
    eps: float,
    accounting: str,
    seed: int,
    batch_size: int,
    norm: str = "linf",
) -> Outcome:
    """Attack every correctly classified image.

    Parameters
    ----------
    predict : callable
        Images to logits; the network as it is deployed. If the attack computes in another type, `rounded(dtype)`
        gives the network that it differentiates, and for a `Deployed` network `attacked` is that. An image counts as
        misclassified only by the logits of `predict`.
    images : Tensor of shape (n, channels, height, width)
        Clean, float32 in [0, 1].
    labels : Tensor of shape (n,)
    correct : Tensor of shape (n,)
        bool; images that are misclassified without an attack are not attacked.
    attack : Attack
        Objective, steps, step size, restarts.
    eps : float
        Radius in pixel units, in the norm.
    accounting : {'any_iterate', 'last_iterate'}
        Whether any misclassified iterate counts (AutoAttack's convention, stricter) or only the last one.
    seed : int
        Seed of the start noise, if the attack starts at noise.
    batch_size : int
        Size of the working set.
    norm : {'linf', 'l2'}
        Norm of the threat model.

    Notes
    -----
    The start point counts as an iterate. An image misclassified in one restart is not attacked again.
    """
    robust, gradients, forwards = correct.clone(), 0, 0
    attacked = predict.attacked if isinstance(predict, Deployed) else predict
    if attack.dtype != "float32":
        assert isinstance(predict, Rounds)
        attacked = predict.rounded(getattr(torch, attack.dtype))
    restarted = partial(_one_restart, attacked=attacked, attack=attack, accounting=accounting, batch_size=batch_size)
    for restart in range(attack.restarts):
        generator = keyed_generator(seed, restart)
        noise = torch.empty(images.shape)
        start_noise_(noise, eps=eps, start=attack.start, norm=norm, generator=generator)
        noise = noise.to(images.device)
        lost, spent, last = restarted(predict, images, labels, robust, noise, ball={"eps": eps, "norm": norm})
        robust &= ~lost
        gradients, forwards = gradients + spent, forwards + last
    return Outcome(robust.cpu(), gradients, forwards)


def stands_training_attack(
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    seed: int,
    attack: Mapping[str, Any],
) -> Tensor:
    """Which images are correct at the last iterate of a training's own attack on cross-entropy; bool of shape (n,).

    `attack` holds keyword arguments of `pgd`; arrays and `predict` as in `attack_images`.
    """
    generator, right = keyed_generator(seed, 0), []
    for batch, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        adv = pgd(predict, CrossEntropy(truth), batch, **attack, generator=generator)
        with torch.no_grad():
            right.append(predict(adv).argmax(1) == truth)
    return torch.cat(right)


def _one_restart(
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    standing: Tensor,
    noise: Tensor,
    *,
    attacked: Callable[[Tensor], Tensor],
    attack: Attack,
    ball: Mapping[str, Any],
    accounting: str,
    batch_size: int,
) -> tuple[Tensor, int, int]:
    """Newly misclassified images among `standing`, number of gradients of `attacked`, number of passes of `predict`."""
    lost, spent, last = torch.zeros_like(standing), 0, 0
    gradient_at = differentiate(attacked)
    queue = standing.nonzero()[:, 0]
    index = queue[:0]
    age, adv = torch.zeros_like(index), images[:0]
    while len(queue) or len(index):
        room = batch_size - len(index)
        if room > 0 and len(queue):
            fresh, queue = queue[:room], queue[room:]
            start = torch.clamp(images[fresh] + noise[fresh], 0, 1)
            index = torch.cat([index, fresh])
            age = torch.cat([age, torch.zeros_like(fresh)])
            adv = torch.cat([adv, start]).contiguous(memory_format=torch.channels_last)
        stay = age < attack.num_steps
        if not bool(stay.all()):  # no step follows a last iterate: a forward pass without gradient is enough
            ended = index[~stay]
            with torch.no_grad():
                lost[ended] = predict(adv[~stay]).argmax(1) != labels[ended]
            last += len(ended)
            index, age, adv = index[stay], age[stay], adv[stay]
            continue
        truth = labels[index]
        logits, gradient = gradient_at(ATTACK_LOSSES[attack.objective](truth), adv)
        spent += len(index)
        stay = logits.argmax(1) == truth
        if accounting == "any_iterate" and attacked is not predict and not bool(stay.all()):
            doubtful = (~stay).nonzero()[:, 0]
            with torch.no_grad():
                stay[doubtful] = predict(adv[doubtful]).argmax(1) == truth[doubtful]
            last += len(doubtful)
        adv = clipper(images[index], **ball)(ascend_(adv, gradient, attack.step_size, ball["norm"]))
        age = age + 1
        if accounting == "any_iterate" and not bool(stay.all()):
            lost[index[~stay]] = True
            index, age, adv = index[stay], age[stay], adv[stay]
    return lost, spent, last
