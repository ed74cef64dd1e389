"""A network that is trained alone: what is trained, who teaches, with which loss."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from proard.config.fields import FolderName, Natural, NonNegative, Number, Positive, Settings
from proard.config.losses import WITHOUT_ATTACK, Distillation, DistillationOptions, RobustObjective
from proard.config.nets import Named, named_nets
from proard.config.settings import KeptType, Optimisation

Loss = Literal["plain", RobustObjective, Distillation]
EFFORTS = ("forward_equivalents", "gradients", "steps")


class Effort(Settings):
    """Equal effort: what trainings spend alike; it decides their `epochs`. Exactly one of the first three.

    `forward_equivalents`: of a whole training of the supernet, shared among its phases in proportion to their epochs.
    `gradients`: backward passes for each training image; an epoch takes one for every attack step and one for the
    update. `steps`: as many optimizer steps as the run's `phases` made; `path` adds the teacher's, where the supernet
    began with the teacher's weights. The comparison refuses trainings of one rule whose counts differ by more than the
    share `tolerance`.
    """

    forward_equivalents: Positive | None = None
    gradients: Positive | None = None
    steps: Literal["phases", "path"] | None = None
    tolerance: NonNegative = 0.02

    @model_validator(mode="after")
    def one_rule(self) -> Effort:
        """One quantity is made equal."""
        given = [key for key in EFFORTS if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"needs one of {', '.join(EFFORTS)}; given: {', '.join(given) or 'none'}")
        return self


class Student(Optimisation, DistillationOptions):
    """An experiment's training of one network alone, on any loss of the package.

    `trains`: a `network`, or a `twin`, which is an arch of the run's space that is compared with the run's subnet.
    `net` is the name of a network or of a space, one of them written out with its `family`, or the run's own space
    where it is left out; images are the run's. `arch` is `largest`, `smallest` or a mapping of a space's elastic dims.
    `loss` is any loss of `train_phase` or `train_teacher`, or `plain` cross-entropy; where it asks a teacher, that is
    the run's. `clean_noise` moves the images of a loss without attack by uniform noise of
    so many eps (KDIGA's random start: 1). `teacher_logits` and `teacher_gradients` keep what a frozen teacher says of
    the views of clean images that have come up: a view's logits, its input gradient (as many numbers as it has pixels).

    `schedule`: `cosine` to zero, `constant`, or `steps`, a tenth at half and at three quarters of the training.
    `keep`: the epoch that is `best` on val, or the `last`. `seed` is the seed of the training, the run's where it is
    left out; images, their split and the measurement's noise keep the run's.
    """

    gained = frozenset()
    complexity_decay: ClassVar[float] = 0.0

    trains: Literal["network", "twin"] = "network"
    name: FolderName
    net: Annotated[Named, Field(discriminator="family")] | None = None
    arch: Literal["largest", "smallest"] | dict[str, tuple[Number, ...]] = "largest"
    loss: Loss = "rslad"
    clean_noise: NonNegative = 0.0
    teacher_logits: KeptType | None = None
    teacher_gradients: KeptType | None = None
    schedule: Literal["cosine", "constant", "steps"] = "cosine"
    keep: Literal["best", "last"] = "best"
    seed: Natural | None = None
    effort: Effort | None = None

    @property
    def attack_steps(self) -> int:
        """Attack steps of the training; 0 for a loss without an attack."""
        return 0 if self.loss in ("plain", *WITHOUT_ATTACK) else self.attack.num_steps

    @property
    def needs_teacher(self) -> bool:
        """Whether the training asks a frozen teacher."""
        crafted = self.attack.crafted_on == "teacher"
        return crafted or self.loss in get_args(Distillation) or self.igdm_weight > 0 or self.kdiga_weight > 0

    @property
    def asks_frozen_teacher(self) -> bool:
        """A teacher may also serve the attack alone."""
        return True

    @property
    def needs_control(self) -> bool:
        """Whether the training asks the plainly trained network."""
        return self.loss in ("mtard", "hat")

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
    def terms_fit(self) -> Student:
        """What is matched at adversarial images needs an attack; logits that are kept need a teacher."""
        at_adv = self.igdm_weight > 0 or (self.kdiga_weight > 0 and self.kdiga_at == "adv")
        if self.loss in ("plain", *WITHOUT_ATTACK) and at_adv:
            raise ValueError(f"loss {self.loss} has no attack: igdm_weight and kdiga_at: adv do not fit it")
        if self.teacher_logits is not None and not self.needs_teacher:
            raise ValueError(f"teacher_logits keeps a teacher's logits; loss {self.loss} asks none")
        if self.teacher_gradients is not None and not (self.kdiga_weight > 0 and self.kdiga_at == "clean"):
            raise ValueError("teacher_gradients keeps what kdiga_weight matches at clean images; it matches none there")
        return self

    @model_validator(mode="after")
    def twin_is_of_the_runs_space(self) -> Student:
        """A twin has the arch of a subnet."""
        if self.trains == "twin" and self.net is not None:
            raise ValueError("a twin is an arch of the run's own space: leave net out")
        return self

    @model_validator(mode="after")
    def noise_is_the_only_perturbation(self) -> Student:
        """Images that change in every step have no view to keep, and an attack its own start."""
        if self.clean_noise and self.loss not in ("plain", *WITHOUT_ATTACK):
            raise ValueError(f"clean_noise is for losses without an attack; loss {self.loss} starts its own")
        if self.clean_noise and (self.teacher_logits or self.teacher_gradients):
            raise ValueError(
                "clean_noise changes every image in every step: teacher_logits, teacher_gradients keep none"
            )
        return self
