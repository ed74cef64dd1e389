"""One settings class per stage. Lengths of perturbations are in pixel units of [0, 1]; rates are fractions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from proard.config.attacks import Attack, Dtype, TrainingAttack
from proard.config.budgets import Budgets
from proard.config.fields import (
    Count,
    Extended,
    Int,
    Natural,
    NonNegative,
    Number,
    PixelLength,
    Positive,
    Settings,
    Share,
    names_differ,
)
from proard.config.losses import WITHOUT_ATTACK, Distillation, DistillationOptions, RobustObjective, RobustOptions

KeptType = Literal["float32", "float16"]  # of teacher outputs that are kept in a table


class Measurement(Settings):
    """How every subnet is measured, the same in evaluation, verification, selection and export.

    `accounting`: `any_iterate` counts an image as lost if any iterate is misclassified, `last_iterate` (the papers')
    looks at the last one only. `recalibration_images` of `train` reset the batch-norm statistics of each subnet.
    """

    accounting: Literal["any_iterate", "last_iterate"] = "any_iterate"
    recalibration_images: Annotated[Int, Field(ge=2)] = 1000
    batch_size: Count = 250


class Augmentation(Settings):
    """Random crop from an image padded by `crop_padding` black pixels, and a mirror image half of the time."""

    crop_padding: Natural = 4
    flip: bool = True


class Validation(Settings):
    """Measurement on `val` during training, every so many epochs; the best epoch by robust accuracy is kept.

    `overfitting` watches for catastrophic overfitting, the failure of training with one or two attack steps: the same
    images are also attacked as in training, and where PGD leaves less than `overfitting_ratio` of the accuracy that
    the training's attack leaves, `warn` says so and `stop` ends the training there, with its best weights so far.
    Left out, it is `warn` for attacks of one or two steps and `off` for longer ones.
    """

    every_epochs: Count = 5
    num_images: Count = 500
    num_steps: Count = 10
    step_size: PixelLength = 2 / 255
    overfitting: Literal["warn", "stop", "off"] | None = None
    overfitting_ratio: Share = 0.5

    def watch(self, attack: TrainingAttack) -> Literal["warn", "stop", "off"]:
        """What the monitor of catastrophic overfitting does in a training with this attack."""
        return self.overfitting or ("warn" if 1 <= attack.num_steps <= 2 else "off")


class Optimisation(Extended):
    """Linear warm-up and cosine decay of the learning rate; EMA of the weights.

    `optimizer`: `sgd` with Nesterov momentum, `adamw`, or `muon`, which orthogonalises the momentum of convolutions and
    moves all else as `sgd` does, without decay. Under the last two `weight_decay` takes `lr * weight_decay` of a weight
    in every step.
    """

    gained = frozenset({"optimizer"})

    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    epochs: Positive = 100
    warmup_epochs: NonNegative = 0
    batch_size: Count = 128
    lr: Positive = 0.1
    momentum: Share = 0.9
    weight_decay: NonNegative = 5e-4
    ema_decay: Share = 0.999
    clip_norm: Positive | None = None
    augment: Augmentation = Augmentation()
    attack: TrainingAttack = TrainingAttack()
    validation: Validation = Validation()
    dtype: Dtype = "float32"
    save_every_minutes: Positive = 5

    @property
    def asks_frozen_teacher(self) -> bool:
        """Whether a frozen teacher is there to be attacked."""
        return False

    @model_validator(mode="after")
    def attacked_network_is_there(self) -> Optimisation:
        """Images are crafted on a teacher only where there is one."""
        if self.attack.crafted_on == "teacher" and not self.asks_frozen_teacher:
            raise ValueError("attack.crafted_on is teacher; this training has no frozen teacher")
        return self


class OfOneNetwork:
    """What a training of teacher or control has in place of settings that only phases and students have."""

    schedule: ClassVar[Literal["cosine", "constant", "steps"]] = "cosine"
    keep: ClassVar[Literal["best", "last"]] = "best"
    clean_noise: ClassVar[float] = 0.0
    complexity_decay: ClassVar[float] = 0.0
    teacher_logits: ClassVar[KeptType | None] = None
    teacher_gradients: ClassVar[KeptType | None] = None


class TrainTeacher(Optimisation, RobustOptions, OfOneNetwork):
    """The fixed robust network. `arch` is `largest` or a mapping of elastic dims; `space` names another space or net.

    `source`: `train` it here, take a `file` that this package wrote, or convert a `file` that holds a WideResNet as
    TRADES publishes it (`trades`; nothing but tensors is read).

    `objective`: `plain`, `pgd_at` (also called `sat`), `trades`, `mart` or `hat`, whose helper is the run's control.
    """

    source: Literal["train", "file", "trades"] = "train"
    file: str | None = None
    space: str | None = None
    arch: Literal["largest"] | dict[str, tuple[Number, ...]] = "largest"
    objective: Literal["plain", "pgd_at", "sat", "trades", "mart", "hat"] = "trades"

    @property
    def needs_control(self) -> bool:
        """Whether the training asks the plainly trained network."""
        return self.source == "train" and self.objective == "hat"

    @model_validator(mode="after")
    def file_is_named(self) -> TrainTeacher:
        """A teacher from a file needs the file."""
        if self.source != "train" and self.file is None:
            wanted = "a teacher.safetensors" if self.source == "file" else "a WideResNet checkpoint of TRADES' layout"
            raise ValueError(f"source {self.source} needs `file`: the path of {wanted}")
        return self


class TrainControl(Optimisation, OfOneNetwork):
    """The plainly trained network of the teacher's size: what robust training is compared with."""

    helper_reach: ClassVar[float] = 1.0
    awp_gamma: ClassVar[float] = 0.0
    awp_warmup_epochs: ClassVar[float] = 0.0
    needs_control: ClassVar[bool] = False


class Phase(Optimisation, DistillationOptions):
    """One leg of progressive distillation: which choices are open, who is drawn, who teaches, with which loss.

    `width`, `depth`, `expand`, `kernel` list the open choices; an omitted dim is fully open. `teacher` is `frozen` (a
    separate network), `dynamic` (the largest subnet, trained jointly on `teacher_objective`) or `both`, with
    `frozen_weight` as the frozen one's share. `warm_start` picks where the weights come from. `sort_channels` `l1`
    first moves the channels that weigh most to the front, among those that no trained subnet tells apart.

    `sampling`: `per_pass`, `uniform`, `sandwich`; `progressive` is uniform among choices that open with the training
    (width, kernel, depth, expand, as far as there is a choice, an equal part each); `pareto` is the sandwich whose
    inner subnets win a comparison of `pareto_candidates` at a drawn cost, the `best` or the `worst` by their loss on
    the batch (`pareto_pick`).

    `forward_equivalents` stretches `epochs`, and `warmup_epochs` with them, until the phase spends that many: phases of
    different strategies then take equally many gradient evaluations. `complexity_decay` above 0 is a complexity-aware
    learning rate: a subnet's gradients shrink by (1 - share of the training done)^(complexity_decay * c), where c falls
    with log-MACs from 1 for the smallest subnet of the space to 0 for the largest.

    `keep`: the epoch that is `best` on val, by robust accuracy of the validated subnets, or the `last`.
    `teacher_logits` keeps the frozen teacher's logits of every view of the clean images that has come up, in a table on
    the device: images * (2 crop_padding + 1)^2 * 2 if mirrored * classes numbers, 324 MB in float32 for CIFAR-10.
    """

    gained = Optimisation.gained | {
        "kernel",
        "sort_channels",
        "forward_equivalents",
        "complexity_decay",
        "loss_scale",
        "keep",
    }
    schedule: ClassVar[Literal["cosine", "constant", "steps"]] = "cosine"
    clean_noise: ClassVar[float] = 0.0
    teacher_gradients: ClassVar[KeptType | None] = None

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "phase"
    width: tuple[Positive, ...] | None = None
    depth: tuple[Natural, ...] | None = None
    expand: tuple[Positive, ...] | None = None
    kernel: tuple[Count, ...] | None = None
    sort_channels: Literal["none", "l1"] = "none"
    sampling: Literal["per_pass", "uniform", "sandwich", "progressive", "pareto"] = "sandwich"
    archs_per_step: Count = 3
    pareto_candidates: Count = 3
    pareto_pick: Literal["best", "worst"] = "worst"
    loss: Distillation = "rslad"
    teacher: Literal["frozen", "dynamic", "both"] = "frozen"
    frozen_weight: Share = 0.5
    teacher_logits: KeptType | None = None
    teacher_objective: RobustObjective = "trades"
    warm_start: Literal["teacher", "random"] = "teacher"
    forward_equivalents: Positive | None = None
    complexity_decay: Annotated[Number, Field(ge=0, le=10)] = 0.0
    keep: Literal["best", "last"] = "best"

    @property
    def asks_frozen_teacher(self) -> bool:
        """A dynamic teacher is itself trained in the step."""
        return self.teacher == "frozen"

    @property
    def needs_control(self) -> bool:
        """Whether the training asks the plainly trained network."""
        return self.loss == "mtard" or (self.teacher != "frozen" and self.teacher_objective == "hat")

    @model_validator(mode="after")
    def terms_fit(self) -> Phase:
        """What is matched at adversarial images needs an attack."""
        if self.loss in WITHOUT_ATTACK and (self.igdm_weight > 0 or (self.kdiga_weight > 0 and self.kdiga_at == "adv")):
            raise ValueError(f"loss {self.loss} has no attack: igdm_weight and kdiga_at: adv do not fit it")
        return self

    @model_validator(mode="after")
    def kept_logits_are_a_frozen_teachers(self) -> Phase:
        """A teacher that learns has no logits to keep."""
        if self.teacher_logits is not None and self.teacher == "dynamic":
            raise ValueError("teacher_logits keeps those of a frozen teacher; teacher is dynamic")
        return self


class TrainPhase(Settings):
    """The ordered phases. Keys beside `phases` are defaults that each phase may override."""

    phases: Annotated[tuple[Phase, ...], Field(min_length=1)] = (Phase(name="all"),)

    @model_validator(mode="before")
    @classmethod
    def spread_defaults(cls, value: Any) -> Any:
        """Write the section's shared keys into each phase that does not override them."""
        if not isinstance(value, dict) or not isinstance(value.get("phases"), (list, tuple)):
            return value
        shared = {key: entry for key, entry in value.items() if key != "phases"}
        return {"phases": [merge(shared, phase) if isinstance(phase, dict) else phase for phase in value["phases"]]}

    distinct: ClassVar[Any] = names_differ("phases")


def merge(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return `own` over `shared`, mapping by mapping."""
    merged = dict(shared)
    for key, value in own.items():
        both_mappings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both_mappings else value
    return merged


class SampleArchs(Settings):
    """How many subnets are measured for the predictor, in how many strata of MACs."""

    num_archs: Annotated[Int, Field(ge=4)] = 200
    strata: Count = 10


class EvaluateArchs(Settings):
    """Labels of the predictor: `num_images` of `val` under `attack`, `archs_per_shard` subnets per job."""

    archs_per_shard: Count = 50
    num_images: Annotated[Int, Field(ge=2)] = 1000
    attack: Attack = Attack()


class FitPredictor(Settings):
    """Models compared by cross-validation on the training archs; quality is reported on held-out archs."""

    models: Annotated[tuple[Literal["ridge", "gp", "forest", "boosting", "mlp"], ...], Field(min_length=1)] = (
        "ridge",
        "gp",
        "forest",
        "boosting",
        "mlp",
    )
    held_out: Annotated[Int, Field(ge=2)] = 40
    folds: Annotated[Int, Field(ge=2)] = 5
    top_k: Count = 5
    bootstraps: Count = 500

    @property
    def least_archs(self) -> int:
        """Measured archs without which nothing can be fitted: those held out, and three in every fold."""
        return self.held_out + 3 * self.folds


class SearchFront(Settings):
    """NSGA-II and random search at the same number of evaluations; `max_cost` limits `cost` (a table column).

    Where at most `enumerate_up_to` archs are within the limit, all of them are predicted (a million takes seconds, or
    half a minute with the slowest model): their exact front joins the archive, and both searches' hypervolume is given
    relative to it.
    """

    cost: Literal["macs", "params"] = "macs"
    population: Annotated[Int, Field(ge=4)] = 100
    generations: Count = 50
    max_cost: Positive | None = None
    enumerate_up_to: Natural = 1_000_000


class VerifyFront(Settings):
    """Archs of each search that are measured on val and on test, under `attacks`, with their worst case."""

    num_archs: Count = 8
    num_val_images: Count | None = None
    attacks: Annotated[tuple[Attack, ...], Field(min_length=1)] = (
        Attack(),
        Attack(name="pgd50x2", num_steps=50, restarts=2),
        Attack(name="cw50x2", objective="margin", num_steps=50, restarts=2),
    )

    distinct: ClassVar[Any] = names_differ("attacks", "worst")


class SelectStudent(Settings):
    """Budgets such as `macs=150M`, one or a list; of each the `candidates` best by prediction are measured on val."""

    budgets: Budgets = ()
    candidates: Count = 5
    num_images: Count | None = None
    attack: Attack = Attack()


class ExportStudent(Settings):
    """Formats beside safetensors are always written; `opset` is the ONNX operator set."""

    opset: Annotated[Int, Field(ge=18)] = 20
    license: str = "unspecified"
    tolerance: Positive = 1e-5


class Report(Extended):
    """The page's title, and the country (ISO 3166, three letters) whose electricity converts energy to emissions."""

    gained = frozenset({"country"})

    title: str = "Robust students for every budget"
    country: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USA"
