"""What stages that measure share: one meter, one recalibration, and an experiment's networks as they are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from proard.artifacts import ArtifactError, read_header, read_table
from proard.config import Threat
from proard.data import ImageSet, load_split, to_float
from proard.evaluation import Conditions, SubnetMeter
from proard.export import load_student
from proard.nets import FixedNet, FoldedNet, fold, load_static, load_supernet, recalibrate
from proard.space import FixedSpace, NetArch, NetSpace, SearchSpace, one_pass, read_space
from proard.stages.common import Job

AnySpace = SearchSpace | FixedSpace


def conditions_of(job: Job, threat: Threat | None = None) -> Conditions:
    """Under what a job measures; `threat` replaces that of the run."""
    return Conditions(threat or job.config.threat, job.config.measurement, job.seed)


def subnet_meter(
    job: Job, *, cache: str | None, supernet: str | None = None, threat: Threat | None = None
) -> SubnetMeter:
    """The meter of a job that reads `--train` and, where no other supernet and threat are given, `--supernet`."""
    space = SearchSpace(job.config.space)
    net, checksum = load_supernet(supernet or job.files.supernet, space)
    return SubnetMeter(
        net.to(job.device),
        checksum=checksum,
        train=load_split(job.files.train, job.device),
        conditions=conditions_of(job, threat),
        cache=cache,
        tally=job.ledger.tally,
    )


def trained_network(job: Job, path: str, *, trains: str) -> tuple[FoldedNet | FixedNet, NetSpace, NetArch]:
    """A network of an experiment as it is measured and exported, folded, with its space and arch.

    A twin's batch norm is reset on `--train` as that of the subnet which it is compared with.
    """
    net, space, arch, _ = load_static(path, kind="trained_student")
    net = net.to(job.device)
    if trains == "twin":
        measurement = job.config.measurement
        images = load_images(job, "train", measurement.recalibration_images)
        recalibrate(net, to_float(images.images), batch_size=measurement.batch_size)
        job.ledger.tally.spent += len(images) * one_pass(net.spec.macs)
    return fold(net).eval(), space, arch


def load_images(job: Job, split: str, number: int | None = None) -> ImageSet:
    """The first `number` images of a split that the job reads; all of them for None."""
    return load_split(getattr(job.files, split), job.device).first(number)


@dataclass(frozen=True)
class Exported:
    """An exported student as it is examined: its folded network, its space and arch, and the header of its weights."""

    net: FoldedNet | FixedNet
    space: NetSpace
    arch: NetArch
    header: dict[str, Any]


def exported_network(job: Job) -> Exported:
    """The network in `--weights`, an exported `student.safetensors`, on the job's device; no weight needs a gradient.

    Raises
    ------
    ArtifactError
        The file is missing, damaged or no student, or of another budget or threat model than the job.
    """
    path = job.files.weights
    net, header = load_student(path).requires_grad_(False), read_header(path)
    for name, wanted in (("budget", job.files.budget), ("threat", job.config.threat.model_dump(mode="json"))):
        if header[name] != wanted:
            raise ArtifactError(f"{path} has {name} {header[name]}, this job {wanted}; rerun export_student")
    space = read_space(header["space"])
    return Exported(net.to(job.device), space, space.read_arch(header["arch"]), header)


@dataclass(frozen=True)
class OwnOutcomes:
    """What the attacks of selection or measurement left of the test images: the worst case of all of them.

    Attributes
    ----------
    clean, robust : ndarray of shape (n,)
        bool, of the first n images of test.
    """

    clean: NDArray[np.bool_]
    robust: NDArray[np.bool_]

    def lost(self, clean: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which images are known to be misclassified under an attack; the others, and those not measured, are not.

        Raises
        ------
        ArtifactError
            The network classifies other clean images correctly: it is not the measured one.
        """
        number = min(len(clean), len(self.clean))
        if (clean[:number] != self.clean[:number]).any():
            raise ArtifactError(
                "the exported student classifies other test images correctly than its row of the selection says; "
                "rerun select_student and export_student"
            )
        found = np.zeros_like(clean)
        found[:number] = ~self.robust[:number]
        return found


def own_rows(path: str, arch_id: str, eps: float) -> pd.DataFrame:
    """Rows of an arch on `test` at a radius, from `student.parquet` of a selection or `outcomes.parquet` of a training.

    Raises
    ------
    ArtifactError
        The table has no such row.
    """
    table = read_table(path, columns=["arch_id", "split", "attack", "role", "eps", "robust_acc", "num_images"])
    rows = table[(table["arch_id"] == arch_id) & (table["split"] == "test") & (table["role"] != "subnet")]
    rows = rows[((rows["eps"] - eps).abs() < 1e-12) & (rows["attack"] != "own")]
    if rows.empty:
        raise ArtifactError(f"{path} does not measure arch {arch_id} on test; rerun the stage that writes it")
    return rows


def own_outcomes(rows: pd.DataFrame) -> OwnOutcomes | None:
    """Outcomes per image in the worst case, where the table has them."""
    worst = rows[rows["attack"] == "worst"]
    row = (rows.sort_values("robust_acc") if worst.empty else worst).iloc[0]
    if row.get("robust") is None or row.get("clean") is None:
        return None
    return OwnOutcomes(np.asarray(row["clean"], bool), np.asarray(row["robust"], bool))
