"""ABSLD: RSLAD with a temperature for each class, adapted during the training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.losses.divergence import kl_to_teacher
from proard.losses.objectives import OBJECTIVES, Batch, Memory, Objective


def absld_loss(
    student_clean: Tensor,
    student_adv: Tensor,
    teacher_clean: Tensor,
    labels: Tensor,
    clean_temperature: Tensor,
    adv_temperature: Tensor,
    *,
    adv_weight: float = 5 / 6,
) -> Tensor:
    """RSLAD with a teacher temperature for every class, which makes the teacher surer of classes that are hard.

    Parameters
    ----------
    student_clean, student_adv, teacher_clean : Tensor of shape (batch, classes)
        Logits; the student's keep temperature 1.
    labels : Tensor of shape (batch,)
        Class indices, which choose the temperature.
    clean_temperature, adv_temperature : Tensor of shape (classes,)
        Temperatures of both terms, moved by `next_temperatures` after every pass over the data.
    adv_weight : float in [0, 1]
        Share of the adversarial term.

    Returns
    -------
    Tensor of shape ()
        5/6 KL(t(x) at tau_adv || s(x')) + 1/6 KL(t(x) at tau_clean || s(x)), nats, averaged over images.

    Notes
    -----
    In the authors' code both sets of logits are one tensor, so that each term gets both temperatures; here each has its
    own. The attack ascends the divergence to the teacher at the adversarial temperature.

    References
    ----------
    Zhao et al., Improving Adversarial Robust Fairness via Anti-Bias Soft Label Distillation, NeurIPS 2024,
    arXiv:2312.05508.
    """
    teacher = teacher_clean.detach()
    clean = kl_to_teacher(student_clean, teacher / clean_temperature[labels, None].to(teacher))
    adv = kl_to_teacher(student_adv, teacher / adv_temperature[labels, None].to(teacher))
    return (adv_weight * adv + (1 - adv_weight) * clean).mean()


def next_temperatures(
    temperatures: Tensor,
    losses: Tensor,
    counts: Tensor,
    *,
    temperature_rate: float = 0.1,
    temperature_min: float = 0.5,
    temperature_max: float = 5.0,
) -> Tensor:
    """ABSLD's temperatures of the next pass: lower for classes whose cross-entropy is above the mean of the classes.

    Parameters
    ----------
    temperatures, losses, counts : Tensor of shape (classes,)
        Temperatures so far; cross-entropy of the student summed over the pass, and number of images, of every class.
    temperature_rate : float
        Step of the class that is farthest from the mean.
    temperature_min, temperature_max : float
        Range.

    Returns
    -------
    Tensor of shape (classes,)
        tau - rate gap / max |gap|, clipped; unchanged where a class was not seen.

    Notes
    -----
    Means of a class instead of the code's sums, which are the same for balanced classes. The code's rate falls with
    the learning rate; here it is constant.
    """
    seen = counts > 0
    means = losses / counts.clamp_min(1)
    gap = torch.where(seen, means - means.sum() / seen.sum().clamp_min(1), torch.zeros_like(means))
    step = gap / gap.abs().max().clamp_min(torch.finfo(gap.dtype).tiny)
    return (temperatures - temperature_rate * step).clamp(temperature_min, temperature_max)


def _absld_memory(classes: int, **options: float) -> Memory:
    """Temperatures 1; no losses yet."""
    memory = {f"{kind}_temperature": torch.ones(classes) for kind in ("clean", "adv")}
    memory |= {f"{kind}_loss": torch.zeros(classes) for kind in ("clean", "adv")}
    return memory | {"count": torch.zeros(classes), "data_pass": torch.zeros(1)}


def _absld_remember(batch: Batch, *, adv_weight: float, **options: float) -> Memory:
    """Sums of the pass; when a new pass begins, the temperatures that follow from the one before.

    The attack on the first batch of a pass still goes by the temperatures of the pass before.
    """
    old, labels = batch.memory, batch.labels
    begins = old["data_pass"] != batch.data_pass
    kept = (~begins).to(old["count"])
    new = {"data_pass": torch.full_like(old["data_pass"], batch.data_pass)}
    new["count"] = (old["count"] * kept).index_add(0, labels, torch.ones_like(labels, dtype=kept.dtype))
    for kind, logits in (("clean", batch.clean), ("adv", batch.adv)):
        before, losses = old[f"{kind}_temperature"], old[f"{kind}_loss"]
        moved = next_temperatures(before, losses, old["count"], **options)
        new[f"{kind}_temperature"] = torch.where(begins, moved, before)
        added = F.cross_entropy(logits.detach(), labels, reduction="none").to(losses)
        new[f"{kind}_loss"] = (losses * kept).index_add(0, labels, added)
    return new


def _absld(batch: Batch, *, adv_weight: float, **options: float) -> Tensor:
    """ABSLD at the remembered temperatures."""
    temperatures = (batch.memory["clean_temperature"], batch.memory["adv_temperature"])
    return absld_loss(batch.clean, batch.adv, batch.teacher, batch.labels, *temperatures, adv_weight=adv_weight)


OBJECTIVES["absld"] = Objective(
    "kl_class",
    _absld,
    frozenset({"clean", "adv", "teacher"}),
    _absld_memory,
    _absld_remember,
)
