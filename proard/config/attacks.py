"""The threat model and the attacks of training and of measurement."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from proard.config.fields import Count, Extended, Natural, NonNegative, PixelLength, Positive, Settings, in_pixel_units

Dtype = Literal["float32", "bfloat16"]
OBJECTIVE_WORDS = {"ce": "cross-entropy", "margin": "logit margin (CW)"}  # of attacks that measure


class Threat(Settings):
    """What the adversary may do. One threat model per run; every stage reads this one.

    `linf` limits the change of every pixel, `l2` the Euclidean length of the whole perturbation, which may exceed 1.
    """

    norm: Literal["linf", "l2"] = "linf"
    eps: Positive = 8 / 255

    @field_validator("eps")
    @classmethod
    def eps_is_in_pixel_units(cls, value: float, info: ValidationInfo) -> float:
        """No pixel changes by more than 1."""
        return value if info.data.get("norm") == "l2" else in_pixel_units(value)


class Curriculum(Settings):
    """Attack steps grow from `first_steps` to `num_steps`, every count for an equal share of the training.

    Fewer steps than `num_steps` are each at least `reach` * eps / steps long, so that they still cross the ball.
    """

    first_steps: Natural = 1
    reach: NonNegative = 1.25


class TrainingAttack(Extended):
    """Inner maximisation of training.

    `objective` is what the adversary ascends: `loss` (what the loss's paper takes), `ce`, `margin`, `kl_clean` (to the
    network's own clean output) or `kl_teacher`. A divergence also grows when the true class gains: on networks of low
    confidence, such as small ones early on, it makes a weak attack; prefer `ce` there.
    `bn_mode` says which statistics batch norm uses inside the attack: `running` (the stored ones), `batch` (those
    of the perturbed batch, in every step) or `clean_batch` (those of the clean batch, fixed during the attack).

    `start_scale` is the radius of the uniform start in units of eps; `clip_to_ball: false` leaves the pixel range as
    the only limit. One step of eps with `start_scale: 2` and `clip_to_ball: false` is N-FGSM.
    `shared` crafts the adversarial images of a step with several subnets once, on its `smallest` or `largest`;
    every other subnet takes `own_steps` of `own_step_size` (by default `step_size`) from there. A dynamic teacher,
    trained first, attacks for itself under `smallest`.
    `carry_passes` lets an image's perturbation start where the previous pass over the data left it, drawn anew every
    so many passes (ATTA): one byte per value of the padded training images, on the device and in the resume state.
    `crafted_on: teacher` perturbs images against the frozen teacher instead of the network that is trained.
    `graph: auto` replays a captured CUDA graph for every linf attack step of a full batch, except under
    `bn_mode: batch`; it changes nothing on a CPU.
    """

    gained = frozenset({"crafted_on", "own_step_size"})

    objective: Literal["loss", "ce", "margin", "kl_clean", "kl_teacher", "kl_teacher_adv"] = "loss"
    num_steps: Natural = 10
    step_size: PixelLength = 2 / 255
    start: Literal["uniform", "gaussian", "zero"] = "uniform"
    bn_mode: Literal["running", "batch", "clean_batch"] = "clean_batch"
    dtype: Dtype = "float32"
    start_scale: Positive = 1.0
    clip_to_ball: bool = True
    curriculum: Curriculum | None = None
    shared: Literal["smallest", "largest"] | None = None
    own_steps: Natural = 1
    own_step_size: PixelLength | None = None
    carry_passes: Count | None = None
    graph: Literal["auto", "off"] = "off"
    crafted_on: Literal["student", "teacher"] = "student"

    @model_validator(mode="after")
    def parts_fit(self) -> TrainingAttack:
        """A scale needs the start that it scales, stored perturbations their ball, a curriculum room to grow."""
        if self.start_scale != 1 and self.start != "uniform":
            raise ValueError(f"start_scale is the radius of start uniform; start is {self.start}")
        if self.carry_passes is not None and not self.clip_to_ball:
            raise ValueError("carry_passes keeps perturbations inside the ball: leave clip_to_ball true")
        if self.curriculum is not None and self.curriculum.first_steps > self.num_steps:
            first = self.curriculum.first_steps
            raise ValueError(f"curriculum.first_steps is {first}; expected: at most num_steps, {self.num_steps}")
        return self


class Attack(Extended):
    """An attack that measures: `objective` is `ce` (cross-entropy) or `margin` (Carlini-Wagner's logit margin).

    `start` is `uniform` in the ball, or `zero`: the image itself, as FGSM has it in one step of eps.
    `dtype: bfloat16` computes gradients in that type; what falls, falls by float32 logits. Faster, and a little weaker:
    meant for the many labels of `evaluate_archs`.
    """

    gained = frozenset({"start", "dtype"})

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "pgd20"
    objective: Literal["ce", "margin"] = "ce"
    num_steps: Count = 20
    step_size: PixelLength = 2 / 255
    restarts: Count = 1
    start: Literal["uniform", "zero"] = "uniform"
    dtype: Dtype = "float32"

    @model_validator(mode="after")
    def restarts_differ(self) -> Attack:
        """From the image itself every restart is the same."""
        if self.start == "zero" and self.restarts > 1:
            raise ValueError(f"start zero makes all restarts equal; restarts is {self.restarts}")
        return self
