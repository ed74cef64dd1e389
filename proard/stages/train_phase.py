"""One leg of progressive robust distillation: data, teacher, previous phase -> supernet.safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proard.artifacts import read_header
from proard.config import Phase, UserError
from proard.nets import FixedNet, StaticNet, Supernet, implant, load_static, load_supernet, save_supernet, sort_channels
from proard.space import DIMS, Arch, NetArch, NetSpace, SearchSpace
from proard.stages.common import Job, parse_arguments, run
from proard.stages.training import Training, frozen_network
from proard.training import passes_alone, phase_plan, within_budget


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="train_phase",
        reads=["train", "val", "teacher"],
        writes=["supernet", "history"],
        optional=["previous", "control"],
    )
    (phase,) = job.config.train_phase.phases
    train(job, phase)
    job.ledger.alone = passes_alone(SearchSpace(job.config.space), phase, phase.loss)
    job.record_costs()


def train(job: Job, phase: Phase) -> None:
    """Train one phase from a job's files to its supernet and history."""
    files = job.files
    inputs = [files.train, files.val, files.teacher] + [path for path in (files.previous, files.control) if path]
    training = Training(job, phase, files.supernet, inputs)
    space = SearchSpace(job.config.space)
    try:
        phase = within_budget(space, phase, images=training.train.per_pass, seed=job.seed)
        plan = phase_plan(space, phase)
    except ValueError as error:
        raise UserError(f"{job.stage}.{phase.name}: {error}") from None
    teacher, teacher_space, teacher_arch, _ = load_static(files.teacher, kind="teacher")
    with training.state.owned():
        net = training.supernet(space)
        opened: list[dict[str, Any]] = []
        if files.previous:
            previous, _ = load_supernet(files.previous, space)
            net.load_state_dict(previous.state_dict())
            opened = read_header(files.previous).get("opened", [{}])  # where it is not known: everything
        elif phase.warm_start == "teacher" and not implant_teacher(net, teacher, space, teacher_space, teacher_arch):
            print("the teacher is not this space's largest subnet: the supernet starts from random weights")
        if phase.sort_channels == "l1":
            sort_channels(net, trained_widths(space, opened))
        predict = None if phase.teacher == "dynamic" else frozen_network(teacher.to(job.device))
        rows = training.fit(
            net,
            label=phase.name,
            plan=plan,
            settings=phase,
            validated=validated_archs(space, phase),
            teacher=predict,
            control=files.control,
        )
        opened.append({dim: getattr(phase, dim) for dim in DIMS if getattr(phase, dim) is not None})
        training.write_history(files.history, rows)
        save_supernet(files.supernet, net, training.provenance, phase=phase.name, opened=opened)
        training.state.finish()


def trained_widths(space: SearchSpace, opened: list[dict[str, Any]]) -> dict[str, set[int]]:
    """Every number of output channels of every convolution in the subnets that earlier phases opened."""
    widths: dict[str, set[int]] = {}
    for dims in opened:
        for name, found in space.layer_widths(space.open_choices(**dims)).items():
            widths[name] = widths.get(name, set()) | found
    return widths


def implant_teacher(
    net: Supernet, teacher: StaticNet | FixedNet, space: SearchSpace, teacher_space: NetSpace, teacher_arch: NetArch
) -> bool:
    """Copy the teacher's weights into the supernet, if the teacher is its largest subnet; whether it is."""
    if not isinstance(teacher, StaticNet) or space.spec(space.largest) != teacher_space.spec(teacher_arch):
        return False
    implant(net, teacher)
    return True


def validated_archs(space: SearchSpace, phase: Phase) -> dict[str, Arch]:
    """Smallest, middle and largest subnet of the choices a phase opens."""
    among = space.open_choices(width=phase.width, depth=phase.depth, expand=phase.expand, kernel=phase.kernel)
    picks = {"smallest": 0.0, "middle": 0.5, "largest": 1.0}
    archs = {
        name: space.arch([options[round(place * (len(options) - 1))] for options in among])
        for name, place in picks.items()
    }
    return {name: arch for name, arch in archs.items() if name == "largest" or arch != archs["largest"]}


if __name__ == "__main__":
    run(main)
