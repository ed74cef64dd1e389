"""Resume state of a training: beside its output, bound to settings, seed, inputs; one process writes it at a time."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from proard import __version__
from proard.artifacts import ArtifactError, load_tensors, save_tensors
from proard.config import UserError
from proard.kernels import has_bfloat16
from proard.training.ranks import Ranks

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGUSR1: the early warning that some clusters send


class Interrupted(UserError):
    """The training stopped early with its state saved; the same command continues."""


class Costs(Protocol):
    """What a training has cost so far, over all its attempts."""

    def state(self) -> Mapping[str, Any]:
        """Plain numbers to keep."""

    def resume(self, state: Mapping[str, Any] | None) -> None:
        """Go on from kept numbers."""


def fingerprint(*, settings: Mapping[str, Any], seed: int, inputs: Mapping[str, str], device: str, threads: int) -> str:
    """Hash of everything that the final weights depend on.

    `threads` are those of the job, whatever the number of processes that share them: the number of processes moves
    weights by the rounding of sums alone, and a job that is given fewer GPUs than before shall continue.
    """
    facts = {
        "settings": settings,
        "seed": seed,
        "inputs": inputs,
        "device": device.split(":")[0],
        **({} if has_bfloat16(device.split(":")[0]) else {"bfloat16": "float32"}),
        "threads": threads,
        "torch": torch.__version__,
        "proard": __version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class ResumeState:
    """Files `NAME.state`, `NAME.previous.state` and `NAME.lock` beside an output.

    Parameters
    ----------
    output : path
        The declared output; its state lies beside it under the same name.
    fingerprint : str
        A state with another fingerprint does not count.
    patience : float
        Seconds to wait for another process to hand over.
    ranks : Ranks, optional
        Processes that train together: the first holds the lock for all.
    costs : Costs, optional
        Kept with the state, so that they add up over attempts.
    """

    def __init__(
        self,
        output: str | Path,
        fingerprint: str,
        *,
        patience: float = 300.0,
        ranks: Ranks | None = None,
        costs: Costs | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        output = Path(output)
        self.path = output.with_name(f"{output.stem}.state")
        self.previous_path = output.with_name(f"{output.stem}.previous.state")
        self.fresh_path = output.with_name(f"{output.stem}.fresh.state")
        self.lock_path = output.with_name(f"{output.stem}.lock")
        self.request_path = output.with_name(f"{output.stem}.handover")
        self.fingerprint, self.patience, self.costs = fingerprint, patience, costs

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the lock; a process that still trains here is asked to save and stop.

        Raises
        ------
        UserError
            It did not stop within `patience`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.ranks.first:
            self.ranks.all_reduce_max(0)
            yield
            return
        with self._locked():
            for stale in self._left_over():
                stale.unlink(missing_ok=True)  # left by a process that was killed while it wrote
            self.lock_path.write_text(f"process {os.getpid()} on {os.uname().nodename}", encoding="utf-8")
            self.ranks.all_reduce_max(0)  # the others wait until the lock is held
            yield

    def _locked(self) -> AbstractContextManager[object]:
        """Acquire the lock; ask another holder to save and stop."""
        lock = FileLock(self.lock_path)
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            holder = self.lock_path.read_text("utf-8").strip() if self.lock_path.exists() else ""
            holder = holder or "another process"
            print(f"{holder} still trains {self.path.stem}; asking it to save and stop", flush=True)
            self.request_path.touch()
        try:
            return lock.acquire(timeout=self.patience, poll_interval=0.2)
        except Timeout:
            raise UserError(f"{holder} holds {self.lock_path} and does not stop; end it and rerun") from None

    def handover_asked(self) -> bool:
        """Whether a successor waits for the lock."""
        return self.request_path.exists()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and facts of the newest state that fits, or None; others are ignored with a message."""
        for path in (self.path, self.previous_path):
            if not path.exists():
                continue
            try:
                tensors, header = load_tensors(path, kind="state")
            except ArtifactError as error:
                print(f"state ignored: {error}", flush=True)
                continue
            if header["fingerprint"] == self.fingerprint:
                if self.costs is not None:
                    self.costs.resume(header["facts"].get("costs"))
                return tensors, header["facts"]
            print(f"state ignored: {path} is of other settings, seed, threads or inputs", flush=True)
        return None

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write the state; the one before is kept as well. At any moment one of the two is whole."""
        costs = {} if self.costs is None else {"costs": self.costs.state()}
        facts = {**facts, **costs}
        save_tensors(self.fresh_path, tensors, kind="state", fingerprint=self.fingerprint, facts=facts)
        if self.path.exists():
            self.path.replace(self.previous_path)
        self.fresh_path.replace(self.path)

    def finish(self) -> None:
        """Remove the states and, as the stage is done, its lock."""
        for path in (self.path, self.previous_path, self.request_path, self.lock_path):
            path.unlink(missing_ok=True)

    def _left_over(self) -> list[Path]:
        """Files of a process that was killed: its request, and what it was about to write."""
        folder, stem = self.path.parent, self.path.stem
        return [self.request_path, self.fresh_path, *folder.glob(f".{stem}.*.part")]


class StopFlag:
    """Remembers that a signal arrived."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


@contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Turn SIGTERM, SIGINT and SIGUSR1 into a flag that the loop reads between steps."""
    flag = StopFlag()

    def remember(number: int, _frame: object) -> None:
        flag.signal = signal.Signals(number)

    previous = {number: signal.signal(number, remember) for number in STOPPING}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
