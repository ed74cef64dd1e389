"""What every stage shares: its flags, its settings, and errors without a traceback."""

from __future__ import annotations

import argparse
import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from proard.artifacts import Provenance
from proard.config import NEEDS, RunConfig, UserError, parse
from proard.host import take_any_character, usable_cores
from proard.stages.gpus import claim_gpu
from proard.stages.launch import become_several, fail, follow_launcher, processes
from proard.stages.ledger import Ledger


@dataclass(frozen=True)
class Job:
    """A stage's parsed command line.

    Attributes
    ----------
    config : RunConfig
        The sections this stage reads; all others stand at their defaults and are not to be used.
    files : argparse.Namespace
        One attribute per file flag; a list where the stage reads several.
    threads : int
        CPU threads of the job; several processes of it share them.
    ledger : Ledger
        What the job costs, from the parsing of its command line on.
    """

    stage: str
    config: RunConfig
    seed: int
    device: str
    files: argparse.Namespace
    sections: dict[str, Any]
    ledger: Ledger
    threads: int = 1

    def provenance(self, *inputs: str) -> Provenance:
        """Provenance of what this job writes, given the paths it read."""
        return Provenance.of(stage=self.stage, settings=self.sections, seed=self.seed, inputs=inputs)

    def record_costs(self) -> None:
        """Write the ledger; the last thing a stage does."""
        self.ledger.write(self.provenance())


def parse_arguments(
    description: str | None,
    argv: Sequence[str] | None,
    *,
    stage: str,
    reads: Sequence[str] = (),
    writes: Sequence[str] = (),
    lists: Sequence[str] = (),
    optional: Sequence[str] = (),
    optional_lists: Sequence[str] = (),
    runs_networks: bool = True,
) -> Job:
    """Parse a stage's flags.

    Every stage has `--settings` (the JSON of its sections, as printed by the workflow), `--seed`, `--device`,
    `--threads` and one flag per file: `reads` and `writes` name one path each, `lists` one or more,
    `optional` and `optional_lists` what may be left out. A stage that runs no networks needs no device: it does not
    wait for the import of torch.
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
    for name in optional_lists:
        parser.add_argument(f"--{name.replace('_', '-')}", default=[], nargs="*", metavar="PATH", help="read")
    for name in writes:
        parser.add_argument(f"--{name.replace('_', '-')}", required=True, metavar="PATH", help="written")
    for name in optional:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE")
    trains = stage.startswith("train_")
    if trains:
        parser.add_argument("--minutes", type=float, help="time the job has, where its scheduler does not say")
        parser.add_argument("--save-every-minutes", type=float, default=5.0, help="between two savings of the state")
    files = parser.parse_args(argv)
    if processes() > 1 and not trains:
        raise UserError(f"{stage} is no training: start it as one process, python -m proard.stages.{stage}")
    config = parse(RunConfig, files.settings)
    threads = files.threads or usable_cores()
    sections = config.model_dump(mode="json", include=set(NEEDS[stage]))
    device = _prepare_device(files.device, max(threads // processes(), 1)) if runs_networks else "cpu"
    ledger = Ledger(stage, getattr(files, writes[0]), device=device, threads=threads, processes=processes())
    return Job(stage, config, files.seed, device, files, sections, ledger, threads)


def keep_heap() -> bool:
    """Let the C library reuse freed memory instead of returning it to the system; False where there is no such call.

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
    torch.backends.cudnn.allow_tf32 = False  # what is measured is what is exported, on every device
    torch.set_num_threads(threads)
    if name == "auto" and torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        torch.cuda.set_device(claim_gpu(torch.cuda.device_count()))
    device, enters = chosen_device(name, gpu=torch.cuda.is_available(), several="LOCAL_RANK" in os.environ)
    if enters:
        from proard.training.ranks import enter_backward_thread

        enter_backward_thread(device)
    return device


def chosen_device(name: str, *, gpu: bool, several: bool) -> tuple[str, bool]:
    """The device that a name stands for, and whether its backward thread can be entered at once.

    Of several processes none has chosen its own GPU yet: they enter later.
    """
    if name == "auto":
        name = "cuda" if gpu else "cpu"
    if name.startswith("cuda") and not gpu:
        raise UserError("--device cuda was asked for, but torch sees no GPU; use --device cpu or check the driver")
    return name, name.startswith("cuda") and not several


def run(main: Callable[[], None]) -> None:
    """Run a stage as a program: an error that the user can correct is one line, everything else a traceback."""
    take_any_character()
    try:
        become_several()
        follow_launcher()
        main()
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit("error: stopped by SIGINT; the same command begins this stage again") from None
