"""What stages that measure share: one meter, one recalibration, and an experiment's networks as they are measured."""

from __future__ import annotations

from proard.config import Threat
from proard.data import ImageSet, load_split, to_float
from proard.evaluation import Conditions, SubnetMeter
from proard.nets import FixedNet, FoldedNet, fold, load_static, load_supernet, recalibrate
from proard.space import FixedSpace, NetArch, NetSpace, SearchSpace, one_pass
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
