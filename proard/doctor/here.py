"""Checks of this machine: python and packages, the results' file system, its free space, the GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from proard import __version__
from proard.config import RunConfig
from proard.doctor.finding import Finding, failure, run_command
from proard.space import SearchSpace

INSTALL = "pip install -e . in the environment that runs snakemake"
WATCHED = ("snakemake", "snakemake-executor-plugin-slurm", "torch")  # packages whose versions are checked
LOCK = "import filelock, sys; filelock.FileLock(sys.argv[1]).acquire(timeout=0)"


def python() -> Finding:
    """The interpreter and the package in it."""
    place = Path(__file__).parents[1]
    return Finding("python", f"{sys.version.split()[0]} at {sys.executable}, proard {__version__} from {place}")


def packages() -> Iterator[Finding]:
    """Installed versions of packages that the workflow needs, compared with the package's requirements."""
    bounds = {}
    for text in metadata.requires("proard") or ():
        match = re.match(r"([A-Za-z0-9_.-]+)\s*([^;]*)", text)
        if match and "extra" not in text:
            bounds[match[1]] = match[2].strip()
    for name in WATCHED:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield failure(name, f"not installed beside {sys.executable}", INSTALL)
            continue
        if within(found, bounds.get(name, "")):
            yield Finding(name, found)
        else:
            yield failure(name, f"{found} is installed, {bounds[name]} is needed", INSTALL)


def within(version: str, bounds: str) -> bool:
    """Whether a version such as 9.27.1 is within bounds such as >=9.19,<10."""
    found = _numbers(version)
    for sign, limit in re.findall(r"(>=|<=|==|<|>)\s*([^,]+)", bounds):
        wanted = _numbers(limit)
        here = found[: len(wanted)] if sign in ("==", "<=") else found
        met = {">=": here >= wanted, "<=": here <= wanted, "==": here == wanted, "<": here < wanted, ">": here > wanted}
        if not met[sign]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    leading = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in leading[0].split(".")) if leading else ()


def torch_and_gpu() -> Finding:
    """Whether torch can be imported and which GPUs it sees; a login node needs none."""
    answered, result = run_command(sys.executable, "-m", "proard.doctor.probe")
    if not answered:
        return failure("torch", f"cannot be imported: {result}", INSTALL)
    facts = json.loads(result.splitlines()[-1])
    if facts["gpus"]:
        return Finding("torch", f"{facts['torch']} sees {', '.join(facts['gpus'])}")
    return Finding("torch", f"{facts['torch']} sees no GPU here: jobs here run on the CPU, whole trainings take days")


def arithmetic() -> Finding:
    """Whether gradients are right on this CPU, and what it lacks; checked in another process, which may crash."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the jobs: spinning threads may take minutes here
    return arithmetic_finding(*run_command(sys.executable, "-m", "proard.doctor.arithmetic", seconds=300))


def arithmetic_finding(answered: bool, result: str) -> Finding:
    """Finding from the other process: from its last line, or from why it ended."""
    name = "arithmetic"
    if not answered:
        return failure(name, f"a training step crashes the process: {result}", "report it with the output of lscpu")
    facts = json.loads(result.splitlines()[-1])
    if not facts["right"]:
        wrong = f"the gradient of {facts['parameter']} is wrong (cosine {facts['cosine']:.4f} with the plain backend)"
        return failure(name, wrong, "report it with the output of lscpu; another version of torch may be right")
    kernels = "C kernels compiled" if facts["compiled"] else "no C kernels: training is slower, install a C compiler"
    rounded = "bfloat16 in hardware" if facts["bfloat16"] else "no bfloat16 in hardware: float32 replaces it"
    return Finding(name, f"gradients are right on this CPU ({facts['capability']}); {rounded}; {kernels}")


def file_system(folder: Path) -> Finding:
    """Whether files can be written, renamed over each other and locked where results will lie."""
    name, place = "file system", folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch:
            old, new = Path(scratch) / "old", Path(scratch) / "new"
            old.write_text("old", encoding="utf-8")
            new.write_text("new", encoding="utf-8")
            new.replace(old)
            if old.read_text("utf-8") != "new" or new.exists():
                return failure(name, f"{place} does not show a renamed file at once", "put the clone on another disk")
            with FileLock(old, timeout=0):
                other = subprocess.run([sys.executable, "-c", LOCK, str(old)], capture_output=True, check=False)
            if other.returncode == 0:
                fix = "mount it with locks (NFS: without nolock; Lustre: flock) or put the clone on another disk"
                return failure(name, f"two processes hold one lock in {place}", fix)
    except OSError as error:
        fix = "run from a folder that you may write to, on a disk that all nodes share"
        return failure(name, f"{place}: {error.strerror or error}", fix)
    return Finding(name, f"{place} can be written, renaming is atomic, locks hold")


def room(folder: Path, run: RunConfig | None) -> Finding:
    """Free space, compared with the size of a run's results."""
    free = shutil.disk_usage(folder if folder.exists() else folder.absolute().parent).free
    if run is None:
        return Finding("disk", f"{_size(free)} free; name --configfile to compare with what a run takes")
    needed = disk_of(run)
    result = (
        f"run {run.run} writes about {_size(needed)} without its images, {_size(free)} are free in {folder.resolve()}"
    )
    if needed > free:
        return failure("disk", result, "free some, or run from another disk: snakemake --directory FOLDER")
    return Finding("disk", result)


def disk_of(run: RunConfig) -> int:
    """About how many bytes the weights and tables of a run take.

    A training state holds weights, momentum and two averages, and twice that while it is being replaced; every network
    is kept; a measured arch takes a cached record and its rows; a student leaves three files of its size.
    """
    space = SearchSpace(run.space)
    network = 4 * space.spec(space.largest).params
    networks = len(run.train_phase.phases) + 2
    archs = run.sample_archs.num_archs * 8192
    return network * (networks + 8) + archs + len(run.select_student.budgets) * 3 * network


def _size(count: int) -> str:
    """Bytes in GiB or MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def environment() -> Finding | None:
    """A remark if SLURM_CONF names the configuration: the executor's plugin drops this variable inside jobs."""
    if not os.environ.get("SLURM_CONF") or Path("/etc/slurm/slurm.conf").exists():
        return None
    result = f"SLURM_CONF={os.environ['SLURM_CONF']}; the plugin drops SLURM_ variables before srun inside a job"
    return Finding("SLURM_CONF", result, "the job below shows whether srun finds its controller without it")
