"""The measuring attack: PGD with restarts that spends gradients only on images still standing.

A fixed-step attack does not care how old an image is, so a working set of fixed size is refilled from a queue whenever
images fall or finish. Start noise depends on image and restart alone: every arch meets the same noise on the same
images, which makes differences between archs far more precise than their accuracies (paired comparison).
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
    """A network that also computes in another type."""

    def rounded(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """The same network in that type."""


@dataclass(frozen=True)
class Outcome:
    """Which images stood an attack.

    Attributes
    ----------
    robust : Tensor of shape (n,)
        bool: classified correctly, clean and under the attack.
    gradients : int
        Input gradients of one image that the attack took.
    forwards : int
        Passes of one image without a gradient: its last iterate's, and those that confirm a rounded network's mistake.
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
        Images to logits; the network as it is deployed. Where the attack computes in another type, `rounded(dtype)`
        gives the network that it differentiates; an image still falls by the logits of `predict` alone.
    images : Tensor of shape (n, channels, height, width)
        Clean, float32 in [0, 1].
    labels : Tensor of shape (n,)
    correct : Tensor of shape (n,)
        bool; images that are wrong without an attack are lost already.
    attack : Attack
        Objective, steps, step size, restarts.
    eps : float
        Radius in pixel units, in the norm.
    accounting : {'any_iterate', 'last_iterate'}
        Whether an image is lost by any misclassified iterate (AutoAttack's convention, stricter) or by its last one.
    seed : int
        Seed of the start noise, where the attack starts at noise.
    batch_size : int
        Size of the working set.
    norm : {'linf', 'l2'}
        Norm of the threat model.

    Notes
    -----
    The start point counts as an iterate. An image lost in one restart is not attacked again.
    """
    robust, gradients, forwards = correct.clone(), 0, 0
    attacked = predict
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
    """Which images are right at the last iterate of a training's own attack, on cross-entropy; bool of shape (n,).

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
    """Which of the standing images fall, the gradients spent on `attacked`, and the passes through `predict`."""
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
        if not bool(stay.all()):  # no step follows a last iterate: a forward says whether it stands
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
