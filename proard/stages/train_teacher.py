"""Train the fixed robust teacher, or take it from a file: train and val tensors -> teacher.safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from proard.artifacts import HISTORY, write_table
from proard.config import PRESETS, ConfigError, Space, TrainTeacher
from proard.nets import load_static, save_static
from proard.space import Arch, SearchSpace
from proard.stages.common import Job, parse_arguments, run
from proard.stages.training import Training, train_alone


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
    if settings.source == "file":
        take_from_file(job, settings)
        job.record_costs()
        return
    space = teacher_space(settings, job.config.space)
    arch = teacher_arch(settings, space)
    control = job.files.control
    inputs = [job.files.train, job.files.val] + ([control] if control else [])
    training = Training(job, settings, job.files.teacher, inputs)
    with training.state.owned():
        objective = settings.objective
        net, rows = train_alone(training, label="teacher", space=space, arch=arch, objective=objective, control=control)
        training.write_history(job.files.history, rows)
        save_static(job.files.teacher, net, space=space, arch=arch, kind="teacher", provenance=training.provenance)
        training.state.finish()
    job.record_costs()


def take_from_file(job: Job, settings: TrainTeacher) -> None:
    """Check the given teacher and copy it into the run, with an empty history."""
    net, space, arch, _ = load_static(settings.file, kind=("teacher", "control", "trained_student"))
    shape = (space.settings.image_channels, space.settings.image_size, space.settings.classes)
    own = job.config.space
    if shape != (own.image_channels, own.image_size, own.classes):
        raise ConfigError(
            f"train_teacher.file {settings.file} is for {shape[0]}x{shape[1]}x{shape[1]} images of {shape[2]} classes; "
            f"this run has {own.image_channels}x{own.image_size}x{own.image_size} of {own.classes}"
        )
    provenance = job.provenance(settings.file)
    save_static(job.files.teacher, net, space=space, arch=arch, kind="teacher", provenance=provenance)
    write_table(job.files.history, [], HISTORY, provenance)
    print(f"teacher taken from {settings.file}: {space.spec(arch).macs / 1e6:.1f} M MACs")


def teacher_space(settings: TrainTeacher, own: Space) -> SearchSpace:
    """The teacher's space: the run's, or the preset that `train_teacher.space` names, for the run's images."""
    return named_space(settings.space, own, where="train_teacher")


def teacher_arch(settings: TrainTeacher, space: SearchSpace) -> Arch:
    """The largest subnet, or the one whose dims are written out."""
    return named_arch(settings.arch, space, where="train_teacher")


def named_space(name: str | None, own: Space, *, where: str) -> SearchSpace:
    """The run's own space, or a preset for the run's images; `where` is the section, for messages."""
    if name is None:
        return SearchSpace(own)
    if name not in PRESETS:
        raise ConfigError(f"{where}.space is {name!r}; presets are {', '.join(sorted(PRESETS))}")
    shape = {"image_channels": own.image_channels, "image_size": own.image_size, "classes": own.classes}
    return SearchSpace(PRESETS[name].model_copy(update=shape))


def named_arch(arch: str | Mapping[str, Sequence[float]], space: SearchSpace, *, where: str) -> Arch:
    """The largest or the smallest subnet, or the one whose dims are written out; `where` is the section."""
    if isinstance(arch, str):
        return space.smallest if arch == "smallest" else space.largest
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
