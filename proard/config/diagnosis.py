"""Settings of the diagnosis: which networks are compared with the teacher, and how finely."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from proard.config.budgets import OneBudget
from proard.config.fields import Count, FolderName, Int, Natural, Number, PixelLength, Positive, Settings, names_differ

TEACHER = "teacher"


def in_ascending_order(values: tuple[float, ...]) -> tuple[float, ...]:
    """Refuse values that repeat or fall: they become an axis."""
    if list(values) != sorted(set(values)):
        raise PydanticCustomError("ascending", "different numbers in ascending order")
    return values


Shares = Annotated[
    tuple[Annotated[Number, Field(gt=0, le=1)], ...], Field(min_length=1), AfterValidator(in_ascending_order)
]
Sigmas = Annotated[tuple[Positive, ...], AfterValidator(in_ascending_order)]


class Diagnosed(Settings):
    """A network beside the teacher: the exported student of a `budget`, a `file`, or the run's subnet of an `arch`.

    A file is an exported student or a network trained by itself (student, teacher, control), in safetensors. `arch` is
    `largest`, `smallest` or a mapping of elastic dims.
    """

    name: FolderName
    budget: OneBudget | None = None
    file: str | None = None
    arch: Literal["largest", "smallest"] | dict[str, tuple[Number, ...]] | None = None

    @model_validator(mode="after")
    def names_one_network(self) -> Diagnosed:
        """Exactly one source; `teacher` is always there."""
        given = [key for key in ("budget", "file", "arch") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"needs one of budget, file and arch; given: {', '.join(given) or 'none'}")
        if self.name == TEACHER:
            raise ValueError(f"a network named {TEACHER} is diagnosed without being listed; name this one otherwise")
        return self


class Clever(Settings):
    """CLEVER radii of the first `num_images` (0: none), in both norms, from gradients in balls of these radii.

    `num_maxima` points, each the largest of `num_samples` gradient norms, are fitted for each of the `targets`
    strongest wrong classes (all of them if left out, as in the paper, which takes 500 points of 1,024 samples).
    """

    num_images: Natural = 50
    linf_radius: PixelLength = 16 / 255
    l2_radius: Positive = 1.0
    num_maxima: Annotated[Int, Field(ge=10)] = 50
    num_samples: Count = 16
    targets: Count | None = None


class Smoothing(Settings):
    """Randomised smoothing of the first `num_images` (0: none), for every standard deviation of `sigmas`.

    `num_choose` noisy copies choose the class, `num_certify` others certify it; a certificate is wrong with probability
    `alpha` at most.
    """

    num_images: Natural = 100
    sigmas: Sigmas = (0.12, 0.25)
    num_choose: Count = 100
    num_certify: Count = 1000
    alpha: Annotated[Number, Field(gt=0, lt=0.5)] = 0.001


class Diagnose(Settings):
    """Networks beside their teacher: the terms of KDIGA's bound, radii, and who is aligned and who stands.

    The bound is taken on the first `num_images` of `test`, at every radius of `shares` (of `threat.eps`), at points
    that `restarts` of `num_steps` steps find.
    """

    networks: tuple[Diagnosed, ...] = ()
    num_images: Annotated[Int, Field(ge=2)] = 200
    shares: Shares = (0.25, 0.5, 1.0)
    num_steps: Count = 20
    restarts: Count = 2
    clever: Clever = Clever()
    smoothing: Smoothing = Smoothing()

    distinct: ClassVar[Any] = names_differ("networks")
