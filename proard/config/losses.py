"""The training losses: one settings class each, with the options and the default values of its paper.

In a config a loss is its name, or a mapping with its `name` and options: `loss: {name: absld, temperature_rate: 0.2}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from proard.config.fields import NonNegative, Number, Positive, Settings, UnitInterval


class Loss(Settings):
    """A loss and its options, which are keyword arguments of the loss of this name in `proard.losses.OBJECTIVES`.

    `scale` multiplies the loss. Released code that also averages divergences over classes has 1 / classes of the
    values here.
    """

    attacked: ClassVar[bool] = True  # whether the training makes adversarial images
    needs_teacher: ClassVar[bool] = False
    needs_control: ClassVar[bool] = False  # the plainly trained network

    name: str
    scale: Positive = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """The options of the loss by name."""
        return {key: value for key, value in self if key not in ("name", "scale")}


class Plain(Loss):
    """Cross-entropy on clean images."""

    attacked = False
    name: Literal["plain"] = "plain"


class PgdAt(Loss):
    """Cross-entropy on adversarial images (`sat` is its other name): Madry et al., arXiv:1706.06083."""

    name: Literal["pgd_at", "sat"] = "pgd_at"


class Trades(Loss):
    """Cross-entropy on clean images, and `beta` times the divergence of the adversarial outputs: arXiv:1901.08573."""

    name: Literal["trades"] = "trades"
    beta: NonNegative = 6.0


class Mart(Loss):
    """Boosted cross-entropy on adversarial images, and `beta` times a weighted divergence: Wang et al., ICLR 2020."""

    name: Literal["mart"] = "mart"
    beta: NonNegative = 6.0


class Hat(Loss):
    """TRADES, and `helper_weight` times a cross-entropy at twice the perturbation: Rade and Moosavi, ICLR 2022.

    The labels of the helper term come from the run's plainly trained control.
    """

    needs_control = True
    name: Literal["hat"] = "hat"
    beta: NonNegative = 2.5
    helper_weight: NonNegative = 0.5


class Ikl(Loss):
    """TRADES with a decoupled divergence, whose distance of logits has the weight `beta`: arXiv:2305.13948.

    `soft_weight` is the weight of the soft labels. The distance is weighted by the mean output of each class over the
    pass before, at `temperature`.
    """

    name: Literal["ikl"] = "ikl"
    soft_weight: NonNegative = 4.0
    beta: NonNegative = 20.0
    temperature: Positive = 4.0


class Adr(Loss):
    """Cross-entropy on adversarial images, with labels softened by the average of the weights: arXiv:2305.12118.

    During the training the weight of the average's outputs moves from the first value of `soft_weight` to the second,
    and their temperature from the first value of `temperature` to the second, each on half a cosine. The decay of the
    average is the training's `ema_decay`.
    """

    name: Literal["adr"] = "adr"
    soft_weight: tuple[UnitInterval, UnitInterval] = (0.7, 0.95)
    temperature: tuple[Positive, Positive] = (2.0, 1.0)


class Distilled(Loss):
    """A loss of distillation from a teacher."""

    needs_teacher = True


class Rslad(Distilled):
    """Clean and adversarial outputs to the teacher's clean ones; `adv_weight` is the weight of the adversarial term."""

    name: Literal["rslad"] = "rslad"
    adv_weight: UnitInterval = 5 / 6


class Kd(Distilled):
    """Soft labels of the teacher on clean images, with weight `soft_weight` against hard labels: arXiv:1503.02531."""

    attacked = False
    name: Literal["kd"] = "kd"
    soft_weight: UnitInterval = 0.5
    temperature: Positive = 1.0


class Akd(Distilled):
    """Soft labels with student and teacher at the adversarial images: arXiv:2110.12072."""

    name: Literal["akd"] = "akd"
    soft_weight: UnitInterval = 0.5
    temperature: Positive = 1.0


class Ard(Distilled):
    """The student's adversarial outputs to the teacher's clean ones: arXiv:1905.09747."""

    name: Literal["ard"] = "ard"
    soft_weight: UnitInterval = 1.0
    temperature: Positive = 30.0


class Trusting(Distilled):
    """The teacher is weighted by p_y(x')^`trust_power` after the fraction `trust_after` of the training."""

    soft_weight: UnitInterval = 1.0
    trust_power: NonNegative = 0.1
    trust_after: UnitInterval = 0.3


class Iad(Trusting):
    """ARD that also uses the student's own clean outputs where the teacher is unreliable: arXiv:2106.04928."""

    name: Literal["iad"] = "iad"
    temperature: Positive = 1.0


class AdaIad(Trusting):
    """IAD with the teacher at the adversarial images and AdaAD's attack: Huang et al., CVPR 2023."""

    name: Literal["adaiad"] = "adaiad"
    temperature: Positive = 30.0


class AdaAd(Distilled):
    """Student and teacher at the same images; the attack differentiates both: Huang et al., CVPR 2023."""

    name: Literal["adaad"] = "adaad"
    adv_weight: UnitInterval = 1.0


class Mtard(Distilled):
    """A robust and a plain teacher, balanced at the rate `balance_rate`: Zhao et al., ECCV 2022."""

    needs_control = True
    name: Literal["mtard"] = "mtard"
    balance_rate: UnitInterval = 0.025


class Absld(Distilled):
    """RSLAD with a temperature for each class.

    Each temperature changes by up to `temperature_rate` per pass over the data, between `temperature_min` and
    `temperature_max`.
    """

    name: Literal["absld"] = "absld"
    adv_weight: UnitInterval = 5 / 6
    temperature_rate: NonNegative = 0.1
    temperature_min: Positive = 0.5
    temperature_max: Positive = 5.0


class Alpha(Distilled):
    """RSLAD with the larger alpha-divergence of `alpha_min` and `alpha_max`; weights are clipped at `ratio_clip`."""

    name: Literal["alpha"] = "alpha"
    adv_weight: UnitInterval = 5 / 6
    alpha_min: Number = -1.0
    alpha_max: Number = 1.0
    ratio_clip: Positive = 5.0


class FastEdge(Distilled):
    """Soft labels on clean images, and `beta` times the cross-entropy on adversarial ones (fast edge distillation)."""

    name: Literal["fast_edge"] = "fast_edge"
    beta: NonNegative = 1.0


class Igdm(Settings):
    """Input gradients matched by finite differences along the attack: arXiv:2312.03286 (`weight` 1 on CIFAR-10)."""

    at_adversarial: ClassVar[bool] = True

    name: Literal["igdm"] = "igdm"
    weight: Positive = 1.0


class Kdiga(Settings):
    """Input gradients of the cross-entropy, aligned at the `clean` or `adv` images in a `norm`: arXiv:2110.12072."""

    name: Literal["kdiga"] = "kdiga"
    weight: Positive = 1.0
    norm: Literal["l2", "l1", "l2_squared"] = "l2"
    at: Literal["clean", "adv"] = "clean"

    @property
    def at_adversarial(self) -> bool:
        """Whether the gradients are those at adversarial images."""
        return self.at == "adv"


def by_name(value: Any) -> Any:
    """A name alone stands for a mapping with this name."""
    return {"name": value} if isinstance(value, str) else value


def merge(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Override `shared` with `own`, recursively in mappings.

    A mapping without a name overrides options of the loss named in `shared`; one with another name replaces it.
    """
    merged = dict(shared)
    for key, value in own.items():
        before = merged.get(key)
        if isinstance(value, Mapping):
            before = by_name(before) if key in NAMED_KEYS else before
            known = before if isinstance(before, Mapping) else {}
            replaced = value.get("name", known.get("name")) != known.get("name")
            merged[key] = dict(value) if replaced else merge(known, value)
        else:
            merged[key] = value
    return merged


NAMED_KEYS = ("loss", "objective", "teacher_objective", "alignment")
SHORT = BeforeValidator(by_name)
NAMED = Field(discriminator="name")
Robust = PgdAt | Trades | Mart | Hat
Distillation = Rslad | Kd | Akd | Ard | Iad | AdaIad | AdaAd | Mtard | Absld | Alpha | FastEdge
TeacherLoss = Annotated[Annotated[Plain | Robust | Ikl | Adr, NAMED], SHORT]
RobustLoss = Annotated[Annotated[Robust, NAMED], SHORT]
DistillationLoss = Annotated[Annotated[Distillation, NAMED], SHORT]
AnyLoss = Annotated[Annotated[Plain | Robust | Ikl | Adr | Distillation, NAMED], SHORT]
Alignment = Annotated[Annotated[Igdm | Kdiga, NAMED], SHORT]
