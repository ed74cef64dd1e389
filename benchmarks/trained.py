"""A network that has learned something in seconds: on random weights, attacks diverge from rounding alone."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from step_rows import Problem
from torch import Tensor

from proard.config import Threat, TrainingAttack, TrainTeacher
from proard.training import StepBatch, single_plan, training_step


def trained(problem: Problem, *, num_steps: int, batch_size: int = 64, seed: int = 0) -> Problem:
    """The problem with its student's first arch adversarially trained on smooth patterns, one per class, in noise.

    Parameters
    ----------
    problem : Problem
        Its student is changed; images and labels of the returned one are of the patterns, as many as before and on the
        same device.
    num_steps : int
        Steps of PGD-2 adversarial training.
    """
    space, device = problem.student.space.settings, problem.images.device
    arch, generator = problem.archs[0], torch.Generator().manual_seed(seed)
    coarse = torch.rand(space.classes, space.image_channels, 4, 4, generator=generator)
    patterns = F.interpolate(coarse, size=space.image_size, mode="bicubic").clamp(0, 1)
    attack = TrainingAttack(num_steps=2, step_size=problem.recipe.eps, bn_mode="running")
    recipe = TrainTeacher(objective="pgd_at", attack=attack)
    plan = single_plan(arch, "pgd_at", recipe)
    train = training_step(problem.student, recipe, plan, threat=Threat(eps=problem.recipe.eps), seed=seed)
    for step in range(num_steps):
        images, labels = (part.to(device) for part in draw(patterns, batch_size, generator))
        rate = 0.05 * min(1.0, (step + 1) / 10) * (1 - step / num_steps)
        train(StepBatch(images, labels, generator, step=step, lr=rate))
    images, labels = draw(patterns, len(problem.images), generator)
    return replace(problem, images=images.to(device), labels=labels.to(device))


def draw(patterns: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy copies of random patterns, as images in channels_last memory, and their labels."""
    labels = torch.randint(len(patterns), (count,), generator=generator)
    noise = torch.empty(count, *patterns.shape[1:]).normal_(0, 0.05, generator=generator)
    images = (0.1 + 0.8 * patterns[labels] + noise).clamp(0.02, 0.98)
    return images.contiguous(memory_format=torch.channels_last), labels
