"""What every stage shares: its flags, its settings, and errors without a traceback."""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from proard.artifacts import Provenance
from proard.config import NEEDS, RunConfig, UserError, parse
from proard.stages.gpus import claim_gpu


@dataclass(frozen=True)
class Job:
    """A stage's parsed command line.

    Attributes
    ----------
    config : RunConfig
        The sections this stage reads; all others stand at their defaults and are not to be used.
    files : argparse.Namespace
        One attribute per file flag; a list where the stage reads several.
    """

    stage: str
    config: RunConfig
    seed: int
    device: str
    files: argparse.Namespace
    sections: dict[str, Any]

    def provenance(self, *inputs: str) -> Provenance:
        """Provenance of what this job writes, given the paths it read."""
        return Provenance.of(stage=self.stage, settings=self.sections, seed=self.seed, inputs=inputs)


def parse_arguments(
    description: str | None,
    argv: Sequence[str] | None,
    *,
    stage: str,
    reads: Sequence[str] = (),
    writes: Sequence[str] = (),
    lists: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> Job:
    """Parse a stage's flags.

    Every stage has `--settings` (the JSON of its sections, as printed by the workflow), `--seed`, `--device`,
    `--threads` and one flag per file: `reads` and `writes` name one path each, `lists` one or more,
    `optional` one that may be left out.
    """
    parser = argparse.ArgumentParser(prog=f"python -m proard.stages.{stage}", description=description)
    parser.add_argument("--settings", required=True, help="JSON of the sections " + ", ".join(NEEDS[stage]))
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all allowed to the process)")
    for name in reads:
        parser.add_argument(f"--{name.replace('_', '-')}", required=True, metavar="PATH", help="read")
    for name in lists:
        parser.add_argument(f"--{name.replace('_', '-')}", required=True, nargs="*", metavar="PATH", help="read")
    for name in writes:
        parser.add_argument(f"--{name.replace('_', '-')}", required=True, metavar="PATH", help="written")
    for name in optional:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE")
    files = parser.parse_args(argv)
    config = parse(RunConfig, files.settings)
    threads = files.threads or len(os.sched_getaffinity(0))
    sections = config.model_dump(mode="json", include=set(NEEDS[stage]))
    return Job(stage, config, files.seed, _prepare_device(files.device, threads), files, sections)


def keep_heap() -> bool:
    """Let the C library reuse freed memory instead of returning it to the system; False where it cannot be asked.

    Activations of some MB come and go all the time; as fresh pages the kernel would have to zero each of them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # no glibc
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    return all((mallopt(mmap_threshold, 2**25), mallopt(trim_threshold, 2**31 - 1), mallopt(top_pad, 2**26)))


def _prepare_device(name: str, threads: int) -> str:
    """Resolve `auto`, set the number of threads, and refuse a device that is not there."""
    import torch

    keep_heap()
    torch.set_num_threads(threads)
    if name == "auto" and torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        torch.cuda.set_device(claim_gpu(torch.cuda.device_count()))
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch sees no GPU; use --device cpu or check the driver")
    return name


def run(main: Callable[[], None]) -> None:
    """Run a stage as a program: an error that the user can mend is one line, everything else a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
