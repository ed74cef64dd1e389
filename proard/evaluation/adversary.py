"""The measuring attack: PGD with restarts or targets that computes gradients only for images not yet misclassified.

A turn is one restart or one target: all steps from one start. Steps are computed image by image, so images at
different steps and turns share a batch. A working set of fixed size is refilled from a queue whenever an image is
misclassified or has had all its steps; in the latter case its next turn joins the queue. Start noise depends on image
and turn alone. Every arch is attacked from the same noise on the same images, so differences between archs are far more
precise than their accuracies (paired comparison).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from proard.attacks import ascend_, clipper, differentiate, pgd, start_noise_
from proard.config import Attack
from proard.data import keyed_generator
from proard.losses import CrossEntropy, InnerObjective, Margin, TargetedMargin

ATTACK_LOSSES: dict[str, Callable[[Tensor], InnerObjective]] = {"ce": CrossEntropy, "margin": Margin}
Predict = Callable[[Tensor], Tensor]


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
        Number of forward passes without a gradient, each of one image: of last iterates, of images that a rounded
        or approximate network misclassified, to confirm the mistake, and of clean images, to rank the targets.
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
        misclassified only by the logits of `predict`: they confirm each mistake of that other network, and of a
        network whose gradient is `approximate`, as by Winograd's method (`proard.kernels.winograd`).
    images : Tensor of shape (n, channels, height, width)
        Clean, float32 in [0, 1].
    labels : Tensor of shape (n,)
    correct : Tensor of shape (n,)
        bool; the other images (misclassified without an attack, or by an earlier one) are not attacked.
    attack : Attack
        Objective, steps, step lengths, restarts, targets.
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
    The start point counts as an iterate. An image misclassified in one restart, or towards one target, is not attacked
    again. Targets are the wrong classes of highest clean logit, highest first, at most all wrong classes; every restart
    attacks all of them.

    References
    ----------
    Targets in turn: Gowal et al., An Alternative Surrogate Loss for PGD-based Adversarial Testing, 2019,
    arXiv:1910.09338.
    """
    attacked, forwards, targets = predict.attacked if isinstance(predict, Deployed) else predict, 0, None
    if attack.dtype != "float32":
        assert isinstance(predict, Rounds)
        attacked = predict.rounded(getattr(torch, attack.dtype))
    if attack.num_targets is not None:
        targets = strongest_wrong(predict, images, labels, correct, attack.num_targets, batch_size=batch_size)
        forwards = int(correct.sum())
    turns = attack.restarts * (1 if targets is None else targets.shape[1])
    confirms = attacked is not predict or getattr(predict, "approximate", False)
    noise, gradient_at = _Noise(images, attack, eps, norm, seed), differentiate(attacked)
    step_of = _step_sizes(attack.step_lengths(eps), images)
    robust, gradients = correct.clone(), 0
    waiting = correct.nonzero()[:, 0]
    queue = torch.stack([waiting, torch.zeros_like(waiting)], 1)  # (m, 2): image, turn
    work, age, adv = queue[:0], waiting[:0], images[:0]
    while len(queue) or len(work):
        room = batch_size - len(work)
        if room > 0 and len(queue):
            fresh, queue = queue[:room], queue[room:]
            start = torch.clamp(images[fresh[:, 0]] + noise(fresh), 0, 1)
            work, age = torch.cat([work, fresh]), torch.cat([age, torch.zeros_like(fresh[:, 0])])
            adv = torch.cat([adv, start]).contiguous(memory_format=torch.channels_last)
        stay = age < attack.num_steps
        if not bool(stay.all()):  # no step follows a last iterate: a forward pass without gradient is enough
            ended = work[~stay]
            with torch.no_grad():
                right = predict(adv[~stay]).argmax(1) == labels[ended[:, 0]]
            forwards += len(ended)
            robust[ended[~right, 0]] = False
            again = ended[right & (ended[:, 1] + 1 < turns)]
            queue = torch.cat([queue, again + again.new_tensor([0, 1])])
            work, age, adv = work[stay], age[stay], adv[stay]
            continue
        index, turn = work.unbind(1)
        truth = labels[index]
        if targets is None:
            objective = ATTACK_LOSSES[attack.objective](truth)
        else:
            objective = TargetedMargin(truth, targets[index, turn % targets.shape[1]])
        logits, gradient = gradient_at(objective, adv)
        gradients += len(index)
        stay = logits.argmax(1) == truth
        if accounting == "any_iterate" and confirms and not bool(stay.all()):
            doubtful = (~stay).nonzero()[:, 0]
            with torch.no_grad():
                stay[doubtful] = predict(adv[doubtful]).argmax(1) == truth[doubtful]
            forwards += len(doubtful)
        adv = clipper(images[index], eps=eps, norm=norm)(ascend_(adv, gradient, step_of(age), norm))
        age = age + 1
        if accounting == "any_iterate" and not bool(stay.all()):
            robust[index[~stay]] = False
            work, age, adv = work[stay], age[stay], adv[stay]
    return Outcome(robust.cpu(), gradients, forwards)


@torch.no_grad()
def strongest_wrong(
    predict: Predict, images: Tensor, labels: Tensor, chosen: Tensor, number: int, *, batch_size: int
) -> Tensor:
    """The wrong classes of highest clean logit, highest first.

    Returns
    -------
    Tensor of shape (n, number)
        Class indices; fewer columns where there are fewer wrong classes. Rows of images not in `chosen` are zero.
    """
    parts = chosen.nonzero()[:, 0].split(batch_size)
    ranked = [predict(images[part]).scatter(1, labels[part, None], -torch.inf) for part in parts if len(part)]
    if not ranked:
        return labels.new_zeros((len(labels), 1))
    logits = torch.cat(ranked)
    found = logits.topk(min(number, logits.shape[1] - 1)).indices
    targets = found.new_zeros((len(labels), found.shape[1]))
    targets[chosen] = found
    return targets


class _Noise:
    """Start noise of all images, drawn for one turn at a time and forgotten when no image begins that turn any more.

    Targets have noise of their own, so that a targeted attack does not begin where the attack before it failed.
    """

    def __init__(self, images: Tensor, attack: Attack, eps: float, norm: str, seed: int) -> None:
        self.images, self.seed = images, seed
        self.kind = () if attack.num_targets is None else (1,)
        self.how: dict[str, Any] = {"eps": eps, "norm": norm, "start": attack.start}
        self.drawn: dict[int, Tensor] = {}

    def __call__(self, work: Tensor) -> Tensor:
        """Noise of the images and turns in `work`, of shape (m, 2), whose turns do not decrease."""
        turns = work[:, 1].unique().tolist()
        self.drawn = {turn: noise for turn, noise in self.drawn.items() if turn >= turns[0]}
        for turn in turns:
            if turn not in self.drawn:
                generator = keyed_generator(self.seed, turn, *self.kind)
                noise = start_noise_(torch.empty(self.images.shape), generator=generator, **self.how)
                self.drawn[turn] = noise.to(self.images.device)
        return torch.cat([self.drawn[turn][work[work[:, 1] == turn, 0]] for turn in turns])


def _step_sizes(lengths: Sequence[float], images: Tensor) -> Callable[[Tensor], float | Tensor]:
    """By the number of steps done, of shape (m,): the length of the next step; a float if all are equal."""
    if len(set(lengths)) == 1:
        return lambda age: lengths[0]
    schedule = torch.tensor(lengths, dtype=images.dtype, device=images.device)[:, None, None, None]
    return lambda age: schedule[age]


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
