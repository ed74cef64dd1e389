"""Measure a training of an experiment, image by image, under attacks that all trainings share: outcomes.parquet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from proard.artifacts import TRAININGS, read_header, read_table, write_table
from proard.config import Attack, Phase, Student, SupernetTraining, Threat, UserError, group_of
from proard.data import ImageSet, to_float
from proard.evaluation import Conditions, SubnetMeter, measure, rows_of, stands_training_attack, work_of
from proard.evaluation.meter import Measured
from proard.progress import Progress
from proard.space import Arch, SearchSpace, one_pass
from proard.space.cost import human
from proard.stages.common import Job, parse_arguments, run
from proard.stages.measuring import conditions_of, load_images, subnet_meter, trained_network
from proard.training.attacker import pgd_options

Rows = list[dict[str, Any]]
Measuring = Callable[[ImageSet, Sequence[Attack], Threat], Measured]
HISTORY = ("step", "epoch", "images", "gradients", "forward_equivalents", "work_macs", "seconds", "best", "seed")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="measure_experiment",
        reads=["weights", "test"],
        lists=["histories"],
        writes=["outcomes"],
        optional=["val", "train", "supernet", "archs", "cache"],
    )
    (training,) = job.config.experiment.trainings
    assert isinstance(training, (Student, SupernetTraining))  # twins are written out before any job
    files = job.files
    for flag in needed_files(job, training):
        if getattr(files, flag) is None:
            raise UserError(f"experiment.{training.name} is measured with --{flag}: give that file")
    rows = subnets(job) if isinstance(training, SupernetTraining) else network(job, training)
    facts = training_facts(training, files.histories, read_header(files.weights).get("training", {}))
    inputs = [getattr(files, name) for name in ("weights", "supernet", "archs", "train", "val", "test")]
    provenance = job.provenance(*(path for path in inputs if path), *files.histories)
    write_table(files.outcomes, [{**row, **facts} for row in rows], TRAININGS, provenance)
    print("\n".join(f"{training.name}, {words(row)}" for row in rows if row["role"] != "subnet"))
    job.record_costs()


def needed_files(job: Job, training: Student | SupernetTraining) -> list[str]:
    """Flags of the files that this training is measured with, beside those that all need."""
    flags = {"supernet": ["train", "archs"], "twin": ["train", "supernet"]}.get(training.trains, [])
    return flags + (["val"] if job.config.experiment.measure.val_attacks else [])


def subnets(job: Job) -> Rows:
    """Rows of the archs of a supernet that all supernets are measured at."""
    files, number = job.files, job.config.experiment.measure.num_archs
    archs = [Arch.from_json(text) for text in spread(read_table(files.archs, columns=["arch", "macs"]), number)]
    measured, space = supernet_measuring(job, files.weights), SearchSpace(job.config.space)
    progress = Progress(job.config.experiment.trainings[0].name, len(archs), "subnets")
    rows: Rows = []
    for arch in archs:
        rows += outcome_rows(job, measured(arch), role="subnet", space=space, arch=arch)
        progress.advance(note=f"{human(rows[-1]['macs'])} MACs, {words(rows[-1])}")
    progress.close()
    return rows


def network(job: Job, student: Student) -> Rows:
    """Rows of a network that was trained alone; of a twin, also those of the subnet with its arch."""
    files, config = job.files, job.config
    predict, space, arch = trained_network(job, files.weights, trains=student.trains)
    if student.trains == "twin" and space.settings != SearchSpace(config.space).settings:
        raise UserError(
            f"{files.weights} is of space {space.settings.name}, not of the supernet's; rerun train_experiment"
        )
    macs = predict.spec.macs

    def measured(images: ImageSet, attacks: Sequence[Attack], threat: Threat) -> Measured:
        found = measure(predict, images, attacks, conditions_of(job, threat))
        job.ledger.tally.spent += work_of(found.values(), macs)
        return found

    rows = outcome_rows(job, measured, role=student.trains, space=space, arch=arch)
    if student.attack_steps:
        rows += own_attack_rows(job, student, predict, space=space, arch=arch, macs=macs)
    if student.trains == "twin":
        assert isinstance(arch, Arch)
        subnet = supernet_measuring(job, files.supernet)(arch)
        rows += outcome_rows(job, subnet, role="subnet", space=space, arch=arch)
    return rows


def supernet_measuring(job: Job, supernet: str) -> Callable[[Arch], Measuring]:
    """By arch, how a subnet is measured: through the run's cache, with a meter for every radius."""
    meters: dict[float, SubnetMeter] = {}

    def measured(arch: Arch, images: ImageSet, attacks: Sequence[Attack], threat: Threat) -> Measured:
        if threat.eps not in meters:
            meters[threat.eps] = subnet_meter(job, cache=job.files.cache, supernet=supernet, threat=threat)
        return meters[threat.eps].measure(arch, images, attacks)

    return lambda arch: lambda *what: measured(arch, *what)


def splits(job: Job) -> Iterator[tuple[ImageSet, Sequence[Attack], Sequence[float]]]:
    """Images, the attacks on them, and the radii of these."""
    settings, eps = job.config.experiment.measure, job.config.threat.eps
    if settings.val_attacks:
        yield load_images(job, "val", settings.num_val_images), settings.val_attacks, (eps,)
    yield load_images(job, "test", settings.num_test_images), settings.attacks, settings.eps or (eps,)


def outcome_rows(job: Job, measured: Measuring, *, role: str, **identity: Any) -> Rows:
    """Rows of one network on every split, at every radius, under every attack and in their worst case."""
    rows: Rows = []
    for images, attacks, radii in splits(job):
        for eps in radii:
            threat = job.config.threat.model_copy(update={"eps": eps})
            here = [attack.scaled(eps / job.config.threat.eps) for attack in attacks]
            entries = measured(images, here, threat)
            described = {"conditions": conditions_of(job, threat), **identity}
            worst = images.split == "test" or len(here) > 1
            found = rows_of(entries, images=images, attacks=here, worst=worst, **described)
            who = {"role": role, "net": identity["space"].settings.name}
            rows += [{**row, **who} for row in found]
    return rows


def own_attack_rows(
    job: Job, student: Student, predict: Callable[[Tensor], Tensor], *, macs: int, **identity: Any
) -> Rows:
    """The row of a network on test under the attack that it was trained with, counted at its last step."""
    threat, attack, batch = job.config.threat, student.attack, job.config.measurement.batch_size
    images = load_images(job, "test", job.config.experiment.measure.num_test_images)
    started, pixels = time.monotonic(), to_float(images.images)
    options = pgd_options(attack, eps=threat.eps, norm=threat.norm, num_steps=attack.num_steps)
    right = {
        name: stands_training_attack(predict, pixels, images.labels, batch_size=batch, seed=job.seed, attack=each)
        for name, each in (("clean", {**options, "num_steps": 0, "start": "zero"}), ("robust", options))
    }
    entry: dict[str, Any] = {name: mask.cpu().numpy() for name, mask in right.items()}
    entry["robust"] = np.logical_and(entry["robust"], entry["clean"])
    entry |= {"gradients": attack.num_steps * len(images), "seconds": time.monotonic() - started}
    job.ledger.tally.spent += work_of([entry], macs) + len(images) * one_pass(macs)
    own = Attack(name="own", num_steps=attack.num_steps, step_size=attack.step_size)
    last = job.config.measurement.model_copy(update={"accounting": "last_iterate"})
    described = {"conditions": Conditions(threat, last, job.seed), **identity}
    (row,) = rows_of({"own": entry}, images=images, attacks=[own], **described)
    who = {"role": student.trains, "net": identity["space"].settings.name}
    return [{**row, **who}]


def training_facts(
    training: Student | SupernetTraining, histories: Sequence[str], memory: dict[str, int | None]
) -> dict[str, Any]:
    """What a training took, all its phases together, and which epoch it kept, as columns of TRAININGS."""
    tables = [read_table(path, columns=HISTORY) for path in histories]
    ends = pd.DataFrame([table.iloc[-1] for table in tables])
    newest, total = tables[-1], ends[["step", "epoch", *HISTORY[2:7]]].sum()
    kept = newest[newest["best"].astype(bool)]
    kept = (newest if kept.empty else kept).iloc[-1]
    last: Student | Phase
    if isinstance(training, Student):
        last, steps = training, training.attack_steps
        planned = newest["planned_steps"].iloc[-1] if "planned_steps" in newest else total["step"]
        epochs = training.epochs * float(total["step"] / planned)
    else:
        last = training.phases[-1]
        steps, epochs = last.attack.num_steps, float(total["epoch"])
    return {
        "training": training.name,
        "group": group_of(training.name),
        "trains": training.trains,
        "loss": last.loss.name,
        "train_seed": int(kept["seed"]),
        "train_steps": steps,
        "train_step_size": last.attack.step_size if steps else None,
        "lr": last.lr,
        "epochs": epochs,
        "kept_epoch": int(kept["epoch"]),
        "val_clean_acc": kept.get("val_clean_acc"),
        "val_robust_acc": kept.get("val_robust_acc"),
        "effort": training.effort.model_dump_json(exclude_none=True) if training.effort is not None else None,
        "optimizer_steps": int(total["step"]),
        "train_images": int(total["images"]),
        "train_gradients": int(total["gradients"]),
        "train_forward_equivalents": int(total["forward_equivalents"]),
        "train_macs": float(total["work_macs"]),
        "train_seconds": float(total["seconds"]),
        "seconds_per_epoch": float(total["seconds"]) / epochs,
        **memory,
    }


def spread(archs: pd.DataFrame, number: int) -> list[str]:
    """Archs evenly spread over the ranks of MACs, the cheapest and the most expensive included."""
    ordered = archs.sort_values(["macs", "arch"], ignore_index=True)
    ranks = np.unique(np.linspace(0, len(ordered) - 1, min(number, len(ordered))).round().astype(int))
    return ordered["arch"].iloc[ranks].tolist()


def words(row: dict[str, Any]) -> str:
    """One measurement as a line for the terminal."""
    return (
        f"{row['attack']} on {row['split']} at {row['eps'] * 255:g}/255: clean {row['clean_acc']:.1%}, "
        f"robust {row['robust_acc']:.1%}"
    )


if __name__ == "__main__":
    run(main)
