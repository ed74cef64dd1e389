"""Settings of the twin experiment: subnets of the supernet beside networks of the same arch trained alone."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from proard.config.fields import Count, Int, Natural, Positive, Settings


class MeasureTwin(Settings):
    """Images of val and of test on which a twin and its subnet are measured; all of them where left out."""

    num_val_images: Count | None = None
    num_test_images: Count | None = None


class CompareTwins(Settings):
    """Which archs get a twin, how long it is trained, and the interval of the gap.

    One arch is drawn from each of `num_archs` equal parts of the range of log-MACs, whatever its accuracy; each is
    trained once per seed of `seeds`. `budget`: `steps` gives a twin as many optimizer steps as all phases made, `path`
    those and the teacher's, where the supernet began with the teacher's weights; a number is a number of epochs.
    `student` overrides keys of `train_student` in the twins, which otherwise have the last phase's. The gap's interval
    comes from `bootstraps` redraws of the images.
    """

    num_archs: Annotated[Int, Field(ge=2)] = 4
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)] = (0,)
    budget: Literal["steps", "path"] | Positive = "steps"
    student: Annotated[dict[str, Any], Field(default_factory=dict)]
    bootstraps: Count = 2000
