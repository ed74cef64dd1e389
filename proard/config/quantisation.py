"""How students are quantised, and how their robustness in int8 is measured."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from proard.config.attacks import Attack
from proard.config.fields import Count, Natural, Positive, Settings, UnitInterval, names_differ

OTHER_ATTACKS = ("worst", "union", "scaled", "transfer", "from_teacher", "rounded", "square")


Repair = Literal["range", "ends", "training"]


def each_once(value: tuple[Repair, ...]) -> tuple[Repair, ...]:
    """Refuse a repair that is named twice."""
    if len(set(value)) < len(value):
        raise PydanticCustomError("repairs", "different repairs of range, ends and training")
    return value


class Int8Training(Settings):
    """The training of the repair `training`: SGD on RSLAD, with the float student as teacher of its own int8 file.

    Images of `train` are augmented as in the run's last phase and attacked in `num_steps` steps, 2.5 eps long together,
    through the int8 twin. The learning rate is a cosine from `lr` to zero.
    """

    steps: Count = 150
    batch_size: Count = 64
    lr: Positive = 3e-3
    num_steps: Count = 5


class QuantizeStudent(Settings):
    """int8 files of students, and their robustness on the runtime.

    `attacks` run on both precisions (left out: those of `verify_front`), and beside them transfers, and a search by
    `queries` to the runtime (Square) on every image that all others left; 0 queries leave it out.

    Ranges of activations are calibrated on the first `calibration_images` images of `train`. Twin and runtime must
    give the same class on the share `min_agreement` of the test images, clean and attacked.

    Where int8 loses more than `max_drop` of robust accuracy on val, paired, `repairs` are tried in this order until
    one loses less; the best is kept. `range`: other ranges (a percentile of the activations; 8-bit weights with signed
    activations). `ends`: first and last layer in float32. `training` (not among the defaults): weights trained further
    as int8 rounds them, by the settings of that name. `num_val_images` limits the images of val for that choice.

    `num_images` limits the images of test on which both precisions are measured.
    """

    calibration_images: Count = 512
    num_images: Count | None = None
    num_val_images: Count | None = None
    attacks: tuple[Attack, ...] = ()
    queries: Natural = 1000
    min_agreement: UnitInterval = 0.995
    max_drop: UnitInterval = 0.01
    distinct: ClassVar[Any] = names_differ("attacks", *OTHER_ATTACKS)
    repairs: Annotated[tuple[Repair, ...], AfterValidator(each_once), Field(max_length=3)] = ("range", "ends")
    training: Int8Training = Int8Training()


class ExecutorchStudent(Settings):
    """ExecuTorch programs of students for XNNPACK, in float32 and int8; needs the extra `executorch`.

    With `run: true` the target `all` includes them. They are calibrated on the images and attacked by the attacks of
    `quantize_student`, without its search by queries: the runtime evaluates image by image. The int8 program and its
    twin must give the same class on the share `min_agreement` of the test images, clean and attacked.
    """

    run: bool = False
    min_agreement: UnitInterval = 0.97
