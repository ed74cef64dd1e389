"""Train one network by itself, with or without the run's teacher: train and val tensors -> student.safetensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from proard.attacks import pgd
from proard.config import Space, Student, UserError
from proard.nets import load_static, save_static
from proard.space import Arch, FixedArch, FixedSpace, SearchSpace
from proard.stages.common import Job, parse_arguments, run
from proard.stages.ledger import peak_rss_bytes
from proard.stages.train_teacher import fitted_space, named_arch
from proard.stages.training import Training, frozen_network, train_alone


def main(argv: Sequence[str] | None = None, *, search: Callable[..., Tensor] = pgd) -> None:
    """Run the stage; `search` is the attack, with the arguments of `pgd`."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="train_student",
        reads=["train", "val"],
        writes=["student", "history"],
        optional=["teacher", "control"],
    )
    (student,) = job.config.train_student.students
    files = job.files
    space, arch = student_network(student, job.config.space)
    inputs = [path for path in (files.train, files.val, files.teacher, files.control) if path]
    training = Training(job, student, files.student, inputs)
    with training.state.owned():
        networks = {"teacher": frozen_teacher(job, student), "control": files.control}
        net, rows = train_alone(
            training, label=student.name, space=space, arch=arch, objective=student.loss, search=search, **networks
        )
        training.write_history(files.history, rows)
        facts = training_facts(rows, student, job)
        described = {"space": space, "arch": arch, "provenance": training.provenance}
        save_static(files.student, net, kind="trained_student", training=facts, **described)
        training.state.finish()
    memory = facts["peak_device_memory"] or facts["peak_memory"]
    print(
        f"{student.name}: {facts['train_gradients']:,} gradients of one image, "
        f"{facts['seconds_per_epoch']:.1f} s an epoch, at most {memory / 2**20:,.0f} MiB of memory"
    )
    job.record_costs()


def training_facts(rows: list[dict[str, Any]], student: Student, job: Job) -> dict[str, Any]:
    """What the training took and which epoch it kept, as columns of the TRAINED table."""
    last, kept = rows[-1], next((row for row in reversed(rows) if row["best"]), rows[-1])
    on_gpu = job.device.startswith("cuda")
    return {
        "train_seed": job.seed,
        "epochs": student.epochs,
        "kept_epoch": kept["epoch"],
        "val_clean_acc": kept.get("val_clean_acc"),
        "val_robust_acc": kept.get("val_robust_acc"),
        "train_images": last["images"],
        "train_gradients": last["gradients"],
        "train_forward_equivalents": last["forward_equivalents"],
        "seconds_per_epoch": last["seconds"] / student.epochs,
        "peak_memory": peak_rss_bytes(),
        "peak_device_memory": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def student_network(student: Student, own: Space) -> tuple[SearchSpace | FixedSpace, Arch | FixedArch]:
    """The space and the arch of a student, for the run's images."""
    where = f"train_student.{student.name}"
    space = SearchSpace(own) if student.net is None else fitted_space(student.net, own, where=f"{where}.net")
    return space, named_arch(student.arch, space, where=where)


def frozen_teacher(job: Job, student: Student) -> Callable[[Tensor], Tensor] | None:
    """The run's teacher as a frozen network; None where the student's loss asks none.

    Raises
    ------
    UserError
        The loss asks a teacher and no file was given.
    """
    if not student.needs_teacher:
        return None
    if job.files.teacher is None:
        raise UserError(
            f"train_student.{student.name}: its loss asks a teacher: give --teacher, train_teacher's output"
        )
    net, *_ = load_static(job.files.teacher, kind="teacher")
    return frozen_network(net.to(job.device))


if __name__ == "__main__":
    run(main)
