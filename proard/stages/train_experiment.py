"""Train a network alone, or a phase of a supernet, of an experiment: train and val tensors -> weights.safetensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from proard.attacks import pgd
from proard.config import Space, Student, SupernetTraining, UserError
from proard.nets import FixedNet, Supernet, load_static, save_static
from proard.space import NetSpace, SearchSpace
from proard.stages import train_phase
from proard.stages.common import Job, parse_arguments, run
from proard.stages.ledger import peak_rss_bytes
from proard.stages.train_teacher import fitted_space, named_arch
from proard.stages.training import Training, frozen_network, train_alone


def main(argv: Sequence[str] | None = None, *, search: Callable[..., Tensor] = pgd) -> None:
    """Run the stage; `search` is the attack on a network alone, with the arguments of `pgd`."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="train_experiment",
        reads=["train", "val"],
        writes=["weights", "history"],
        optional=["teacher", "control", "previous"],
    )
    (training,) = job.config.experiment.trainings
    assert isinstance(training, (Student, SupernetTraining))  # twins are written out before any job
    if isinstance(training, SupernetTraining):
        (phase,) = training.phases
        job.files.supernet = job.files.weights
        train_phase.train(job, phase)
    else:
        train_network(job, training, search=search)
    job.record_costs()


def train_network(job: Job, student: Student, *, search: Callable[..., Tensor] = pgd) -> None:
    """Train one network alone, from a job's files to its weights and history."""
    files = job.files
    space, arch = student_network(student, job.config.space)
    inputs = [path for path in (files.train, files.val, files.teacher, files.control) if path]
    training = Training(job, student, files.weights, inputs)
    with training.state.owned():
        net, rows = train_alone(
            training,
            label=student.name,
            space=space,
            arch=arch,
            loss=student.loss,
            control=files.control,
            teacher=frozen_teacher(job, student),
            start=start_of(job, student, space),
            search=search,
        )
        training.write_history(files.history, rows)
        on_gpu = job.device.startswith("cuda")
        memory: dict[str, int | None] = {"peak_memory": peak_rss_bytes()}
        memory["peak_device_memory"] = torch.cuda.max_memory_allocated() if on_gpu else None
        save_static(
            files.weights,
            net,
            space=space,
            arch=arch,
            kind="trained_student",
            provenance=training.provenance,
            training=memory,
        )
        training.state.finish()
    last, most = rows[-1], memory["peak_device_memory"] or memory["peak_memory"] or 0
    epochs = student.epochs * last["step"] / last["planned_steps"]
    print(
        f"{student.name}: {last['gradients']:,} gradients of one image, {last['seconds'] / epochs:.1f} s an "
        f"epoch, at most {most / 2**20:,.0f} MiB of memory"
    )


def student_network(student: Student, own: Space) -> tuple[NetSpace, Any]:
    """The space and the arch of a network, for the run's images."""
    where = f"experiment.{student.name}"
    space: NetSpace = SearchSpace(own) if student.net is None else fitted_space(student.net, own, where=f"{where}.net")
    return space, named_arch(student.arch, space, where=where)


def start_of(job: Job, student: Student, space: NetSpace) -> Callable[[Supernet | FixedNet], None] | None:
    """What writes the teacher's weights into the network; None where it starts from random ones.

    Raises
    ------
    UserError
        The teacher is not the largest subnet of the run's space: it has no weights for its other archs.
    """
    if student.warm_start == "random":
        return None
    teacher, teacher_space, teacher_arch, _ = load_static(teacher_file(job, student), kind="teacher")

    def start(net: Supernet | FixedNet) -> None:
        assert isinstance(space, SearchSpace)
        assert isinstance(net, Supernet)
        if not train_phase.implant_teacher(net, teacher, space, teacher_space, teacher_arch):
            raise UserError(f"experiment.{student.name}: warm_start is teacher, which is not the largest subnet")

    return start


def teacher_file(job: Job, student: Student) -> str:
    """The file of the run's teacher.

    Raises
    ------
    UserError
        It was not given.
    """
    if job.files.teacher is None:
        raise UserError(f"experiment.{student.name} needs a teacher: give --teacher, train_teacher's output")
    return job.files.teacher


def frozen_teacher(job: Job, student: Student) -> Callable[[Tensor], Tensor] | None:
    """The run's teacher as a frozen network; None where the loss needs none."""
    if not student.needs_teacher:
        return None
    net, *_ = load_static(teacher_file(job, student), kind="teacher")
    return frozen_network(net.to(job.device))


if __name__ == "__main__":
    run(main)
