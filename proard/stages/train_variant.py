"""Train one phase of one variant with one seed, as `train_phase` does: data, shared teacher -> supernet.safetensors."""

from __future__ import annotations

from collections.abc import Sequence

from proard.stages.common import parse_arguments, run
from proard.stages.train_phase import train


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="train_variant",
        reads=["train", "val", "teacher"],
        writes=["supernet", "history"],
        optional=["previous", "control"],
    )
    (variant,) = job.config.train_variant.variants.values()
    (phase,) = variant.phases
    train(job, phase)
    job.record_costs()


if __name__ == "__main__":
    run(main)
