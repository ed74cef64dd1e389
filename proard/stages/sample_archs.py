"""Choose the subnets to measure, equally many per stratum of MACs: -> archs.parquet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from proard import artifacts
from proard.artifacts.tables import FOOTPRINT, IDENTITY, INT
from proard.space import SearchSpace, read_device
from proard.space.cost import human
from proard.space.sampling import footprint_columns, identity_columns, stratified_sample
from proard.stages.common import parse_arguments, run

ARCHS = {
    **IDENTITY,
    **FOOTPRINT,
    "stratum": (INT, "stratum of log-MACs, 0 for the cheapest"),
    "seed": (INT, "seed of the sample"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(__doc__, argv, stage="sample_archs", writes=["archs"], runs_networks=False)
    settings, space = job.config.sample_archs, SearchSpace(job.config.space, read_device(job.config.device))
    genotypes, stratum = stratified_sample(space, settings.num_archs, strata=settings.strata, seed=job.seed)
    rows = {**identity_columns(space, genotypes), **footprint_columns(space, genotypes)}
    rows |= {"stratum": stratum.tolist(), "seed": [job.seed] * len(stratum)}
    frame = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    inputs = [job.config.device] if job.config.device else []
    artifacts.write_table(job.files.archs, frame, ARCHS, job.provenance(*inputs))
    counts = np.bincount(stratum, minlength=settings.strata)
    print(
        f"{len(genotypes)} of {space.size:.4g} archs of space {space.settings.name}, "
        f"{human(min(rows['macs']))} to {human(max(rows['macs']))} MACs, "
        f"{counts.min()} to {counts.max()} in each of {settings.strata} strata"
    )
    job.record_costs()


if __name__ == "__main__":
    run(main)
