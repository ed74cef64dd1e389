"""What the training stages share: images, validation, resume state and the history table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from proard.artifacts import HISTORY, write_table
from proard.attacks import pgd
from proard.config import Attack, Measurement, TrainingSettings, UserError
from proard.config.losses import Loss
from proard.data import Augmenter, ImageSet, Views, epoch_order, load_split, mixed_order, to_float
from proard.evaluation.meter import Conditions, validation_rows
from proard.nets import FixedNet, StaticNet, Supernet, extract, fold, load_static, recalibrate
from proard.space import Arch, FixedArch, FixedSpace, NetSpace, SearchSpace, Work
from proard.stages.common import Job
from proard.training import Plan, ResumeState, Run, fingerprint, single_plan
from proard.training.attacker import weakest
from proard.training.ranks import join
from proard.training.time_limit import TimeLimit, end_of_job

VALIDATION_RECALIBRATION_IMAGES = 1000


class AugmentedImages:
    """Training images of one split, augmented in batches on their device."""

    def __init__(self, train: ImageSet, settings: TrainingSettings) -> None:
        self.train = train
        self.augment = Augmenter.of(train.images, settings.augment)

    def __len__(self) -> int:
        """Number of images of a pass."""
        return self.train.per_pass

    def order(self, seed: int, epoch: int) -> Tensor:
        """Order of one pass over the data."""
        if not self.train.mixed_in:
            return epoch_order(self.train.own, seed=seed, epoch=epoch)
        return mixed_order(self.train.own, self.train.additional, self.train.mixed_in, seed=seed, epoch=epoch)

    def batch(self, indices: Tensor, generator: torch.Generator, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Augmented images and labels, or a part of what a call without it gives."""
        labels = self.train.labels
        return self.augment(indices, generator, part), labels[indices[part].to(labels.device, non_blocking=True)]

    def views(self, indices: Tensor, generator: torch.Generator) -> Views:
        """Which views `batch` gives for the same arguments."""
        return self.augment.draw(indices, generator)

    @property
    def padded_shape(self) -> tuple[int, int, int, int]:
        """Shape of the padded images: (n, height, width, channels)."""
        number, height, width, channels = self.augment.padded_shape
        return number, height, width, channels


@dataclass
class Training:
    """A training stage's data and bookkeeping, the same in every process of it.

    `output` is the declared file that the resume state lies beside; `inputs` are the files the weights depend on.
    """

    job: Job
    settings: TrainingSettings
    output: str
    inputs: list[str]

    def __post_init__(self) -> None:
        files = self.job.files
        self.ranks = join(self.job.device)
        self.train = load_split(files.train, self.job.device)
        self.val = load_split(files.val, self.job.device)
        self.provenance = self.job.provenance(*self.inputs)
        mark = fingerprint(
            settings=self.job.sections,
            seed=self.job.seed,
            inputs=self.provenance.inputs,
            device=self.job.device,
            threads=self.job.threads,
        )
        self.state = ResumeState(self.output, mark, ranks=self.ranks, costs=self.job.ledger)

    @overload
    def supernet(self, space: SearchSpace) -> Supernet: ...

    @overload
    def supernet(self, space: NetSpace) -> Supernet | FixedNet: ...

    def supernet(self, space: NetSpace) -> Supernet | FixedNet:
        """A fresh supernet, or a network that no space describes, for the images at hand.

        Raises
        ------
        UserError
            The space is for images of another shape or another number of classes.
        """
        height, width, channels = self.train.images.shape[1:]
        wanted = (space.settings.image_channels, space.settings.image_size, space.settings.classes)
        if (channels, height, len(self.train.classes)) != wanted or height != width:
            raise UserError(
                f"space {space.settings.name} is for {wanted[0]}x{wanted[1]}x{wanted[1]} images, {wanted[2]} classes; "
                f"the data are {channels}x{height}x{width} of {len(self.train.classes)}; "
                "set prepare_data.image_size and prepare_data.classes, or write the space for them"
            )
        generator = torch.Generator().manual_seed(self.job.seed)
        pixels: dict[str, Any] = {"mean": self.train.mean, "std": self.train.std, "generator": generator}
        if isinstance(space, SearchSpace):
            return Supernet(space, **pixels).to(self.job.device)
        assert isinstance(space, FixedSpace)
        return FixedNet(space, **pixels).to(self.job.device)

    def fit(
        self,
        net: Supernet | FixedNet,
        *,
        label: str,
        plan: Plan,
        validated: Mapping[str, Arch | FixedArch],
        settings: TrainingSettings | None = None,
        teacher: Callable[[Tensor], Tensor] | None = None,
        control: str | None = None,
        search: Callable[..., Tensor] = pgd,
    ) -> list[dict[str, Any]]:
        """Train `net` in place; the history's rows. `control` is the file of the plainly trained network.

        `settings` replace those of the stage, where its epochs were stretched to a budget.
        Of several processes only the first returns: what follows a training is its work alone.
        """
        threat, settings = self.job.config.threat, settings or self.settings
        rule = self.job.config.validation
        attack = Attack(name="val", num_steps=rule.num_steps, step_size=rule.step_size)
        val = self.val.first(rule.num_images)
        recalibration = self.recalibration_images()
        attacks = any(drawn.objective.inner for drawn in plan.draw(self.job.seed, 0, 0))
        conditions = Conditions(threat, Measurement(), self.job.seed)
        watched = rule.watch(settings.attack) != "off" and attacks

        def validate(averaged: Supernet | FixedNet) -> list[dict[str, Any]]:
            return self.ranks.divided(list(validated.items()), lambda named: row_of(averaged, *named))

        def row_of(averaged: Supernet | FixedNet, name: str, arch: Any) -> dict[str, Any]:
            (row,) = validation_rows(
                averaged,
                {name: arch},
                recalibration=recalibration,
                val=val,
                attack=attack,
                conditions=conditions,
                training_attack=weakest(settings.attack, eps=threat.eps, norm=threat.norm) if watched else None,
                tally=self.job.ledger.tally,
            )
            return row

        passes = settings.epochs * plan.passes_per_epoch
        limit = "" if settings.minutes is None else f", at most {settings.minutes:g} min"
        size = sum(p.numel() for p in net.parameters()) * 4 / 2**20
        print(
            f"{label}: {passes:g} passes over {self.train.per_pass} images{limit}, {size:.1f} MiB of weights, "
            f"states on disk up to {12 * size:.0f} MiB, device {self.job.device}, {torch.get_num_threads()} threads"
            + (f" in each of {self.ranks.world} processes" if self.ranks.world > 1 else ""),
            flush=True,
        )
        minutes = self.job.files.minutes
        run = Run(
            net,
            label=label,
            plan=plan,
            settings=settings,
            threat=threat,
            source=AugmentedImages(self.train, settings),
            teacher=teacher,
            validate=validate,
            state=self.state,
            seed=self.job.seed,
            control=self.control(control),
            ranks=self.ranks,
            search=search,
            validation=rule,
            save_every_minutes=self.job.files.save_every_minutes,
            time_limit=TimeLimit(end_of_job() if minutes is None else time.time() + 60 * minutes),
        )
        rows = run.train()
        done = rows[-1]
        self.job.ledger.trained = Work(done["forward_equivalents"], done["work_macs"], done["weight_gradients"])
        self.ranks.exit_unless_first()
        return rows

    def control(self, path: str | None) -> Callable[[Tensor], Tensor] | None:
        """The plainly trained network, where the loss of the settings needs it.

        Raises
        ------
        UserError
            They do, and no file was given.
        """
        if not self.settings.needs_control:
            return None
        if path is None:
            raise UserError("this loss asks the plainly trained network: give --control, train_control's output")
        net, *_ = load_static(path, kind="control")
        return frozen_network(net.to(self.job.device))

    def recalibration_images(self) -> Tensor:
        """Clean training images that reset batch-norm statistics during and after training."""
        return to_float(self.train.first(VALIDATION_RECALIBRATION_IMAGES).images)

    def write_history(self, path: str, rows: list[dict[str, Any]]) -> None:
        """Write the history table."""
        write_table(path, rows, HISTORY, self.provenance)


def train_alone(
    training: Training,
    *,
    label: str,
    space: NetSpace,
    arch: Any,
    loss: Loss,
    control: str | None = None,
    teacher: Callable[[Tensor], Tensor] | None = None,
    start: Callable[[Supernet | FixedNet], None] | None = None,
    search: Callable[..., Tensor] = pgd,
) -> tuple[StaticNet | FixedNet, list[dict[str, Any]]]:
    """Train one arch of a space by itself and return it recalibrated, with its history.

    `teacher` is the frozen network of a distillation loss, such as `frozen_network` of a loaded one; `start` writes
    the initial weights, in place of random ones; `search` is the attack, with the arguments of `pgd`.
    """
    net = training.supernet(space)
    if start is not None:
        start(net)
    plan = single_plan(arch, loss, training.settings)
    rows = training.fit(
        net,
        label=label,
        plan=plan,
        validated={"largest": arch},
        teacher=teacher,
        control=control,
        search=search,
    )
    static = extract(net, arch)
    recalibrate(static, training.recalibration_images(), batch_size=Measurement().batch_size)
    return static, rows


def frozen_network(net: StaticNet | FixedNet) -> Callable[[Tensor], Tensor]:
    """Logits of a network that is not trained, batch norm folded; only images that require a gradient get one."""
    return fold(net)
