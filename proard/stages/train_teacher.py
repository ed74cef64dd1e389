"""Train the fixed robust teacher, or take it from a file: train and val tensors -> teacher.safetensors."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError

from proard.artifacts import HISTORY, write_table
from proard.config import ConfigError, Space, TrainTeacher, named_nets
from proard.config.nets import Named
from proard.data import to_float
from proard.nets import FixedNet, StaticNet, load_deepmind, load_static, load_trades, save_static
from proard.nets.modules import present
from proard.space import Arch, NetSpace, SearchSpace, space_of
from proard.stages.common import Job, parse_arguments, run
from proard.stages.launch import rank
from proard.stages.measuring import load_images
from proard.stages.training import Training, train_alone

CHOOSING_IMAGES, BATCH = 1000, 100


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="train_teacher",
        reads=["train", "val"],
        writes=["teacher", "history"],
        optional=["control"],
    )
    settings = job.config.train_teacher
    if settings.source != "train":
        take_from_file(job, settings)
        job.record_costs()
        return
    space = teacher_space(settings, job.config.space)
    arch = teacher_arch(settings, space)
    control = job.files.control
    inputs = [job.files.train, job.files.val] + ([control] if control else [])
    training = Training(job, settings, job.files.teacher, inputs)
    with training.state.owned():
        loss = settings.objective
        net, rows = train_alone(training, label="teacher", space=space, arch=arch, loss=loss, control=control)
        training.write_history(job.files.history, rows)
        save_static(job.files.teacher, net, space=space, arch=arch, kind="teacher", provenance=training.provenance)
        training.state.finish()
    job.record_costs()


def take_from_file(job: Job, settings: TrainTeacher) -> None:
    """Check the given teacher and copy it into the run, with an empty history; one process does."""
    if rank() > 0:
        return
    own, file = job.config.space, present(settings.file)
    inputs = [file]
    net: StaticNet | FixedNet
    space: NetSpace
    arch: Any
    if settings.source == "trades":
        net, space, arch = load_trades(file, image_size=own.image_size)
    elif settings.source == "deepmind":
        net, space, arch = with_activation(job, file)
        inputs += [job.files.val]  # it decides on the activation
    elif zipfile.is_zipfile(file):
        raise ConfigError(
            f"train_teacher.file {settings.file} is a file of torch.save; source file reads a teacher.safetensors of "
            "this package: write source: trades for a WideResNet as TRADES saves it, source: deepmind for a network as "
            "DeepMind's code saves it"
        )
    else:
        net, space, arch, _ = load_static(file, kind=("teacher", "control", "trained_student"))
    check_shape(space, own, file=settings.file)
    provenance = job.provenance(*inputs)
    save_static(job.files.teacher, net, space=space, arch=arch, kind="teacher", provenance=provenance)
    write_table(job.files.history, [], HISTORY, provenance)
    print(f"teacher taken from {settings.file}: {space.spec(arch).macs / 1e6:.1f} M MACs")


def check_shape(space: NetSpace, own: Space, *, file: str | None) -> None:
    """Refuse a teacher for images of another shape or number of classes than the run's.

    Raises
    ------
    ConfigError
        Both shapes and numbers.
    """
    shape = (space.settings.image_channels, space.settings.image_size, space.settings.classes)
    if shape != (own.image_channels, own.image_size, own.classes):
        raise ConfigError(
            f"train_teacher.file {file} is for {shape[0]}x{shape[1]}x{shape[1]} images of {shape[2]} classes; "
            f"this run has {own.image_channels}x{own.image_size}x{own.image_size} of {own.classes}"
        )


def with_activation(job: Job, file: str) -> tuple[FixedNet, NetSpace, Any]:
    """A network of DeepMind's layout, with the activation that gives it the lower cross-entropy on val.

    The checkpoint does not contain the activation that it was trained with.
    """
    val = load_images(job, "val", CHOOSING_IMAGES)
    found: dict[str, tuple[float, float, tuple[FixedNet, NetSpace, Any]]] = {}
    for activation in ("silu", "relu"):
        net, space, arch = load_deepmind(file, image_size=job.config.space.image_size, activation=activation)
        check_shape(space, job.config.space, file=job.config.train_teacher.file)
        with torch.no_grad():
            logits = torch.cat([net.to(job.device)(images) for images in to_float(val.images).split(BATCH)])
        right = float((logits.argmax(1) == val.labels).double().mean())
        found[activation] = float(F.cross_entropy(logits, val.labels)), right, (net.cpu(), space, arch)
    best = min(found, key=lambda activation: found[activation][0])
    tried = ", ".join(f"{right:.1%} and {loss:.2g} nats with {name}" for name, (loss, right, _) in found.items())
    print(f"{space.settings.name}: {tried} on {len(val)} clean images of val; taken: {best}")
    return found[best][2]


def teacher_space(settings: TrainTeacher, own: Space) -> NetSpace:
    """The teacher's space: the run's, or the preset that `train_teacher.space` names, for the run's images."""
    if settings.space is None:
        return SearchSpace(own)
    nets = named_nets()
    if settings.space not in nets:
        raise ConfigError(f"train_teacher.space is {settings.space!r}; presets are {', '.join(sorted(nets))}")
    return fitted_space(nets[settings.space], own, where="train_teacher.space")


def teacher_arch(settings: TrainTeacher, space: NetSpace) -> Any:
    """The largest subnet, or the one whose dims are written out."""
    return named_arch(settings.arch, space, where="train_teacher")


def fitted_space(net: Named, own: Space, *, where: str) -> NetSpace:
    """The space of a network, for images and classes of the run's own space; `where` is the key, for messages."""
    shape = {"image_channels": own.image_channels, "image_size": own.image_size, "classes": own.classes}
    try:
        return space_of(type(net).model_validate({**net.model_dump(), **shape}))
    except ValidationError as error:
        raise ConfigError(f"{where}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def named_arch(arch: str | Mapping[str, Sequence[float]], space: NetSpace, *, where: str) -> Any:
    """The largest or the smallest subnet, or the one whose dims are written out; `where` is the section."""
    if isinstance(arch, str):
        return space.smallest if arch == "smallest" else space.largest
    if not isinstance(space, SearchSpace):
        raise ConfigError(f"{where}.arch: network {space.settings.name} has one arch; leave arch out")
    missing = set(space.options) ^ set(arch)
    if missing:
        *dims, last = space.options
        lists = f"{', '.join(dims)} and {last}"
        raise ConfigError(f"{where}.arch lists {lists}; check {', '.join(sorted(missing))}")
    try:
        return space.arch(space.genotype(Arch.from_dims(arch)))
    except ValueError as error:
        raise ConfigError(f"{where}.arch: {error}") from None


if __name__ == "__main__":
    run(main)
