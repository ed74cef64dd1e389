"""What the launcher of a training stage decides, not its settings: processes, time limit, interval of saving.

The workflow passes it in environment variables, one JSON object each, so that a shell line, by which Snakemake sees
whether a finished job is to be repeated, is the same whatever they say.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from typing import Any, NoReturn

from proard.config import UserError

PROCESSES = "PROARD_PROCESSES"  # {"train_phase": 4}
FIRST_SPEAKS = 3.0  # seconds that other processes leave the first one to say what ends them all
LAST_WORDS = 10  # seconds that a process has once the launcher ends it, as it does as soon as one process has ended
PDEATHSIG = 1  # linux/prctl.h


def rank() -> int:
    """Number of this process among those that torchrun started; 0 alone."""
    return int(os.environ.get("RANK", 0))


def processes() -> int:
    """Processes that torchrun started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def become_several() -> None:
    """Replace this program by torchrun with as many processes of it as the workflow says, where that is more than one.

    The number of the process stays, and with it whoever waits for it or sends it signals.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or "LOCAL_RANK" in os.environ:
        return
    count = _told(PROCESSES).get(spec.name.rpartition(".")[2], 1)
    if count > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", spec.name]
        print("starting", " ".join(["python", *command]), flush=True)
        os.execv(sys.executable, [sys.executable, *command, *sys.argv[1:]])


def follow_launcher() -> None:
    """As one of several processes: only rank 0 prints, and all end with the launcher.

    Outside the training loop, which has a handler of its own, SIGTERM leaves the time to print an error.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LAST_WORDS))  # SIGALRM ends the process
    try:
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):  # no Linux
        return


def fail(error: UserError) -> NoReturn:
    """End with one line. Of several processes rank 0 prints the error; the others wait for it."""
    from proard.training.ranks import Gone  # not what a stage that does not train needs

    if rank() > 0 and not isinstance(error, Gone):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if signal.alarm(0):  # the launcher ends this process already: another one has failed before
            os._exit(1)
        time.sleep(FIRST_SPEAKS)
    print(f"error: {error}", file=sys.stderr, flush=True)
    if "LOCAL_RANK" in os.environ:  # taking down a group that has lost a member may wait for it
        sys.stdout.flush()
        os._exit(1)
    raise SystemExit(1) from None


def _told(variable: str) -> dict[str, Any]:
    """The value that the workflow has set."""
    try:
        return dict(json.loads(os.environ.get(variable) or "{}"))
    except ValueError:
        raise UserError(f"{variable} is {os.environ[variable]!r}; expected a JSON object by stage") from None
