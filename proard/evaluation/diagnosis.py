"""How far a student's loss can differ from its teacher's under attack, and which term allows it, for each image.

For every perturbation d of the ball, with l the cross-entropy and g its input gradient at x,

    |l_S(x+d) - l_T(x+d)|  <=  |l_S(x) - l_T(x)|  +  eps * ||g_S - g_T||_dual  +  E_S  +  E_T,

where E = max_d |l(x+d) - l(x) - d'g| is the local linearity measure. The deployed networks are used to search for
points. `measure_bound` then computes every term at all points, in the floating-point type of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from proard.attacks import ascend_, ball_noise_, clipper, differentiate
from proard.losses import CrossEntropy

Predict = Callable[[Tensor], Tensor]
Field = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images to a value per image, of shape (batch,), and its gradient with respect to the images."""

DUAL = {"linf": 1, "l2": 2}
REACH = 2.5
ATTACKS = ("student", "teacher", "difference")


def loss_field(predict: Predict, labels: Tensor) -> Field:
    """Cross-entropy of a network as a function of the images."""
    gradient_at, objective = differentiate(predict), CrossEntropy(labels)

    def field(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, gradient = gradient_at(objective, images)
        return objective(logits), gradient

    return field


def difference_field(first: Field, second: Field) -> Field:
    """Absolute difference of two fields."""

    def field(images: Tensor) -> tuple[Tensor, Tensor]:
        (value, gradient), (other, other_gradient) = first(images), second(images)
        sign = torch.sign(value - other)
        return (value - other).abs(), sign[:, None, None, None] * (gradient - other_gradient)

    return field


def linearity_field(loss: Field, images: Tensor) -> Field:
    """Absolute error of a field's linearisation at `images`: |l(x') - l(x) - (x' - x)'g(x)|."""
    value, gradient = loss(images)

    def linear(adv: Tensor) -> tuple[Tensor, Tensor]:
        return value + ((adv - images) * gradient).sum((1, 2, 3)), gradient

    return difference_field(loss, linear)


def highest_point(
    field: Field,
    images: Tensor,
    *,
    eps: float,
    norm: str,
    num_steps: int,
    generators: Sequence[Sequence[torch.Generator]],
) -> Tensor:
    """For each image, the iterate of projected steepest ascent at which a field is greatest.

    Parameters
    ----------
    field : callable
        What is maximised.
    images : Tensor of shape (batch, channels, height, width)
        Centres of the balls, in [0, 1].
    eps : float
        Radius in pixel units, in the norm.
    norm : {'linf', 'l2'}
        Norm of the ball. Steps are 2.5 eps / num_steps long.
    num_steps : int
        Steps of each restart.
    generators : sequence of sequences of torch.Generator
        For each restart, one generator per image, so that its start does not depend on the other images of the batch.

    Returns
    -------
    Tensor of the shape of `images`
        Inside the ball and the pixel range. The start points are candidates too; the images themselves are not.
    """
    clip, step_size = clipper(images, eps=eps, norm=norm), REACH * eps / num_steps
    best, best_value = images, torch.full_like(images[:, 0, 0, 0], -torch.inf)
    for of_restart in generators:
        adv = clip(images + _starts(images, of_restart, eps=eps, norm=norm))
        for step in range(num_steps + 1):
            value, gradient = field(adv)
            better = value > best_value
            best = torch.where(better[:, None, None, None], adv, best)
            best_value = torch.where(better, value, best_value)
            if step < num_steps:
                adv = clip(ascend_(adv, gradient, step_size, norm))
    return best


def _starts(images: Tensor, generators: Sequence[torch.Generator], *, eps: float, norm: str) -> Tensor:
    """Uniform noise in the ball, drawn separately for each image."""
    noise = [ball_noise_(torch.empty(1, *images.shape[1:]), eps=eps, norm=norm, generator=each) for each in generators]
    return torch.cat(noise).to(images)


def search_points(
    student: Predict,
    teacher: Predict,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: str,
    num_steps: int,
    restarts: int,
    generator_of: Callable[[int, int], Sequence[torch.Generator]],
) -> dict[str, Tensor]:
    """Search for the points of the ball at which the terms of the bound are computed.

    Parameters
    ----------
    student, teacher : callable
        Images to logits.
    images, labels
        As in `highest_point`; class indices of shape (batch,).
    generator_of : callable
        (search, restart) to one generator per image.

    Returns
    -------
    dict of str to Tensor of the shape of `images`
        Where the student's loss, the teacher's loss and their absolute difference are greatest (`student`, `teacher`,
        `difference`), and where each network's linearisation error is greatest (`student_linearity`,
        `teacher_linearity`).
    """
    of_student, of_teacher = loss_field(student, labels), loss_field(teacher, labels)
    fields = {
        "student": of_student,
        "teacher": of_teacher,
        "difference": difference_field(of_student, of_teacher),
        "student_linearity": linearity_field(of_student, images),
        "teacher_linearity": linearity_field(of_teacher, images),
    }
    ascent = partial(highest_point, images=images, eps=eps, norm=norm, num_steps=num_steps)
    return {
        name: ascent(field, generators=[generator_of(search, restart) for restart in range(restarts)])
        for search, (name, field) in enumerate(fields.items())
    }


@dataclass(frozen=True)
class Bound:
    """Both sides of the bound and their terms; tensors of shape (n,), losses in nats.

    Attributes
    ----------
    loss_gap : Tensor
        |l_S(x) - l_T(x)|.
    alignment : Tensor
        eps * ||g_S - g_T|| in the dual norm.
    student_linearity, teacher_linearity : Tensor
        Largest linearisation error at any of the points: lower bounds of the true local linearity measures.
    left : dict of str to Tensor
        |l_S(x') - l_T(x')| at the points of each attack.
    student_loss, teacher_loss : Tensor
        At the images.
    gap_l1, gap_l2 : Tensor
        Norms of g_S - g_T, nats per pixel unit.
    cosine : Tensor
        Of the angle between g_S and g_T; 0 where one of them vanishes.
    student_correct, teacher_correct : Tensor
        bool, at the images.
    student_robust, teacher_robust : Tensor
        bool: correct at the images and at every one of the points.
    """

    loss_gap: Tensor
    alignment: Tensor
    student_linearity: Tensor
    teacher_linearity: Tensor
    left: dict[str, Tensor]
    student_loss: Tensor
    teacher_loss: Tensor
    gap_l1: Tensor
    gap_l2: Tensor
    cosine: Tensor
    student_correct: Tensor
    teacher_correct: Tensor
    student_robust: Tensor
    teacher_robust: Tensor

    @property
    def right(self) -> Tensor:
        """Sum of the four terms."""
        return self.loss_gap + self.alignment + self.student_linearity + self.teacher_linearity

    @property
    def slack(self) -> Tensor:
        """Right side minus the largest left side: never negative, except for rounding."""
        return self.right - torch.stack(list(self.left.values())).amax(0)


def measure_bound(
    student: Predict,
    teacher: Predict,
    images: Tensor,
    labels: Tensor,
    points: Mapping[str, Tensor],
    *,
    eps: float,
    norm: str,
) -> Bound:
    """Compute both sides of the bound.

    The left side is computed at the points of `ATTACKS`, the linearisation errors at every point. The errors thus
    include all points of the left side, so the inequality holds for the returned values even if the search is weak:
    |l_S(x') - l_T(x')| is at most |l_S - l_T| + |d'(g_S - g_T)| plus the two errors at d, and Hölder's inequality
    bounds the second term.

    Parameters
    ----------
    student, teacher : callable
        Images to logits, in the type of `images`; with float64, rounding errors are negligible.
    points : mapping of str to Tensor of the shape of `images`
        From `search_points`; they are clipped again in the type of `images`.
    eps, norm
        As in `highest_point`.

    References
    ----------
    Shao et al., How and When Adversarial Robustness Transfers in Knowledge Distillation?, arXiv:2110.12072; the local
    linearity measure: Qin et al., Adversarial Robustness through Local Linearization, 2019, arXiv:1907.02610.
    """
    clip = clipper(images, eps=eps, norm=norm)
    shifted = {name: clip(point.to(images.dtype, copy=True)) for name, point in points.items()}
    of_student, of_teacher = (_side(predict, images, labels, shifted) for predict in (student, teacher))
    ours, theirs = of_student.gradient.flatten(1), of_teacher.gradient.flatten(1)
    lengths = torch.linalg.vector_norm(ours, dim=1) * torch.linalg.vector_norm(theirs, dim=1)
    gap = {order: torch.linalg.vector_norm(ours - theirs, order, dim=1) for order in (1, 2)}
    return Bound(
        loss_gap=(of_student.loss - of_teacher.loss).abs(),
        alignment=eps * gap[DUAL[norm]],
        student_linearity=of_student.linearity,
        teacher_linearity=of_teacher.linearity,
        left={name: (of_student.losses[name] - of_teacher.losses[name]).abs() for name in ATTACKS},
        student_loss=of_student.loss,
        teacher_loss=of_teacher.loss,
        gap_l1=gap[1],
        gap_l2=gap[2],
        cosine=(ours * theirs).sum(1) / lengths.clamp(min=torch.finfo(lengths.dtype).tiny),
        student_correct=of_student.correct,
        teacher_correct=of_teacher.correct,
        student_robust=of_student.robust,
        teacher_robust=of_teacher.robust,
    )


@dataclass(frozen=True)
class _Side:
    """The terms of one network."""

    loss: Tensor
    gradient: Tensor
    losses: dict[str, Tensor]
    linearity: Tensor
    correct: Tensor
    robust: Tensor


def _side(predict: Predict, images: Tensor, labels: Tensor, points: Mapping[str, Tensor]) -> _Side:
    """Losses, linearisation errors and correctness of one network at the images and at the points."""
    objective = CrossEntropy(labels)
    logits, gradient = differentiate(predict)(objective, images)
    loss, correct = objective(logits), logits.argmax(1) == labels
    losses, linearity, robust = {}, torch.zeros_like(loss), correct
    for name, adv in points.items():
        with torch.no_grad():
            logits = predict(adv)
        losses[name] = objective(logits)
        error = losses[name] - loss - ((adv - images) * gradient).sum((1, 2, 3))
        linearity = torch.maximum(linearity, error.abs())
        robust = robust & (logits.argmax(1) == labels)
    return _Side(loss, gradient, losses, linearity, correct, robust)
