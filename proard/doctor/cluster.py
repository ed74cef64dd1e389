"""Checks of a SLURM cluster against the profile: commands, account, partitions, status of jobs, and jobs themselves."""

from __future__ import annotations

import json
import math
import re
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from proard import __version__
from proard.config import RunConfig
from proard.doctor.finding import Finding, failure, listing, run_command
from proard.doctor.probe import HELD, TOKEN

MIN_JOB_AGE = 120  # seconds: three times the plugin's delay before it first queries its jobs
MAX_ARRAY = 50  # tasks: each adds 2.1 kB to an argument, which Linux limits to 128 KiB
PLACEHOLDER = "YOUR_"


def controller() -> Finding:
    """Whether the commands exist and the controller answers."""
    for command in ("sbatch", "squeue", "scontrol", "scancel", "srun"):
        answered, result = run_command(command, "--version")
        if not answered:
            return failure(command, result, "run this where you submit jobs; often: module load slurm")
    answered, partitions = run_command("sinfo", "--noheader", "--format=%P")
    if not answered:
        return failure("SLURM", f"the controller does not answer: {partitions}", "ask the site, or try again later")
    return Finding("SLURM", f"{result}; partitions {listing(partitions.split())}")


def requested_resources(profile: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Resources in the profile: of `a CPU job`, and of each kind of job with a GPU, named by its first rule."""
    common = dict(profile.get("default-resources") or {})
    kinds = {"a CPU job": common}
    seen = []
    for rule, own in (profile.get("set-resources") or {}).items():
        resources = {"gpu": 1, **common, **own}
        if resources not in seen:
            seen.append(resources)
            kinds[f"a job of {rule}"] = resources
    if not seen:
        kinds["a GPU job"] = {**common, "gpu": 1}
    return kinds


def flags(resources: Mapping[str, Any]) -> list[str]:
    """Flags of sbatch for a job's resources."""
    names = {
        "slurm_account": "--account",
        "slurm_partition": "--partition",
        "constraint": "--constraint",
        "qos": "--qos",
    }
    found = [f"{flag}={resources[name]}" for name, flag in names.items() if resources.get(name)]
    if resources.get("gres"):
        found.append("--gres=" + str(resources["gres"]).strip("'\""))
    if resources.get("gpu"):
        model = f"{resources['gpu_model']}:" if resources.get("gpu_model") else ""
        found.append(f"--gpus={model}{resources['gpu']}")
    if resources.get("slurm_extra"):
        found += shlex.split(str(resources["slurm_extra"]).strip("'\""))
    return found


def acceptance(kind: str, resources: Mapping[str, Any], where: Path) -> Finding:
    """Whether SLURM accepts such a job's account, partition, GPU model and limits (`sbatch --test-only`)."""
    for name, value in resources.items():
        if PLACEHOLDER in str(value):
            return failure(kind, f"{name} is still {value}", f"write your site's into {where}")
    words = flags(resources)
    accepted, result = run_command("sbatch", "--test-only", *words, "--time=10", "--wrap=true")
    if accepted:
        return Finding(kind, f"sbatch {' '.join(words)} is accepted")
    _, partitions = run_command("sinfo", "--noheader", "--format=%P %G")
    fix = f"correct it in {where}; partitions and their GPUs: {listing(partitions.splitlines())}"
    if "gpu" in str(result).lower() or resources.get("gpu") or resources.get("gres"):
        fix += "; on a cluster without GPUs ignore this: only trainings with gpu: 1 are refused"
    return failure(kind, f"sbatch {' '.join(words)}: {result}", fix)


def status_of_jobs(profile: Mapping[str, Any], where: Path) -> Finding:
    """Whether Snakemake can query how its jobs ended."""
    command = profile.get("slurm-status-command", "sacct")
    recorded, result = run_command("sacct", "--noheader", "--allocations", "--format=JobID", "--starttime=now")
    if command == "sacct":
        if recorded:
            return Finding("status of jobs", "sacct answers")
        return failure("status of jobs", f"sacct: {result}", f"write slurm-status-command: squeue into {where}")
    _, configuration = run_command("scontrol", "show", "config")
    match = re.search(r"MinJobAge\s*=\s*(\d+)", configuration)
    age = int(match[1]) if match else 0
    if age >= MIN_JOB_AGE:
        return Finding("status of jobs", f"squeue lists finished jobs for {age} s (MinJobAge)")
    forgets = f"squeue drops finished jobs after {age} s (MinJobAge), before Snakemake queries them"
    if recorded:
        return Finding("status of jobs", f"{forgets}; sacct is used instead, and answers")
    return failure(
        "status of jobs", f"{forgets}, and sacct: {result}", "ask the site for MinJobAge=300 or for accounting"
    )


def arrays(profile: Mapping[str, Any], run: RunConfig | None, where: Path) -> Finding | None:
    """Whether job arrays, if the profile uses them, can hold all shards at once."""
    wanted = profile.get("slurm-array-jobs")
    if not wanted:
        return None
    jobs, limit = int(profile.get("jobs", 0)), int(profile.get("slurm-array-limit", 1000))
    if limit > MAX_ARRAY:
        fix = f"write slurm-array-limit: {MAX_ARRAY} into {where}: longer arrays exceed the limit of a command line"
        return failure("job arrays", f"up to {limit} shards in one array", fix)
    if run is None:
        return Finding("job arrays", f"of {wanted}, up to {jobs} shards; name --configfile to compare")
    shards = math.ceil(run.sample_archs.num_archs / run.evaluate_archs.archs_per_shard)
    if shards > jobs:
        fix = f"write jobs: {shards} or more into {where}, or leave slurm-array-jobs out"
        return failure("job arrays", f"{shards} shards, but jobs: {jobs}; the plugin would lose some", fix)
    return Finding("job arrays", f"{shards} shards, jobs: {jobs}")


def job(kind: str, resources: Mapping[str, Any], folder: Path, *, patience: float) -> Iterator[Finding]:
    """Run a job that checks its node; it starts as the plugin's jobs do, by srun inside sbatch.

    Parameters
    ----------
    patience : float
        Seconds to wait for its end; a job that is still queued then is cancelled, which is no failure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch, FileLock(Path(scratch) / HELD):
        place = Path(scratch).resolve()
        token = secrets.token_hex(8)
        (place / TOKEN).write_text(token, encoding="utf-8")
        step = ["srun", "-n1", "--cpu-bind=q", sys.executable, "-m", "proard.doctor.probe", str(place)]
        script = f"#!/bin/sh\nunset SLURM_CONF SLURM_CPU_BIND\nexec {shlex.join(step)}\n"
        words = [
            *flags(resources),
            "--time=10",
            "--mem=4000",
            "--job-name=doctor",
            f"--output={place}/result",
            "--export=ALL",
        ]
        submitted, result = run_command("sbatch", "--parsable", *words, stdin=script)
        if not submitted:
            yield failure(f"{kind} runs", result, "see above")
            return
        number = result.split(";")[0]
        state = _wait(number, place, patience)
        answer = place / "answer.json"
        if not answer.exists():
            if state in ("PENDING", "CONFIGURING"):
                _, reason = run_command("squeue", "--noheader", f"--jobs={number}", "--format=%r")
                run_command("scancel", number)
                fix = "try again with a longer --patience when the cluster is less busy"
                yield Finding(
                    f"{kind} runs", f"job {number} is still queued ({reason}) after {patience:.0f} s; cancelled", fix
                )
                return
            run_command("scancel", number)
            log = place / "result"
            written = log.read_text("utf-8", errors="replace") if log.exists() else ""
            last = [line for line in written.splitlines() if line]
            fix = f"put {place.parent} on a disk that all nodes share"
            if last:
                fix = "find the cause of this line in a job of your own: sbatch --wrap '...'"
            yield failure(f"{kind} runs", f"job {number} ended without an answer: {last[-1] if last else state}", fix)
            return
        yield from _judge(kind, resources, json.loads(answer.read_text("utf-8")), token, place.parent)


def _wait(number: str, place: Path, patience: float) -> str:
    """Wait until a job has written its answer or ended; return its last known state."""
    deadline, state = time.monotonic() + patience, ""
    while time.monotonic() < deadline:
        if (place / "answer.json").exists():
            return "COMPLETED"
        answered, state = run_command("squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%T")
        if not answered or state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            time.sleep(2)  # its files may appear later on a shared disk
            return state
        time.sleep(1)
    return state


def _judge(
    kind: str, resources: Mapping[str, Any], seen: Mapping[str, Any], token: str, shared: Path
) -> Iterator[Finding]:
    """Compare what the job found with this machine."""
    host = seen["host"]
    if seen["token"] != token:
        yield failure(f"{kind}: files", f"{shared} on {host} is not the folder of this name here", "use a shared disk")
    elif not seen["respects_locks"]:
        fix = "mount it with locks (NFS: without nolock; Lustre: flock) or run from another disk"
        yield failure(f"{kind}: files", f"{host} acquires locks in {shared} that are held here", fix)
    else:
        yield Finding(f"{kind}: files", f"{host} reads, writes and respects locks in {shared}")
    here = (sys.executable, __version__)
    if (seen["python"], seen["proard"]) != here:
        result = f"{seen['python']} with proard {seen['proard']} on {host}, {here[0]} with {here[1]} here"
        yield failure(
            f"{kind}: python", result, "activate the environment before snakemake, and install it on a shared disk"
        )
    else:
        yield Finding(f"{kind}: python", f"{seen['python']} on {host}, torch {seen['torch']}")
    if resources.get("gpu") or resources.get("gres"):
        if seen["gpus"]:
            yield Finding(f"{kind}: GPU", f"torch sees {', '.join(seen['gpus'])} on {host}")
        else:
            result = f"torch {seen['torch']} sees none on {host} (CUDA_VISIBLE_DEVICES={seen['visible']})"
            yield failure(
                f"{kind}: GPU", result, "install a torch for CUDA and the node's driver: compare nvidia-smi in a job"
            )
