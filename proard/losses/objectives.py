"""Every training objective once: what it looks at, what its adversary ascends, what it remembers, where its teacher is.

`OBJECTIVES` names the objectives, `INNER_OBJECTIVES` what an adversary may ascend; `with_igdm` and `with_kdiga` add a
term to any objective that has a teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.losses import distillation as d
from proard.losses.alignment import igdm_term, kdiga_term
from proard.losses.divergence import kl_to_teacher
from proard.losses.inner import CrossEntropy, InnerObjective, KLBetweenNets, KLToTarget, Margin
from proard.losses.robust import hat_loss, mart_loss, sat_loss, trades_loss

Memory = dict[str, Tensor]
ABSENT: Any = None  # in a field of a batch that its objective does not need, and so does not read


@dataclass(frozen=True)
class Batch:
    """What an objective may look at, all for one subnet and one batch; what it does not need is `ABSENT`.

    Attributes
    ----------
    labels : Tensor of shape (batch,)
    clean, adv : Tensor of shape (batch, classes), optional
        The network's logits on the clean and on the adversarial images.
    teacher, teacher_adv : Tensor of shape (batch, classes), optional
        The teacher's logits on the clean and on the adversarial images.
    images, adversarial : Tensor of shape (batch, channels, height, width), optional
        Network inputs; they require a gradient where the network's input gradient is part of the loss.
    mirrored, teacher_mirrored : Tensor of shape (batch, classes), optional
        Network and teacher at x - (x' - x).
    beyond : Tensor of shape (batch, classes), optional
        The network's logits at x + h (x' - x), outside the ball.
    teacher_gradient, teacher_gradient_adv : Tensor of shape (batch, channels, height, width), optional
        The teacher's input gradient of the cross-entropy at the clean and at the adversarial images.
    control, control_adv : Tensor of shape (batch, classes), optional
        A plainly trained network's logits on the clean and on the adversarial images.
    progress : float in [0, 1]
        Share of the training that is done.
    data_pass : int
        Number of the pass over the data.
    memory : dict of Tensor
        What the objective carries from step to step.
    """

    labels: Tensor
    clean: Tensor = ABSENT
    teacher: Tensor = ABSENT
    adv: Tensor = ABSENT
    images: Tensor = ABSENT
    adversarial: Tensor = ABSENT
    teacher_adv: Tensor = ABSENT
    mirrored: Tensor = ABSENT
    teacher_mirrored: Tensor = ABSENT
    beyond: Tensor = ABSENT
    teacher_gradient: Tensor = ABSENT
    teacher_gradient_adv: Tensor = ABSENT
    control: Tensor = ABSENT
    control_adv: Tensor = ABSENT
    progress: float = 0.0
    data_pass: int = 0
    memory: Memory = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """A training objective.

    Attributes
    ----------
    inner : str or None
        What the adversary ascends, by name; None: no attack.
    loss : callable
        `loss(batch, **options)`: one number to descend.
    needs : frozenset of str
        Fields of `Batch` that the loss reads, `labels` apart.
    options : tuple of str
        Settings that the loss takes.
    memory : callable, optional
        `memory(classes, **options)`: what is remembered before the first step.
    remember : callable, optional
        `remember(batch, **options)`: the memory after this batch, on which the loss is then computed.
    unweighted : callable, optional
        `unweighted(**options)`: those of `needs` that the loss does not read under these options.
    """

    inner: str | None
    loss: Callable[..., Tensor]
    needs: frozenset[str]
    options: tuple[str, ...] = ()
    memory: Callable[..., Memory] | None = None
    remember: Callable[..., Memory] | None = None
    unweighted: Callable[..., frozenset[str]] | None = None

    @property
    def needs_clean(self) -> bool:
        """Whether gradients flow through the network's logits on clean images."""
        return "clean" in self.needs

    @property
    def needs_teacher(self) -> bool:
        """Whether there must be a teacher."""
        return self.teacher_at is not None

    @property
    def needs_target(self) -> bool:
        """Whether loss or adversary read the teacher's logits on the clean images."""
        return "teacher" in self.needs or self.inner in ("kl_teacher", "kl_class")

    @property
    def teacher_at(self) -> Literal["clean", "adv", "both"] | None:
        """Where the teacher is asked; None: nowhere.

        `clean`: its outputs depend on the stored view of an image alone, so that they may be cached. `adv` and `both`:
        it must be asked in every step, at images that this very student has made.
        """
        at_clean = self.needs_target or "teacher_gradient" in self.needs
        at_adv = not {"teacher_adv", "teacher_mirrored", "teacher_gradient_adv"}.isdisjoint(self.needs)
        at_adv = at_adv or self.inner == "kl_teacher_adv"
        if at_clean and at_adv:
            return "both"
        return "clean" if at_clean else "adv" if at_adv else None


INNER_OBJECTIVES: dict[str, Callable[[Batch], InnerObjective]] = {
    "ce": lambda batch: CrossEntropy(batch.labels),
    "margin": lambda batch: Margin(batch.labels),
    "kl_clean": lambda batch: KLToTarget(batch.clean),
    "kl_teacher": lambda batch: KLToTarget(batch.teacher),
    "kl_teacher_adv": lambda batch: KLBetweenNets(),
    "kl_class": lambda batch: KLToTarget(batch.teacher / batch.memory["adv_temperature"][batch.labels, None]),
}

# --- what a loss of Batch is --------------------------------------------------------------------------------------


def _trusted(batch: Batch, trust_power: float, trust_after: float) -> Tensor:
    """IAD's trust, 1 before `trust_after` of the training."""
    if batch.progress < trust_after:
        return torch.ones_like(batch.teacher_adv[:, 0])
    return d.trust(batch.teacher_adv, batch.labels, trust_power=trust_power)


def _iad(batch: Batch, *, teacher: Tensor, trust_power: float, trust_after: float, **options: float) -> Tensor:
    """IAD and AdaIAD."""
    trusted = _trusted(batch, trust_power, trust_after)
    return d.iad_loss(batch.clean, batch.adv, teacher, batch.labels, trusted, **options)


def _adaad(batch: Batch, *, adv_weight: float) -> Tensor:
    """AdaAD; nothing at clean images where they have no weight."""
    if adv_weight == 1:
        return kl_to_teacher(batch.adv, batch.teacher_adv.detach()).mean()
    return d.adaad_loss(batch.clean, batch.adv, batch.teacher, batch.teacher_adv, adv_weight=adv_weight)


def _mtard_memory(classes: int, *, balance_rate: float) -> Memory:
    """Equal shares; the first losses are unknown (0)."""
    return {"adv_share": torch.full((1,), 0.5), "first_losses": torch.zeros(2)}


def _mtard_remember(batch: Batch, *, balance_rate: float) -> Memory:
    """The first batch's losses, and the share of this batch."""
    pairs = ((batch.adv, batch.teacher_adv), (batch.clean, batch.control))
    losses = torch.stack([kl_to_teacher(*pair).detach().mean() for pair in pairs])
    first = batch.memory["first_losses"]
    first = torch.where(first == 0, losses.to(first), first)
    share = d.balanced_share(batch.memory["adv_share"], losses.to(first), first, balance_rate=balance_rate)
    return {"adv_share": share, "first_losses": first}


def _mtard(batch: Batch, *, balance_rate: float) -> Tensor:
    """MTARD at the remembered share."""
    share = batch.memory["adv_share"]
    return d.mtard_loss(batch.clean, batch.adv, batch.control, batch.teacher_adv, adv_share=share)


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
        moved = d.next_temperatures(before, losses, old["count"], **options)
        new[f"{kind}_temperature"] = torch.where(begins, moved, before)
        added = F.cross_entropy(logits.detach(), labels, reduction="none").to(losses)
        new[f"{kind}_loss"] = (losses * kept).index_add(0, labels, added)
    return new


def _absld(batch: Batch, *, adv_weight: float, **options: float) -> Tensor:
    """ABSLD at the remembered temperatures."""
    temperatures = (batch.memory["clean_temperature"], batch.memory["adv_temperature"])
    return d.absld_loss(batch.clean, batch.adv, batch.teacher, batch.labels, *temperatures, adv_weight=adv_weight)


def _needs(*fields: str) -> frozenset[str]:
    """Fields of `Batch`."""
    return frozenset(fields)


SOFT = ("soft_weight", "temperature")
TRUST = (*SOFT, "trust_power", "trust_after")
OBJECTIVES: dict[str, Objective] = {
    "plain": Objective(None, lambda batch: F.cross_entropy(batch.clean, batch.labels), _needs("clean")),
    "pgd_at": Objective("ce", lambda batch: sat_loss(batch.adv, batch.labels), _needs("adv")),
    "trades": Objective(
        "kl_clean",
        lambda batch, beta: trades_loss(batch.clean, batch.adv, batch.labels, beta=beta),
        _needs("clean", "adv"),
        ("beta",),
    ),
    "mart": Objective(
        "ce",
        lambda batch, beta: mart_loss(batch.clean, batch.adv, batch.labels, beta=beta),
        _needs("clean", "adv"),
        ("beta",),
    ),
    "hat": Objective(
        "kl_clean",
        lambda batch, **options: hat_loss(
            batch.clean, batch.adv, batch.beyond, batch.labels, batch.control_adv, **options
        ),
        _needs("clean", "adv", "beyond", "control_adv"),
        ("beta", "helper_weight"),
    ),
    "kd": Objective(
        None,
        lambda batch, **options: d.kd_loss(batch.clean, batch.clean, batch.teacher, batch.labels, **options),
        _needs("clean", "teacher"),
        SOFT,
    ),
    "akd": Objective(
        "ce",
        lambda batch, **options: d.kd_loss(batch.clean, batch.adv, batch.teacher_adv, batch.labels, **options),
        _needs("clean", "adv", "teacher_adv"),
        SOFT,
    ),
    "ard": Objective(
        "ce",
        lambda batch, **options: d.kd_loss(batch.clean, batch.adv, batch.teacher, batch.labels, **options),
        _needs("clean", "adv", "teacher"),
        SOFT,
    ),
    "iad": Objective(
        "ce",
        lambda batch, **options: _iad(batch, teacher=batch.teacher, **options),
        _needs("clean", "adv", "teacher", "teacher_adv"),
        TRUST,
    ),
    "rslad": Objective(
        "kl_teacher",
        lambda batch, adv_weight: d.rslad_loss(batch.clean, batch.adv, batch.teacher, adv_weight=adv_weight),
        _needs("clean", "adv", "teacher"),
        ("adv_weight",),
    ),
    "adaad": Objective(
        "kl_teacher_adv",
        _adaad,
        _needs("clean", "adv", "teacher", "teacher_adv"),
        ("adv_weight",),
        unweighted=lambda adv_weight: _needs("clean", "teacher") if adv_weight == 1 else _needs(),
    ),
    "adaiad": Objective(
        "kl_teacher_adv",
        lambda batch, **options: _iad(batch, teacher=batch.teacher_adv, **options),
        _needs("clean", "adv", "teacher_adv"),
        TRUST,
    ),
    "mtard": Objective(
        "ce",
        _mtard,
        _needs("clean", "adv", "teacher_adv", "control"),
        ("balance_rate",),
        _mtard_memory,
        _mtard_remember,
    ),
    "absld": Objective(
        "kl_class",
        _absld,
        _needs("clean", "adv", "teacher"),
        ("adv_weight", "temperature_rate", "temperature_min", "temperature_max"),
        _absld_memory,
        _absld_remember,
    ),
    "alpha": Objective(
        "kl_teacher",
        lambda batch, **options: d.alpha_loss(batch.clean, batch.adv, batch.teacher, **options),
        _needs("clean", "adv", "teacher"),
        ("adv_weight", "alpha_min", "alpha_max", "ratio_clip"),
    ),
    "fast_edge": Objective(
        "ce",
        lambda batch, beta: d.fast_edge_loss(batch.clean, batch.adv, batch.teacher, batch.labels, beta=beta),
        _needs("clean", "adv", "teacher"),
        ("beta",),
    ),
}
OBJECTIVES["sat"] = OBJECTIVES["pgd_at"]  # its other name in the literature


# --- add-ons ------------------------------------------------------------------------------------------------------


def scaled(objective: Objective, *, scale: float) -> Objective:
    """The objective times a number: releases that average a divergence over classes, too, have 1 / classes of it."""
    return replace(objective, loss=lambda batch, **options: scale * objective.loss(batch, **options))


def with_igdm(objective: Objective, *, weight: float) -> Objective:
    """Add `weight` times `igdm_term`, which grows with the share of the training that is done (the paper's epoch / E).

    Raises
    ------
    ValueError
        The objective has no attack, and with it no direction along which to match.
    """
    if objective.inner is None:
        raise ValueError("igdm_weight needs a loss with an attack")

    def loss(batch: Batch, **options: float) -> Tensor:
        term = igdm_term(batch.adv, batch.mirrored, batch.teacher_adv, batch.teacher_mirrored)
        return objective.loss(batch, **options) + weight * batch.progress * term

    needs = objective.needs | {"adv", "mirrored", "teacher_adv", "teacher_mirrored"}
    return replace(objective, loss=loss, needs=needs)


def with_kdiga(objective: Objective, *, weight: float, norm: str = "l2", at: str = "clean") -> Objective:
    """Add `weight` times `kdiga_term` at the clean or at the adversarial images (`at`: clean, adv).

    Raises
    ------
    ValueError
        Adversarial images of an objective without an attack.
    """
    if at == "adv" and objective.inner is None:
        raise ValueError("kdiga_at: adv needs a loss with an attack")

    def loss(batch: Batch, **options: float) -> Tensor:
        if at == "clean":
            term = kdiga_term(batch.clean, batch.images, batch.labels, batch.teacher_gradient, norm=norm)
        else:
            term = kdiga_term(batch.adv, batch.adversarial, batch.labels, batch.teacher_gradient_adv, norm=norm)
        return objective.loss(batch, **options) + weight * term

    fields = {"clean", "teacher_gradient"} if at == "clean" else {"adv", "teacher_gradient_adv"}
    return replace(objective, loss=loss, needs=objective.needs | fields)
