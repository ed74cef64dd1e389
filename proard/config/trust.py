"""Settings of the stages that examine an exported student: AutoAttack, and checks for masked gradients."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from proard.config.fields import Count, Int, Settings

LEAST_CLASSES = 4  # AutoAttack's targeted loss divides by a difference of the first and the third or fourth logit


class AutoattackStudent(Settings):
    """Standard AutoAttack on the exported students: the first `num_images` of `test` (by default all).

    With `run: true` the target `all` includes it. Images are attacked in blocks of `block_size`; a killed job
    continues after the last complete attack on a block. Images that are misclassified under the run's own
    attacks are not attacked again, unless `attack_all` is true: then the accuracy is that of AutoAttack alone,
    as RobustBench lists it.
    """

    run: bool = False
    num_images: Count | None = None
    block_size: Count = 250
    attack_all: bool = False


class CheckStudent(Settings):
    """Twelve checks of the exported students for masked gradients, on the first `num_images` of `test`.

    With `run: true` the target `all` includes them.
    """

    run: bool = False
    num_images: Annotated[Int, Field(ge=10)] = 200
