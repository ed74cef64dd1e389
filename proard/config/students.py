"""Settings of the training of a single network: the network, its teacher and its loss."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from proard.config.fields import FolderName, Natural, NonNegative, Number, Positive, Settings
from proard.config.losses import Alignment, AnyLoss, Kdiga, Rslad
from proard.config.nets import Named, named_nets
from proard.config.settings import (
    AdversarialTraining,
    KeptType,
    Phase,
    TrainControl,
    TrainTeacher,
    check_alignment,
    check_kept_views,
)

EFFORTS = ("forward_equivalents", "gradients", "steps")


class Effort(Settings):
    """Equal effort: the quantity that is equal in all trainings and determines their `epochs`. Set one of three.

    `forward_equivalents`: those of the supernet's whole training, divided among its phases in proportion to their
    epochs. `gradients`: backward passes per training image; an epoch takes one per attack step and one for the update.
    `steps`: as many optimizer steps as the run's `phases`; `path` adds the teacher's steps if the supernet started from
    the teacher's weights. The comparison refuses trainings of one rule whose counts differ by more than the fraction
    `tolerance`.
    """

    forward_equivalents: Positive | None = None
    gradients: Positive | None = None
    steps: Literal["phases", "path"] | None = None
    tolerance: NonNegative = 0.02

    @model_validator(mode="after")
    def one_rule(self) -> Effort:
        """Require exactly one quantity."""
        given = [key for key in EFFORTS if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"needs one of {', '.join(EFFORTS)}; given: {', '.join(given) or 'none'}")
        return self


class ExperimentTraining(Settings):
    """What every entry of `experiment.trainings` has; `trains` selects the kind, which has further keys."""

    trains: str
    name: FolderName
    seed: Natural | None = None
    effort: Effort | None = None


class Student(AdversarialTraining, ExperimentTraining):
    """An experiment's training of a single network, with any loss of the package.

    `trains`: a `network`, or a `twin`, an arch of the run's space that is compared with the run's subnet of that arch.
    `net` is the name of a network or a space, or the settings of one with its `family`; the default is the run's own
    space. The images are the run's. `arch` is `largest`, `smallest` or a mapping of a space's elastic dims.
    `loss` is any loss of `train_phase` or `train_teacher`, or `plain` cross-entropy; its teacher is the run's.
    `alignment` adds input-gradient matching.
    `clean_noise` adds uniform noise of that many eps to the images of a loss without an attack (KDIGA's random start:
    1). `teacher_logits` and `teacher_gradients` store outputs of a frozen teacher for the views of clean images that
    have occurred: a view's logits, or its input gradient (one number per pixel value).

    `warm_start: teacher` begins with the weights that the subnet of this arch has in the teacher, of the run's own
    space. A twin `beside` a training of a supernet is compared with the subnet of that training, not of the run's.

    `schedule`: `cosine` to zero, `constant`, or `steps`, which divides by ten at 1/2 and 3/4 of the training.
    `keep`: the `best` epoch on val, or the `last`. `seed` is the seed of the training (default: the run's); images,
    their split and the noise of the measurement always use the run's.
    """

    complexity_decay: ClassVar[float] = 0.0

    trains: Literal["network", "twin"] = "network"
    net: Annotated[Named, Field(discriminator="family")] | None = None
    arch: Literal["largest", "smallest"] | dict[str, tuple[Number, ...]] = "largest"
    loss: AnyLoss = Rslad()
    alignment: Alignment | None = None
    clean_noise: NonNegative = 0.0
    warm_start: Literal["teacher", "random"] = "random"
    beside: FolderName | None = None
    teacher_logits: KeptType | None = None
    teacher_gradients: KeptType | None = None
    schedule: Literal["cosine", "constant", "steps"] = "cosine"
    keep: Literal["best", "last"] = "best"

    @property
    def attack_steps(self) -> int:
        """Attack steps of the training; 0 for a loss without an attack."""
        return self.attack.num_steps if self.loss.attacked else 0

    @property
    def needs_teacher(self) -> bool:
        """Whether the training uses a frozen teacher."""
        return self.attack.crafted_on == "teacher" or self.loss.needs_teacher or self.alignment is not None

    @property
    def reads_teacher(self) -> bool:
        """Whether the training reads the teacher's weights, to use the teacher or to start from it."""
        return self.needs_teacher or self.warm_start == "teacher"

    @property
    def has_frozen_teacher(self) -> bool:
        """Always: a teacher can also be used for the attack only."""
        return True

    @property
    def needs_control(self) -> bool:
        """Whether the training uses the plainly trained control."""
        return self.loss.needs_control

    @model_validator(mode="before")
    @classmethod
    def name_becomes_net(cls, value: Any) -> Any:
        """Replace a network's name by its settings."""
        if not isinstance(value, dict) or not isinstance(value.get("net"), str):
            return value
        nets = named_nets()
        if value["net"] not in nets:
            raise ValueError(f"net is {value['net']!r}; networks are {', '.join(sorted(nets))}")
        return {**value, "net": nets[value["net"]].model_dump(mode="json")}

    @model_validator(mode="after")
    def parts_fit(self) -> Student:
        """An alignment at adversarial images needs an attack; stored logits or gradients need a use."""
        check_alignment(self.loss, self.alignment)
        if self.teacher_logits is not None and not self.needs_teacher:
            raise ValueError(f"teacher_logits stores a teacher's logits; loss {self.loss.name} uses no teacher")
        clean = isinstance(self.alignment, Kdiga) and self.alignment.at == "clean"
        if self.teacher_gradients is not None and not clean:
            raise ValueError("teacher_gradients needs an alignment of kdiga with at: clean")
        return self

    @model_validator(mode="after")
    def one_length(self) -> Student:
        """Refuse a length in minutes beside an equal effort."""
        if self.effort is not None and self.minutes is not None:
            raise ValueError("effort and minutes both set the length of the training; remove one")
        return self

    @model_validator(mode="after")
    def twin_is_of_the_runs_space(self) -> Student:
        """Refuse a twin or a start from the teacher's weights in another space; only a twin is beside a supernet."""
        if self.trains == "twin" and self.net is not None:
            raise ValueError("a twin is an arch of the run's own space; remove net")
        if self.warm_start == "teacher" and self.net is not None:
            raise ValueError("warm_start: teacher is for archs of the run's own space; remove net or warm_start")
        if self.beside is not None and self.trains != "twin":
            raise ValueError("beside is for twins: it names the supernet whose subnet the twin is compared with")
        return self

    @model_validator(mode="after")
    def noise_is_the_only_perturbation(self) -> Student:
        """Refuse clean_noise with an attack (which has its own start) or with stored outputs (views never repeat)."""
        if self.clean_noise and self.loss.attacked:
            raise ValueError(f"clean_noise is for losses without an attack; loss {self.loss.name} has one")
        if self.clean_noise and (self.teacher_logits or self.teacher_gradients):
            raise ValueError(
                "clean_noise changes every image in every step; remove teacher_logits and teacher_gradients"
            )
        check_kept_views(self.augment, self.teacher_logits or self.teacher_gradients)
        return self


TrainingSettings = TrainTeacher | TrainControl | Phase | Student
