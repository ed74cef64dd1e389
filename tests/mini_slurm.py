"""A real SLURM on this machine for the tests: munge, one controller, two nodes with two fake GPUs each.

All of it lies in one folder, runs under the user who starts it, listens on loopback, and ends with the context manager.
By hand, a shell in which sbatch works: `python tests/mini_slurm.py bash`.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PDEATHSIG = 1  # linux/prctl.h
NODES, CPUS, MEMORY_MB = ("n1", "n2"), 8, 64000
DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo", "munge")
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1000
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
KillWait=5
MinJobAge=3600
InactiveLimit=0
ReturnToService=1
MailProg=/bin/true
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs={cpus} RealMemory={memory} \
Gres=gpu:h200:{gpus} State=UNKNOWN
PartitionName=work Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=n2 MaxTime=INFINITE State=UP
"""
GPU_FILES = ("/dev/null", "/dev/zero")  # any device files: SLURM needs some, and no process opens them
GRES = "NodeName=n[1-2] Name=gpu Type=h200 File={file} Flags=nvidia_gpu_env\n"


def missing() -> str | None:
    """Why no SLURM can be started here, or None."""
    path = os.pathsep.join([*os.get_exec_path(), "/usr/sbin", "/sbin"])
    absent = [name for name in (*DAEMONS, *COMMANDS) if shutil.which(name, path=path) is None]
    if absent:
        return f"no {', '.join(absent)} here; apt-get install slurm-wlm munge"
    return None


class Slurm:
    """A running cluster; `environment` makes commands talk to it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, []
        first = _free_ports(3)
        host = socket.gethostname().split(".")[0]
        facts = {"host": host, "user": _user(), "folder": folder, "ports": [first, first + 1, first + 2]}
        conf = CONF.format(**facts, cpus=CPUS, memory=MEMORY_MB, gpus=len(GPU_FILES))
        (folder / "slurm.conf").write_text(conf)
        (folder / "gres.conf").write_text("".join(GRES.format(file=file) for file in GPU_FILES))
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        for name in ("state", "bin", *(f"spool.{node}" for node in NODES)):
            (folder / name).mkdir()
        path = [*os.get_exec_path(), "/usr/sbin", "/sbin"]
        # Inside a job the executor plugin drops SLURM_CONF, which no site with a file in /etc/slurm notices.
        srun = folder / "bin" / "srun"
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
        srun.chmod(0o755)
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.pathsep.join([str(srun.parent), *path]),
        }

    def start(self) -> None:
        """Start munge, controller and nodes; wait until the nodes are idle."""
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        files = {"key-file": key, **{f"{what}-file": self.folder / f"munge.{what}" for what in ("pid", "log", "seed")}}
        flags = [f"--{flag}={path}" for flag, path in files.items()]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *flags)
        self._wait_for(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-i")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._wait_for(lambda: set(self("sinfo", "-h", "-o", "%t", check=False).split()) == {"idle"}, "the nodes")

    def stop(self) -> None:
        """Cancel all jobs and end the daemons."""
        self("scancel", "--quiet", f"--user={_user()}", check=False)
        deadline = time.monotonic() + 20
        while self("squeue", "--noheader", check=False) and time.monotonic() < deadline:
            time.sleep(0.2)  # without a controller, a job's slurmstepd would not end
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                continue
            process.kill()
            process.wait()

    def __call__(self, *command: str | Path, check: bool = True) -> str:
        """Run a command of the cluster; its standard output."""
        done = subprocess.run(
            [str(word) for word in command], env=self.environment, capture_output=True, text=True, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))} failed: {done.stderr.strip()}")
        return done.stdout

    def jobs(self, comment: str = "", *, states: str = "all") -> dict[str, dict[str, str]]:
        """Facts of the jobs whose comment, rule and wildcards, contains a text; oldest first, by their id."""
        columns = {
            "id": "JobArrayID",
            "state": "State",
            "comment": "Comment",
            "nodes": "NodeList",
            "gpus": "tres-per-job",
            "cpus": "NumCPUs",
            "memory": "MinMemory",
            "limit": "TimeLimit",
            "partition": "Partition",
            "folder": "WorkDir",
        }
        wanted = ",".join(f"{name}:400|" for name in columns.values())
        listed = self("squeue", "--noheader", f"--states={states}", "--sort=i", "--array", f"--Format={wanted}")
        cells = [[cell.strip() for cell in line.split("|")] for line in listed.splitlines()]
        rows = [dict(zip(columns, row, strict=False)) for row in cells]
        return {row["id"]: row for row in rows if comment in row["comment"]}

    def _daemon(self, name: str, *arguments: str) -> None:
        """Start a daemon as a child, in its own process group, with its output in a file."""
        with (self.folder / f"{name}.out").open("ab") as said:
            self.processes.append(
                subprocess.Popen(
                    [shutil.which(name, path=self.environment["PATH"]), *arguments],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            )

    def _wait_for(self, ready, what: str, *, seconds: float = 60.0) -> None:
        """Wait until a condition holds; raise with the logs if a daemon ended or the wait is too long."""
        deadline = time.monotonic() + seconds
        while not ready():
            ended = [process.args[0] for process in self.processes if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                paths = [path for path in sorted(self.folder.iterdir()) if path.suffix in (".out", ".log")]
                logs = [f"{path.name}: {path.read_text(errors='replace')[-2000:]}" for path in paths]
                raise RuntimeError("\n".join([f"{what} did not come up; ended: {ended}", *logs]))
            time.sleep(0.1)


def die_with_parent() -> None:
    """Run in a child before exec: end it with the tests, even if these are killed."""
    ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM)


def _user() -> str:
    """The user's name in the system's database: SLURM ignores $USER."""
    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> int:
    """First of some consecutive free ports."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = probe.getsockname()[1]
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as other:
                    other.bind(("127.0.0.1", port))
            return first


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Slurm]:
    """A SLURM cluster whose files lie in an empty folder; its path must be short, for the sake of sockets."""
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def main() -> None:
    """Run a command, or the shell, inside a cluster."""
    if (why := missing()) is not None:
        sys.exit(f"error: {why}")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, slurm_cluster(Path(folder)) as cluster:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # is for the command
        command = sys.argv[1:] or [os.environ.get("SHELL", "/bin/sh")]
        status = subprocess.run(command, env=cluster.environment, check=False).returncode
    sys.exit(status)


if __name__ == "__main__":
    main()
