"""Large runs: planning, submitting and merging thousands of evaluation shards. Nothing is trained or measured.

    python benchmarks/bench_scale.py plan --shards 10000     # Snakemake's dry run
    python benchmarks/bench_scale.py merge --shards 10000    # merge_table on that many tables
    python benchmarks/bench_scale.py submit --shards 1000    # the profile, with an sbatch whose jobs are done at once

`submit` measures Snakemake and its plugin on the login node, with a fake scheduler that takes no time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import Options, machine, show, write_rows

from proard.artifacts import MEASURED, Provenance, write_table
from proard.config import job_settings, load
from proard.space import SearchSpace
from proard.space.sampling import identity_columns, shard_names
from proard.stages import merge_table

ROOT = Path(__file__).parents[1]
PER_SHARD = 10
SHARDS = (1000, f"of {PER_SHARD} archs each")
COMMANDS = {  # a fake scheduler: a job is done, with all its files, as soon as it is submitted
    "sbatch": """
case $1 in --version) echo slurm 24.05; exit;; esac
for word; do case $word in rule_evaluate_archs_wildcards_*) shard=${word##*_};; esac; done
mkdir -p results/scale/evaluate_archs/$shard
echo table > results/scale/evaluate_archs/$shard/table.parquet
echo seconds > results/scale/benchmarks/evaluate_archs/$shard.tsv
number=$(echo ${shard%-*} | sed 's/^0*//'); number=$((number + 1))
echo "$number|COMPLETED" >> jobs
echo $number
""",
    "squeue": "cat jobs",
    "scontrol": "echo MinJobAge = 300 sec",
    "sinfo": "echo 'work*'",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the three measurements."""
    options = Options(__doc__, "scale", quick={"shards": 100}, rounds=None, seed=None, shards=SHARDS)
    options.add_argument("what", nargs="?", default="plan", choices=("plan", "merge", "submit"))
    args = options.read(argv)
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        row = {"plan": plan, "merge": merge, "submit": submit}[args.what](Path(folder), args.shards)
    row = {"benchmark": "scale", "row": args.what, "shards": args.shards, **row, "machine": machine()}
    write_rows(args.json, [row])
    numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
    show(f"{args.what}, {args.shards} shards", [row], {key: f"{key}:,.6g" for key in numbers})


def config(folder: Path, shards: int) -> tuple[dict[str, Any], Path]:
    """Settings of a run with so many shards, and their file."""
    sections = {
        "run": "scale",
        "sample_archs": {"num_archs": shards * PER_SHARD},
        "evaluate_archs": {"archs_per_shard": PER_SHARD},
        "fit_predictor": {"held_out": 2, "folds": 2},
        "space": "resnet_cifar",
        "select_student": {"budgets": ["macs=500M"]},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    return sections, path


def snakemake(folder: Path, *arguments: str, path: Path, **options: Any) -> tuple[float, str]:
    """Seconds of a call that succeeds, and its output."""
    command = [sys.executable, "-m", "snakemake", *arguments, "--directory", folder, "--configfile", path]
    options |= {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "check": False}
    started = time.perf_counter()
    done = subprocess.run(list(map(str, command)), **options)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"snakemake failed:\n{done.stdout[-3000:]}")
    return seconds, done.stdout


def plan(folder: Path, shards: int) -> dict[str, Any]:
    """A dry run of everything."""
    _, path = config(folder, shards)
    seconds, output = snakemake(folder, "--dry-run", "--quiet", "reason", path=path)
    total = next(line.split()[1] for line in output.splitlines() if line.startswith("total"))
    return {"jobs": int(total), "seconds": seconds}


def merge(folder: Path, shards: int) -> dict[str, Any]:
    """The stage on synthetic tables."""
    sections, _ = config(folder, shards)
    run = load(sections)
    space, total = SearchSpace(run.space), shards * PER_SHARD
    rng = np.random.default_rng(0)
    genotypes = np.unique(space.sample(int(total * 1.01), rng), axis=0)[:total]
    identity = identity_columns(space, genotypes)
    origin = Provenance("scale", "evaluate_archs", inputs={name: "0" * 64 for name in merge_table.SHARED_INPUTS})
    archs = folder / "archs.parquet"
    table = [dict(zip(identity, values, strict=True)) for values in zip(*identity.values(), strict=True)]
    write_table(archs, table, {name: MEASURED[name] for name in identity}, origin)
    same = {"clean_acc": 0.5, "robust_acc": 0.3, "norm": "linf", "eps": 8 / 255, "split": "val", "attack": "pgd20"}
    for number, name in enumerate(shard_names(total, PER_SHARD)):
        rows = [{**row, **same} for row in table[number * PER_SHARD :][:PER_SHARD]]
        write_table(folder / "shards" / name / "table.parquet", rows, MEASURED, origin)
    files = ["--archs", str(archs), "--table", str(folder / "table.parquet")]
    command = ["--settings", job_settings(run, "merge_table"), "--shards", str(folder / "shards"), *files]
    started = time.perf_counter()
    merge_table.main([*command, "--per-shard", str(PER_SHARD)])
    seconds = time.perf_counter() - started
    shard = next((folder / "shards").rglob("*.parquet")).stat().st_size
    return {"seconds": seconds, "bytes_of_a_shard": shard, "bytes_merged": (folder / "table.parquet").stat().st_size}


def submit(folder: Path, shards: int) -> dict[str, Any]:
    """All shards through the profile and its plugin."""
    _, path = config(folder, shards)
    programs = folder / "bin"
    programs.mkdir()
    for name, line in COMMANDS.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    needed = ["train_phase/all/supernet.safetensors", "sample_archs/archs.parquet"]
    needed += [f"prepare_data/{split}.safetensors" for split in ("train", "val")]
    for name in needed:
        file = folder / "results" / "scale" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    (folder / "results" / "scale" / "benchmarks" / "evaluate_archs").mkdir(parents=True)
    (folder / "jobs").touch()
    environment = {**os.environ, "PATH": os.pathsep.join([str(programs), *os.get_exec_path()])}
    rules = ["--allowed-rules", "evaluate", "evaluate_archs"]
    quick = ["--profile", "slurm", "--slurm-init-seconds-before-status-checks", "1"]
    seconds, _ = snakemake(folder, "evaluate", *rules, *quick, path=path, env=environment)
    return {"seconds": seconds, "jobs_per_second": shards / seconds}


if __name__ == "__main__":
    main()
