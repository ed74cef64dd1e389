"""Networks that are trained one by one: what is trained, who teaches, and grids of such trainings written out."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from proard.config.attacks import Attack, TrainingAttack
from proard.config.fields import (
    ConfigError,
    FolderName,
    Int,
    Natural,
    NonNegative,
    Number,
    Positive,
    Settings,
    names_differ,
    parse_number,
    shown,
)
from proard.config.losses import WITHOUT_ATTACK, Distillation, DistillationOptions, RobustObjective
from proard.config.nets import Named, named_nets
from proard.config.settings import KeptType, Optimisation, merge

Loss = Literal["plain", RobustObjective, Distillation]


class Student(Optimisation, DistillationOptions):
    """One network trained by itself, on any loss of the package.

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

    name: FolderName = "student"
    net: Annotated[Named, Field(discriminator="family")] | None = None
    arch: Literal["largest", "smallest"] | dict[str, tuple[Number, ...]] = "largest"
    loss: Loss = "rslad"
    clean_noise: NonNegative = 0.0
    teacher_logits: KeptType | None = None
    teacher_gradients: KeptType | None = None
    schedule: Literal["cosine", "constant", "steps"] = "cosine"
    keep: Literal["best", "last"] = "best"
    seed: Natural | None = None

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
    def noise_is_the_only_perturbation(self) -> Student:
        """Images that change in every step have no view to keep, and an attack its own start."""
        if self.clean_noise and self.loss not in ("plain", *WITHOUT_ATTACK):
            raise ValueError(f"clean_noise is for losses without an attack; loss {self.loss} starts its own")
        if self.clean_noise and (self.teacher_logits or self.teacher_gradients):
            raise ValueError(
                "clean_noise changes every image in every step: teacher_logits, teacher_gradients keep none"
            )
        return self


class TrainStudent(Settings):
    """Networks trained one by one. Keys beside `students` are defaults that each student may override.

    In the config file a student may carry `grid`, lists of values by (dotted) key, and `seeds`, a list: it stands for
    one student per combination, named NAME_key=value_seed=1. `attack_budget: 10` says that `epochs` are those of a
    training with ten attack steps, and gives this one as many as take the same number of gradients.
    """

    students: tuple[Student, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def write_out(cls, value: Any) -> Any:
        """Write the section's shared keys and every combination of a grid out, student by student."""
        if not isinstance(value, dict) or not isinstance(value.get("students"), (list, tuple)):
            return value
        shared = {key: entry for key, entry in value.items() if key != "students"}
        students: list[Any] = []
        for entry in value["students"]:
            students += expand(merge(shared, entry)) if isinstance(entry, dict) else [entry]
        return {"students": students}

    distinct: ClassVar[Any] = names_differ("students")


class EvaluateStudent(Settings):
    """What every student is measured under on `test`, whatever it was trained with: one evaluation for all rows.

    `attacks` and their worst case, at every radius of `eps` (left out: the threat's); at a radius of x times the
    threat's a step is x times as long. A student trained with an attack is also measured under that very attack
    (`own`): what papers report that score a training so. `num_images` takes the first images of `test` alone.
    """

    eps: tuple[Positive, ...] = ()
    num_images: Annotated[Int, Field(ge=2)] | None = None
    attacks: Annotated[tuple[Attack, ...], Field(min_length=1)] = (
        Attack(name="fgsm", num_steps=1, step_size=8 / 255, start="zero"),
        Attack(),
        Attack(name="pgd50x10", num_steps=50, restarts=10),
        Attack(name="cw50x2", objective="margin", num_steps=50, restarts=2),
    )

    distinct: ClassVar[Any] = names_differ("attacks", "worst", "own")


class CompareStudents(Settings):
    """The figures' title; `supernet: true` puts the run's `select_student.budgets` into the same table."""

    title: str = "Students trained one by one"
    supernet: bool = False


def expand(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One student as written into as many as its `grid` and `seeds` stand for.

    Parameters
    ----------
    entry : mapping
        A student's keys; `grid` maps (dotted) keys to lists of values, `seeds` lists seeds. Both may be absent.

    Returns
    -------
    list of dict
        Without `grid` and `seeds`; the last key of the grid and then the seed vary fastest. A name gains
        `_KEY=VALUE` for every key of the grid, its last part alone, with `8-255` for 8/255, and `_seed=N`.
        `attack_budget` becomes `epochs`: every attack step and every update take one gradient.

    Raises
    ------
    ConfigError
        A grid that is no mapping of keys to lists, seeds that are no list, numbers that are none.
    """
    own = {key: value for key, value in entry.items() if key not in ("grid", "seeds")}
    name, grid, seeds = own.get("name", "student"), entry.get("grid", {}), entry.get("seeds", [None])
    if not isinstance(grid, Mapping) or not all(_is_list(values) for values in grid.values()):
        raise ConfigError(f"train_student.{name}.grid is {grid!r}; expected: keys with lists of values each")
    if not _is_list(seeds):
        raise ConfigError(f"train_student.{name}.seeds is {seeds!r}; expected: a list of seeds")
    expanded = []
    for *values, seed in itertools.product(*grid.values(), seeds):
        student, title = copy.deepcopy(own), str(name)
        for key, value in zip(grid, values, strict=True):
            student = merge(student, _nested(key.split("."), value))
            title += f"_{key.split('.')[-1]}={_text(value)}"
        if seed is not None:
            student["seed"], title = seed, f"{title}_seed={seed}"
        expanded.append(_with_budget({**student, "name": title}))
    return expanded


def _with_budget(student: dict[str, Any]) -> dict[str, Any]:
    """A student whose `attack_budget`, where it has one, has become its epochs."""
    budget = student.pop("attack_budget", None)
    if budget is None:
        return student
    attack = student.get("attack", {})
    steps = attack.get("num_steps", TrainingAttack().num_steps) if isinstance(attack, dict) else None
    try:
        own, most, epochs = (float(parse_number(v)) for v in (steps, budget, student.get("epochs", 100)))
        return {**student, "epochs": epochs * (most + 1) / (own + 1)}
    except (TypeError, ValueError, ZeroDivisionError):
        raise ConfigError(
            f"train_student.{student['name']}: attack_budget, epochs and attack.num_steps are numbers; they are "
            f"{shown(budget)}, {shown(student.get('epochs'))} and {shown(steps)}"
        ) from None


def _is_list(value: Any) -> bool:
    """Whether this is a list that holds something."""
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0


def _nested(path: Sequence[str], value: Any) -> Any:
    """`value` under a path of keys."""
    for key in reversed(path):
        value = {key: value}
    return value


def _text(value: Any) -> str:
    """A value as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "", str(value).replace("/", "-")) or "none"
