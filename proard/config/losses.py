"""Settings of the losses. If a loss's paper has another default than the key, selecting the loss sets the paper's."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from proard.config.fields import NonNegative, Number, Positive, Settings, Share

RobustObjective = Literal["pgd_at", "sat", "trades", "mart", "hat"]
Distillation = Literal["rslad", "kd", "akd", "ard", "iad", "adaad", "adaiad", "mtard", "absld", "alpha", "fast_edge"]
WITHOUT_ATTACK = ("kd",)
PAPER_DEFAULTS: dict[str, dict[str, float]] = {
    "hat": {"beta": 2.5},
    "fast_edge": {"beta": 1.0},
    "kd": {"soft_weight": 0.5},
    "akd": {"soft_weight": 0.5},
    "ard": {"temperature": 30.0},
    "adaad": {"adv_weight": 1.0},
    "adaiad": {"temperature": 30.0},
}


class RobustOptions(Settings):
    """Options of objectives without a teacher.

    `beta` weights the divergence of `trades`, `mart` and `hat` (2.5 for `hat`) and the adversarial term of `fast_edge`
    (1). `hat` adds `helper_weight` times a cross-entropy at `helper_reach` times the perturbation. Its labels come from
    the run's plainly trained control. With `awp_gamma` above 0, training uses weights moved against the loss by that
    fraction of each layer's norm (paper: 5e-3), from `awp_warmup_epochs` on.
    """

    beta: NonNegative = 6.0
    helper_weight: NonNegative = 0.5
    helper_reach: Positive = 2.0
    awp_gamma: NonNegative = 0.0
    awp_warmup_epochs: NonNegative = 0

    @model_validator(mode="before")
    @classmethod
    def paper_defaults(cls, value: Any) -> Any:
        """Fill missing keys with the defaults of the selected losses' papers."""
        if not isinstance(value, dict):
            return value
        named = [value.get(key) for key in ("loss", "objective", "teacher_objective")]
        filled: dict[str, Any] = {}
        for name in named:
            filled |= PAPER_DEFAULTS.get(name, {}) if isinstance(name, str) else {}
        return {**filled, **value}


class DistillationOptions(RobustOptions):
    """Options of distillation losses, and terms that can be added to any of them.

    `adv_weight` is the weight of the adversarial term (`rslad`, `absld`, `alpha`: 5/6; `adaad`: 1). `soft_weight` is
    the weight of soft labels against hard ones (`ard`, `iad`, `adaiad`: 1; `kd`, `akd`: 1/2), `temperature` their
    temperature (30 for `ard` and `adaiad`). `iad` and `adaiad` weight the teacher by p_y(x')^`trust_power` after the
    fraction `trust_after` of the training. `mtard` adapts the weights of its two teachers at the rate `balance_rate`.
    `absld` changes the temperature of each class by up to `temperature_rate` per pass over the data, between
    `temperature_min` and `temperature_max`. `alpha` uses the larger divergence of `alpha_min` and `alpha_max`, with
    importance weights clipped at `ratio_clip`. Above 0, `igdm_weight` (paper: 1 on CIFAR-10) and `kdiga_weight` add
    input-gradient matching; `kdiga_norm` and `kdiga_at` are the norm and the images of the latter. `loss_scale`
    multiplies the sum: released code that also averages divergences over classes has 1 / classes of ours.
    """

    adv_weight: Share = 5 / 6
    soft_weight: Share = 1.0
    temperature: Positive = 1.0
    trust_power: NonNegative = 0.1
    trust_after: Share = 0.3
    balance_rate: Share = 0.025
    temperature_rate: NonNegative = 0.1
    temperature_min: Positive = 0.5
    temperature_max: Positive = 5.0
    alpha_min: Number = -1.0
    alpha_max: Number = 1.0
    ratio_clip: Positive = 5.0
    igdm_weight: NonNegative = 0.0
    kdiga_weight: NonNegative = 0.0
    kdiga_norm: Literal["l2", "l1", "l2_squared"] = "l2"
    kdiga_at: Literal["clean", "adv"] = "clean"
    loss_scale: Positive = 1.0
