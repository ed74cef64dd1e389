"""What the stages that measure subnets share: one meter, with one recalibration for all of them."""

from __future__ import annotations

from proard.config import Threat
from proard.data import ImageSet, load_split
from proard.evaluation import SubnetMeter
from proard.nets import load_supernet
from proard.space import SearchSpace
from proard.stages.common import Job


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
        threat=threat or job.config.threat,
        measurement=job.config.measurement,
        seed=job.seed,
        cache=cache,
        tally=job.ledger.tally,
    )


def load_images(job: Job, split: str, number: int | None = None) -> ImageSet:
    """The first `number` images of a split that the job reads; all of them for None."""
    return load_split(getattr(job.files, split), job.device).first(number)
