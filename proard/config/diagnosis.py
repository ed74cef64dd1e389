"""Settings of the diagnosis: the networks compared with the teacher, and the numbers of images, radii and samples."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from proard.config.budgets import OneBudget
from proard.config.fields import Count, FolderName, Int, Natural, Number, PixelLength, Positive, Settings, names_differ

TEACHER = "teacher"


def in_ascending_order(values: tuple[float, ...]) -> tuple[float, ...]:
    """Refuse values that repeat or are not in ascending order: they become an axis."""
    if list(values) != sorted(set(values)):
        raise PydanticCustomError("ascending", "different numbers in ascending order")
    return values


Shares = Annotated[
    tuple[Annotated[Number, Field(gt=0, le=1)], ...], Field(min_length=1), AfterValidator(in_ascending_order)
]
Sigmas = Annotated[tuple[Positive, ...], AfterValidator(in_ascending_order)]


class Diagnosed(Settings):
    """A network to compare with the teacher: an exported student (`budget`), a `file`, or a subnet of the run (`arch`).

    A file is an exported student or a separately trained network (student, teacher, control), in safetensors. `arch` is
    `largest`, `smallest` or a mapping of elastic dims.
    """

    name: FolderName
    budget: OneBudget | None = None
    file: str | None = None
    arch: Literal["largest", "smallest"] | dict[str, tuple[Number, ...]] | None = None

    @model_validator(mode="after")
    def names_one_network(self) -> Diagnosed:
        """Require exactly one source; the name `teacher` is reserved."""
        given = [key for key in ("budget", "file", "arch") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"needs one of budget, file and arch; given: {', '.join(given) or 'none'}")
        if self.name == TEACHER:
            raise ValueError(f"the name {TEACHER} is reserved: the teacher is always diagnosed; choose another name")
        return self


class Clever(Settings):
    """CLEVER radii of the first `num_images` images (0: none), from gradients in balls of both norms.

    For each of the `targets` strongest wrong classes a distribution is fitted to `num_maxima` points. Each point is the
    largest of `num_samples` gradient norms. Without `targets` all wrong classes are used, as in the paper, which takes
    500 points of 1,024 samples.
    """

    num_images: Natural = 50
    linf_radius: PixelLength = 16 / 255
    l2_radius: Positive = 1.0
    num_maxima: Annotated[Int, Field(ge=10)] = 50
    num_samples: Count = 16
    targets: Count | None = None


class Smoothing(Settings):
    """Randomised smoothing of the first `num_images` images (0: none), for every standard deviation in `sigmas`.

    `num_choose` noisy copies select the class and `num_certify` other copies certify it. A certificate is wrong with a
    probability of at most `alpha`.
    """

    num_images: Natural = 100
    sigmas: Sigmas = (0.12, 0.25)
    num_choose: Count = 100
    num_certify: Count = 1000
    alpha: Annotated[Number, Field(gt=0, lt=0.5)] = 0.001


class Diagnose(Settings):
    """Comparison of networks with their teacher: the terms of KDIGA's bound, radii, gradient alignment and robustness.

    The bound is computed on the first `num_images` of `test`, for every radius of `shares` (in units of `threat.eps`),
    at points found by `restarts` attacks of `num_steps` steps.
    """

    networks: tuple[Diagnosed, ...] = ()
    num_images: Annotated[Int, Field(ge=2)] = 200
    shares: Shares = (0.25, 0.5, 1.0)
    num_steps: Count = 20
    restarts: Count = 2
    clever: Clever = Clever()
    smoothing: Smoothing = Smoothing()

    distinct: ClassVar[Any] = names_differ("networks")
