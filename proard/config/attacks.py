"""The threat model and the attacks of training and of measurement."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator, model_validator
from pydantic_core import PydanticCustomError

from proard.config.fields import (
    NUMBER_SCHEMA,
    Count,
    Natural,
    PixelLength,
    Positive,
    Settings,
    in_pixel_units,
    parse_number,
)

Dtype = Literal["float32", "bfloat16"]
OBJECTIVE_WORDS = {  # of attacks that measure
    "ce": "cross-entropy",
    "margin": "logit margin (CW)",
    "targeted": "logit margin towards one wrong class at a time",
}
TARGETS = 5  # wrong classes of a targeted attack that names no number


class Threat(Settings):
    """The threat model of the run: what the adversary may change. Every stage uses this one threat model.

    `linf` limits the change of every pixel. `l2` limits the Euclidean length of the whole perturbation, which may
    exceed 1.
    """

    norm: Literal["linf", "l2"] = "linf"
    eps: Positive = 8 / 255

    @field_validator("eps")
    @classmethod
    def eps_is_in_pixel_units(cls, value: float, info: ValidationInfo) -> float:
        """Refuse an `linf` radius above 1, the largest possible change of a pixel."""
        return value if info.data.get("norm") == "l2" else in_pixel_units(value)


class TrainingAttack(Settings):
    """The inner maximisation of adversarial training.

    `objective` is the function that the attack maximises. `loss` is the one from the paper of the training's loss. The
    others are `ce`, `margin`, `kl_clean` (divergence from the network's own clean output) and `kl_teacher`. A
    divergence also grows when the probability of the true class grows. It is therefore a weak attack on networks of low
    confidence, such as small networks early in training; prefer `ce` there.
    `bn_mode` selects the batch-norm statistics inside the attack: `running` (the stored ones), `batch` (those of the
    perturbed batch, in every step) or `clean_batch` (those of the clean batch, fixed during the attack).

    With `first_steps` the number of steps grows from there to `num_steps`, each number for an equal part of the
    training. k steps are then each at least 1.25 eps / k long, so that the attack can cross the ball.
    `start` is `uniform` in the ball, `gaussian` (0.001 times a standard normal), `zero`, or `n_fgsm`: uniform noise of
    radius 2 eps, after which only the pixel range limits noise and steps. With one step of eps this is N-FGSM (de Jorge
    et al., NeurIPS 2022, arXiv:2202.01181).
    `shared` is for steps with several subnets: the adversarial images are computed once, on the `smallest` or the
    `largest` subnet. Every other subnet continues from them with `own_steps` of `own_step_size` (default: `step_size`).
    Under `smallest`, a dynamic teacher is trained first and uses its own attack.
    `carry_passes` starts an image's perturbation from that of the previous pass over the data, and draws it again after
    this number of passes (ATTA). It needs one byte per value of the padded training images, on the device and in the
    resume state.
    `crafted_on: teacher` attacks the frozen teacher instead of the trained network.
    """

    objective: Literal["loss", "ce", "margin", "kl_clean", "kl_teacher", "kl_teacher_adv"] = "loss"
    num_steps: Natural = 10
    step_size: PixelLength = 2 / 255
    start: Literal["uniform", "gaussian", "zero", "n_fgsm"] = "uniform"
    bn_mode: Literal["running", "batch", "clean_batch"] = "clean_batch"
    first_steps: Natural | None = None
    shared: Literal["smallest", "largest"] | None = None
    own_steps: Natural = 1
    own_step_size: PixelLength | None = None
    carry_passes: Count | None = None
    crafted_on: Literal["student", "teacher"] = "student"

    @model_validator(mode="after")
    def parts_fit(self) -> TrainingAttack:
        """Check that carried perturbations stay in the ball and that first_steps can grow."""
        if self.carry_passes is not None and self.start == "n_fgsm":
            raise ValueError("carry_passes stores perturbations inside the ball, which start n_fgsm leaves; remove one")
        if self.first_steps is not None and self.first_steps > self.num_steps:
            raise ValueError(f"first_steps is {self.first_steps}; expected: at most num_steps, {self.num_steps}")
        return self


def step_lengths(value: Any) -> Any:
    """A length above 0 in pixel units, `eps` or `eps/N`, or a list of these as a tuple."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise PydanticCustomError("step", "a length such as 2/255 or eps/4, or a list of lengths")
        return tuple(_step_length(part) for part in value)
    return _step_length(value)


def _step_length(value: Any) -> float | str:
    """A number in pixel units, or `eps/N` without spaces."""
    text = value.replace(" ", "") if isinstance(value, str) else ""
    relative = re.fullmatch(r"eps(/[0-9.]+)?", text) is not None
    try:
        number = parse_number(text.replace("eps", "1") if relative else value)
    except PydanticCustomError:
        number = None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number <= 0:
        raise PydanticCustomError("step", "a length above 0 such as 2/255 or eps/4, or a list of lengths")
    return text if relative else in_pixel_units(float(number))


STEP_SCHEMA: list[dict[str, Any]] = [*NUMBER_SCHEMA["anyOf"], {"type": "string", "pattern": "^ *eps *(/ *[0-9.]+ *)?$"}]
StepSize = Annotated[
    float | str | tuple[float | str, ...],
    BeforeValidator(step_lengths),
    WithJsonSchema({"anyOf": [*STEP_SCHEMA, {"type": "array", "items": {"anyOf": STEP_SCHEMA}, "minItems": 1}]}),
]


class Attack(Settings):
    """An attack of a measurement.

    `objective`: `ce` (cross-entropy), `margin` (logit margin of Carlini and Wagner) or `targeted`.

    `targeted` increases the logit of one wrong class over that of the true class. It attacks every image once for each
    of its `targets` (5) wrong classes of highest clean logit, in that order. It attacks only images that all earlier
    attacks of its list leave correctly classified. Its accuracy therefore counts the earlier attacks too.

    `step_size` is a length in pixel units, or `eps` or `eps/N`, which follow the radius. In a list of lengths, each is
    used for an equal part of `num_steps`.

    `start` is `uniform` in the ball, or `zero`: the unchanged image, as in FGSM with one step of eps.
    `dtype: bfloat16` computes gradients in bfloat16. It is faster and slightly weaker, and meant for the many labels of
    `evaluate_archs`. An image counts as misclassified only by float32 logits.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "pgd20"
    objective: Literal["ce", "margin", "targeted"] = "ce"
    targets: Count | None = None
    num_steps: Count = 20
    step_size: StepSize = "eps/4"
    restarts: Count = 1
    start: Literal["uniform", "zero"] = "uniform"
    dtype: Dtype = "float32"

    @model_validator(mode="after")
    def restarts_differ(self) -> Attack:
        """Refuse several restarts from the unchanged image: they would all be the same."""
        if self.start == "zero" and self.restarts > 1:
            raise ValueError(f"start zero makes all restarts equal; restarts is {self.restarts}")
        return self

    @model_validator(mode="after")
    def schedule_fits(self) -> Attack:
        """Refuse a schedule of more parts than steps."""
        if isinstance(self.step_size, tuple) and len(self.step_size) > self.num_steps:
            raise ValueError(f"step_size has {len(self.step_size)} parts; num_steps is {self.num_steps}")
        return self

    @model_validator(mode="after")
    def targets_are_attacked(self) -> Attack:
        """Refuse a number of targets for an attack that has none."""
        if self.targets is not None and self.objective != "targeted":
            raise ValueError(f"targets is of objective targeted; objective is {self.objective}")
        return self

    @property
    def num_targets(self) -> int | None:
        """Wrong classes that a targeted attack attacks in turn; None for other objectives."""
        return (self.targets or TARGETS) if self.objective == "targeted" else None

    def step_lengths(self, eps: float) -> list[float]:
        """The length of each of `num_steps` steps at this radius, in pixel units."""
        parts = self.step_size if isinstance(self.step_size, tuple) else (self.step_size,)
        lengths = [eps * parse_number(part.replace("eps", "1")) if isinstance(part, str) else part for part in parts]
        return [lengths[step * len(parts) // self.num_steps] for step in range(self.num_steps)]

    def scaled(self, factor: float) -> Attack:
        """The attack for a ball whose radius is larger by a factor: lengths in pixel units grow with it."""
        parts = self.step_size if isinstance(self.step_size, tuple) else (self.step_size,)
        longer = tuple(part if isinstance(part, str) else part * factor for part in parts)
        return self.model_copy(update={"step_size": longer if isinstance(self.step_size, tuple) else longer[0]})


SCHEDULE = ("eps", "eps/4", "eps/16")
LABEL = Attack(name="margin10", objective="margin", num_steps=10, step_size=SCHEDULE)  # docs/results/attacks
STRONG = (
    Attack(),
    LABEL,
    Attack(name="targeted5x2", objective="targeted", targets=5, restarts=2, num_steps=15, step_size=SCHEDULE),
)
