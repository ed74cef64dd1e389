"""Train the same network plainly, and measure it under the same attacks: the non-robust control."""

from __future__ import annotations

from collections.abc import Sequence

from proard.artifacts import MEASURED, write_table
from proard.data import load_split
from proard.evaluation import measure, rows_of, work_of
from proard.nets import fold, save_static
from proard.stages.common import parse_arguments, run
from proard.stages.measuring import conditions_of
from proard.stages.train_teacher import teacher_arch, teacher_space
from proard.stages.training import Training, train_alone


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="train_control",
        reads=["train", "val", "test"],
        writes=["control", "table", "history"],
    )
    config, files = job.config, job.files
    space = teacher_space(config.train_teacher, config.space)
    arch = teacher_arch(config.train_teacher, space)
    training = Training(job, config.train_control, files.control, [files.train, files.val, files.test])
    with training.state.owned():
        net, rows = train_alone(training, label="control", space=space, arch=arch, loss=config.train_control.objective)
        folded, table = fold(net), []
        conditions = conditions_of(job)
        for path in (files.val, files.test):
            images = load_split(path, job.device)
            measured = measure(folded, images, config.verify_front.attacks, conditions)
            job.ledger.tally.spent += work_of(measured.values(), net.spec.macs)
            table += rows_of(
                measured,
                space=space,
                arch=arch,
                images=images,
                attacks=config.verify_front.attacks,
                conditions=conditions,
                worst=True,
            )
        training.write_history(files.history, rows)
        write_table(files.table, table, MEASURED, training.provenance)
        save_static(files.control, net, space=space, arch=arch, kind="control", provenance=training.provenance)
        training.state.finish()
    worst = table[-1]
    print(f"control on test: clean {worst['clean_acc']:.1%}, robust {worst['robust_acc']:.1%} (worst case)")
    job.record_costs()


if __name__ == "__main__":
    run(main)
