"""One settings class per stage. Lengths of perturbations are in pixel units of [0, 1]; rates are fractions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from proard.config.attacks import LABEL, STRONG, Attack, Dtype, TrainingAttack
from proard.config.budgets import Budgets
from proard.config.fields import (
    Count,
    Int,
    Natural,
    NonNegative,
    Number,
    PixelLength,
    Positive,
    Settings,
    UnitInterval,
    names_differ,
)
from proard.config.losses import (
    Alignment,
    DistillationLoss,
    Igdm,
    Kdiga,
    Loss,
    Plain,
    RobustLoss,
    Rslad,
    TeacherLoss,
    Trades,
    merge,
)

KeptType = Literal["float32", "float16"]  # type of stored teacher outputs


class Measurement(Settings):
    """Measurement of a subnet, equal in evaluation, verification, selection and export.

    `accounting`: with `any_iterate` an image counts as misclassified if any iterate of the attack is; with
    `last_iterate` (as in the papers) only the last iterate counts. The batch-norm statistics of each subnet are
    recomputed on `recalibration_images` images of `train`.
    """

    accounting: Literal["any_iterate", "last_iterate"] = "any_iterate"
    recalibration_images: Annotated[Int, Field(ge=2)] = 1000
    batch_size: Count = 250


class Augmentation(Settings):
    """Random crop from an image padded by `crop_padding` black pixels, mirrored with probability 1/2.

    `crop_shift` instead of random crops: a part of the image is put at a random place on black; the number of rows and
    columns that are cut off together is uniform between 0 and this number (CropShift; 11 on CIFAR-10).
    """

    crop_padding: Natural = 4
    flip: bool = True
    crop_shift: Natural = 0

    @model_validator(mode="after")
    def crops_or_shifts(self) -> Augmentation:
        """Refuse both kinds of crops together."""
        if self.crop_shift and self.crop_padding:
            raise ValueError("crop_shift takes the place of random crops: write crop_padding: 0 beside it")
        return self


class Validation(Settings):
    """Measurement on `val` during every training, every so many epochs; the most robust epoch is kept.

    `overfitting` monitors catastrophic overfitting, a failure of training with one or two attack steps. The same images
    are also attacked as in training, and the two robust accuracies are compared. If that under PGD is below half of
    that under the training's attack, `warn` prints a warning, and `stop` ends the training and keeps its best weights
    so far. The default is `warn` for attacks of one or two steps and `off` for longer ones.
    """

    every_epochs: Count = 5
    num_images: Count = 500
    num_steps: Count = 10
    step_size: PixelLength = 2 / 255
    overfitting: Literal["warn", "stop", "off"] | None = None

    def step_lengths(self, eps: float) -> list[float]:
        """The length of each step, in pixel units; equal at every radius."""
        return [self.step_size] * self.num_steps

    def watch(self, attack: TrainingAttack) -> Literal["warn", "stop", "off"]:
        """Action of the monitor of catastrophic overfitting in a training with this attack."""
        return self.overfitting or ("warn" if 1 <= attack.num_steps <= 2 else "off")


class Optimisation(Settings):
    """Linear warm-up and cosine decay of the learning rate; exponential moving average (EMA) of the weights.

    `optimizer`: `sgd` with Nesterov momentum, `adamw`, or `muon`, which orthogonalises the momentum of convolutions and
    updates all other weights as `sgd` does, without decay. With `adamw` and `muon` every step subtracts `lr *
    weight_decay` times the weight.

    With `minutes` a training takes at most that long, validation and saving included. If the measured speed does not
    allow all `epochs`, it makes fewer steps, over which its whole schedule is spread: warm-up, decay, and all else that
    changes during a training. Two such trainings differ, as the number of steps depends on the machine's speed.
    """

    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    epochs: Positive = 100
    warmup_epochs: NonNegative = 0
    minutes: Positive | None = None
    batch_size: Count = 128
    lr: Positive = 0.1
    momentum: UnitInterval = 0.9
    weight_decay: NonNegative = 5e-4
    ema_decay: UnitInterval = 0.999
    clip_norm: Positive | None = None
    augment: Augmentation = Augmentation()
    dtype: Dtype = "float32"


class WeightPerturbation(Settings):
    """Adversarial weight perturbation (AWP): Wu et al., NeurIPS 2020, arXiv:2004.05884.

    From `warmup_epochs` on, the loss is computed at weights that are moved against it by the fraction `gamma` of each
    layer's norm.
    """

    gamma: Positive = 5e-3
    warmup_epochs: NonNegative = 0


class AdversarialTraining(Optimisation):
    """An optimisation with an attack and, if `awp` is set, with perturbed weights."""

    attack: TrainingAttack = TrainingAttack()
    awp: WeightPerturbation | None = None

    @property
    def has_frozen_teacher(self) -> bool:
        """Whether the training has a frozen teacher that can be attacked."""
        return False

    @model_validator(mode="after")
    def attacked_network_is_there(self) -> AdversarialTraining:
        """Require a frozen teacher if images are attacked on it."""
        if self.attack.crafted_on == "teacher" and not self.has_frozen_teacher:
            raise ValueError("attack.crafted_on is teacher; this training has no frozen teacher")
        return self


class OfOneNetwork:
    """Fixed values, in trainings of teacher and control, of settings that only phases and students have."""

    schedule: ClassVar[Literal["cosine", "constant", "steps"]] = "cosine"
    keep: ClassVar[Literal["best", "last"]] = "best"
    clean_noise: ClassVar[float] = 0.0
    complexity_decay: ClassVar[float] = 0.0
    alignment: ClassVar[Alignment | None] = None
    teacher_logits: ClassVar[KeptType | None] = None
    teacher_gradients: ClassVar[KeptType | None] = None


class TrainTeacher(AdversarialTraining, OfOneNetwork):
    """The fixed robust network. `arch` is `largest` or a mapping of elastic dims; `space` is another space or network.

    `source`: `train` trains it here, `file` uses a file written by this package, `trades` converts a WideResNet
    checkpoint in the format that the authors of TRADES published, `deepmind` a WideResNet or pre-activation ResNet in
    the format of DeepMind's code (only tensors are read).

    `objective`: `plain`, `pgd_at` (also called `sat`), `trades`, `mart`, `hat`, `ikl` or `adr`, or a mapping with this
    `name` and options. The helper network of `hat` is the run's control.
    """

    source: Literal["train", "file", "trades", "deepmind"] = "train"
    file: str | None = None
    space: str | None = None
    arch: Literal["largest"] | dict[str, tuple[Number, ...]] = "largest"
    objective: TeacherLoss = Trades()

    @property
    def needs_control(self) -> bool:
        """Whether the training uses the plainly trained control."""
        return self.source == "train" and self.objective.needs_control

    @model_validator(mode="after")
    def file_is_named(self) -> TrainTeacher:
        """Require `file` for a teacher from a file."""
        if self.source != "train" and self.file is None:
            formats = {"trades": "a WideResNet checkpoint in TRADES' format", "deepmind": "a checkpoint in DeepMind's"}
            wanted = formats.get(self.source, "a teacher.safetensors")
            raise ValueError(f"source {self.source} needs `file`: the path of {wanted}")
        return self


class TrainControl(Optimisation, OfOneNetwork):
    """The plainly trained network of the teacher's size: the baseline for robust training.

    The epoch with the highest clean accuracy on val is kept.
    """

    objective: ClassVar[Plain] = Plain()
    attack: ClassVar[TrainingAttack] = TrainingAttack()
    awp: ClassVar[WeightPerturbation | None] = None
    needs_control: ClassVar[bool] = False


class Phase(AdversarialTraining):
    """One phase of progressive distillation: its open choices, sampled subnets, teacher and loss.

    `width`, `depth`, `expand`, `kernel` list the open choices, from which subnets are sampled; without a list all
    choices of that dim are open. `loss` is a distillation loss: its name, or a mapping with `name` and options.
    `alignment` adds input-gradient matching (`kdiga` or `igdm`, with its `weight`). `teacher` is `frozen` (a separate
    network), `dynamic` (the largest subnet, trained jointly on `teacher_objective`) or `both`, with weight
    `frozen_weight` for the frozen one. `warm_start` selects the initial weights. `sort_channels: l1` first moves the
    most important channels to the front. It exchanges only channels that each trained subnet has all or none of.

    `sampling`: `per_pass`, `uniform`, `sandwich`, `progressive` or `pareto`. `progressive` samples uniformly; the
    choices of width, kernel, depth and expand open one after the other during the training, each dim with several
    choices for an equal part. `pareto` is the sandwich in which each inner subnet is the one of three at a random cost
    with the highest loss on the batch.

    `arch_pool`: `uniform` and `sandwich` draw their subnets from a pool of so many, which is drawn anew for every pass
    over the data. On a GPU the attack steps of subnets that recur are replayed as CUDA graphs.

    `forward_equivalents` scales `epochs` and `warmup_epochs` so that the phase takes that many; phases with different
    sampling then have equal effort. `complexity_decay` above 0 is a complexity-aware learning rate: a subnet's
    gradients are multiplied by (1 - completed fraction of the training)^(complexity_decay * c). c decreases linearly
    with log-MACs from 1 for the smallest subnet of the space to 0 for the largest.

    `keep`: the `best` epoch by robust accuracy of the validated subnets on val, or the `last`.
    `teacher_logits` stores the frozen teacher's logits of every view of the clean images that has occurred, in a table
    on the device. Its size is images * (2 crop_padding + 1)^2 * 2 if mirrored * classes numbers: 324 MB in float32 for
    CIFAR-10.
    """

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
    arch_pool: Count | None = None
    loss: DistillationLoss = Rslad()
    alignment: Alignment | None = None
    teacher: Literal["frozen", "dynamic", "both"] = "frozen"
    frozen_weight: UnitInterval = 0.5
    teacher_logits: KeptType | None = None
    teacher_objective: RobustLoss = Trades()
    warm_start: Literal["teacher", "random"] = "teacher"
    forward_equivalents: Positive | None = None
    complexity_decay: Annotated[Number, Field(ge=0, le=10)] = 0.0
    keep: Literal["best", "last"] = "best"

    @property
    def has_frozen_teacher(self) -> bool:
        """Whether the only teacher is frozen; a dynamic teacher is itself trained in the step."""
        return self.teacher == "frozen"

    @property
    def needs_control(self) -> bool:
        """Whether the training uses the plainly trained control."""
        return self.loss.needs_control or (self.teacher != "frozen" and self.teacher_objective.needs_control)

    @model_validator(mode="after")
    def parts_fit(self) -> Phase:
        """Refuse an alignment at images that are not made, stored logits of a teacher that is trained, two lengths."""
        check_alignment(self.loss, self.alignment)
        if self.forward_equivalents is not None and self.minutes is not None:
            raise ValueError("forward_equivalents and minutes both set the length of the phase; remove one")
        if self.teacher_logits is not None and self.teacher == "dynamic":
            raise ValueError("teacher_logits stores logits of a frozen teacher; teacher is dynamic")
        check_kept_views(self.augment, self.teacher_logits)
        if self.arch_pool is not None and self.sampling not in ("uniform", "sandwich"):
            raise ValueError(f"arch_pool is for sampling uniform and sandwich; sampling is {self.sampling}")
        if self.arch_pool is not None and self.arch_pool < self.archs_per_step:
            raise ValueError(f"arch_pool {self.arch_pool} is smaller than archs_per_step {self.archs_per_step}")
        return self


def check_kept_views(augment: Augmentation, kept: Any) -> None:
    """Refuse stored outputs of a teacher where views of an image seldom repeat."""
    if kept and augment.crop_shift:
        raise ValueError(
            "teacher_logits and teacher_gradients store outputs by view, and crop_shift has too many views; remove one"
        )


def check_alignment(loss: Loss, alignment: Igdm | Kdiga | None) -> None:
    """Refuse input-gradient matching at adversarial images for a loss without an attack."""
    if alignment is not None and alignment.at_adversarial and not loss.attacked:
        raise ValueError(
            f"loss {loss.name} has no attack, but alignment {alignment.name} is at adversarial images; "
            "use kdiga with at: clean"
        )


class TrainPhase(Settings):
    """The ordered phases. Keys beside `phases` are defaults that each phase may override."""

    phases: Annotated[tuple[Phase, ...], Field(min_length=1)] = (Phase(name="all"),)

    @model_validator(mode="before")
    @classmethod
    def spread_defaults(cls, value: Any) -> Any:
        """Copy the section's shared keys into each phase that does not override them."""
        phases = value.get("phases", [{"name": "all"}]) if isinstance(value, dict) else None
        if not isinstance(phases, (list, tuple)):
            return value
        shared = {key: entry for key, entry in value.items() if key != "phases"}
        return {"phases": [merge(shared, phase) if isinstance(phase, dict) else phase for phase in phases]}

    distinct: ClassVar[Any] = names_differ("phases")


class SampleArchs(Settings):
    """Number of subnets that are measured for the predictor, and number of strata of MACs."""

    num_archs: Annotated[Int, Field(ge=4)] = 200
    strata: Count = 10


class EvaluateArchs(Settings):
    """Labels of the predictor: accuracy on `num_images` of `val` under `attack`; `archs_per_shard` subnets per job."""

    archs_per_shard: Count = 50
    num_images: Annotated[Int, Field(ge=2)] = 1000
    attack: Attack = LABEL


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
        """The minimum number of measured archs for a fit: those held out, and three in every fold."""
        return self.held_out + 3 * self.folds


class VerifyFront(Settings):
    """Measurement of `num_archs` archs of each search on val and test, under each of `attacks` and their worst case.

    The report compares predictions with the accuracy under the attack of `evaluate_archs`, which should be one of them.
    """

    num_archs: Count = 8
    num_val_images: Count | None = None
    attacks: Annotated[tuple[Attack, ...], Field(min_length=1)] = STRONG

    distinct: ClassVar[Any] = names_differ("attacks", "worst")


class SelectStudent(Settings):
    """Budgets such as `macs=150M`, one or a list. The `candidates` best predicted archs of each are measured on val."""

    budgets: Budgets = ()
    candidates: Count = 5
    num_images: Count | None = None
    attack: Attack = LABEL


class ExportStudent(Settings):
    """Settings of the exported files; all formats are always written. `opset` is the ONNX operator set."""

    opset: Annotated[Int, Field(ge=18)] = 20
    license: str = "unspecified"
    tolerance: Positive = 1e-5


class Report(Settings):
    """The page's title, and the country (ISO 3166, three letters) whose electricity is used to estimate emissions."""

    title: str = "Robust students for every budget"
    country: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USA"
