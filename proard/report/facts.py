"""Values from the tables: students, the comparison of the searches, durations, the machine."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from proard.artifacts import ArtifactError
from proard.config import NEEDS
from proard.host import usable_cores
from proard.report.inputs import Results

WORST = "worst"
PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scikit-learn",
    "pymoo",
    "pandas",
    "pyarrow",
    "pyautoattack",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "snakemake",
)


@dataclass(frozen=True)
class Student:
    """The arch chosen for one budget. `test` and `val` hold its measured rows by attack."""

    budget: str
    arch_id: str
    macs: int
    params: int
    test: dict[str, pd.Series]
    val: dict[str, pd.Series]
    predicted_clean_acc: float
    predicted_robust_acc: float

    @property
    def final(self) -> pd.Series:
        """The row that is quoted: test, worst case per image over all attacks."""
        return headline_row(self.test)


def headline_row(rows: dict[str, pd.Series]) -> pd.Series:
    """The worst-case row; with a single attack, that attack's row."""
    return rows[WORST] if WORST in rows else min(rows.values(), key=lambda row: row["robust_acc"])


def rows_by_attack(frame: pd.DataFrame, split: str) -> dict[str, pd.Series]:
    """Rows of one split, by the name of the attack, in the table's order."""
    return {str(row["attack"]): row for _, row in frame[frame["split"] == split].iterrows()}


def exported_students(frames: Sequence[pd.DataFrame]) -> list[Student]:
    """One student per budget, cheapest first.

    Raises
    ------
    ArtifactError
        A table holds no choice, or its choice was not measured on test.
    """
    students = []
    for frame in frames:
        budget = str(frame["budget"].iloc[0])
        choice = frame[frame["role"] == "choice"]
        test, val = rows_by_attack(choice, "test"), rows_by_attack(choice, "val")
        if not test:
            raise ArtifactError(f"the student of {budget} has no row of its choice on test; rerun select_student")
        first = next(iter(test.values()))
        candidate = frame[(frame["arch_id"] == first["arch_id"]) & (frame["role"] == "candidate")]
        predicted = frame[(frame["arch_id"] == first["arch_id"])][["predicted_clean_acc", "predicted_robust_acc"]]
        for attack, row in rows_by_attack(candidate, "val").items():
            val.setdefault(attack, row)
        clean, robust = predicted.astype(float).max()
        students.append(
            Student(
                budget,
                first["arch_id"],
                int(first["macs"]),
                int(first["params"]),
                test,
                val,
                float(clean),
                float(robust),
            )
        )
    return sorted(students, key=lambda student: (student.macs, student.budget))


def reference(results: Results, name: str, column: str) -> float | None:
    """Accuracy on val of teacher or control: from the control's table, else from the kept epoch of the history."""
    control = results.get("control_table")
    if name == "control" and control is not None:
        rows = rows_by_attack(control, "val")
        if rows:
            return float(rows.get(results.label_attack or "", headline_row(rows))[column])
    history = results.get(f"{name}_history")
    if history is None:
        return None
    kept = history[history["best"].eq(True) & history[f"val_{column}"].notna()]
    kept = kept[kept["arch"] == "largest"] if (kept["arch"] == "largest").any() else kept
    return None if kept.empty else float(kept[f"val_{column}"].iloc[-1])


def chosen_quality(results: Results, target: str) -> pd.Series | None:
    """Quality on held-out archs of the model that was kept."""
    quality = results.get("quality")
    if quality is None:
        return None
    rows = quality[quality["chosen"].eq(True) & (quality["target"] == target)]
    return None if rows.empty else rows.iloc[0]


@dataclass(frozen=True)
class Duration:
    """Wall time of a stage, summed over its jobs; `memory_mb` is the largest resident set of a job."""

    stage: str
    jobs: int
    seconds: float
    longest: float
    memory_mb: float | None


def durations(folder: Path) -> list[Duration]:
    """Read Snakemake's benchmark records, in the order of the stages.

    `STAGE.tsv` and `STAGE/JOB.tsv` are records of one job each; the last line counts.

    Raises
    ------
    ArtifactError
        A record is no benchmark table.
    """
    jobs: dict[str, list[tuple[float, float | None]]] = {}
    for path in sorted(folder.rglob("*.tsv")):
        stage = path.relative_to(folder).parts[0].removesuffix(".tsv")
        jobs.setdefault(stage, []).append(_last_record(path))
    order = {stage: index for index, stage in enumerate(NEEDS)}
    found = []
    for stage in sorted(jobs, key=lambda name: (order.get(name, len(order)), name)):
        seconds = [second for second, _ in jobs[stage]]
        memory = [megabytes for _, megabytes in jobs[stage] if megabytes is not None]
        found.append(Duration(stage, len(seconds), sum(seconds), max(seconds), max(memory, default=None)))
    return found


def _last_record(path: Path) -> tuple[float, float | None]:
    """Seconds and peak memory (MB, None if not sampled) of a benchmark record."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file, delimiter="\t"))
    try:
        seconds = float(lines[-1]["s"])
    except (IndexError, KeyError, TypeError, ValueError):
        raise ArtifactError(f"{path} is no benchmark record of Snakemake; delete it") from None
    try:
        memory: float | None = float(lines[-1].get("max_rss") or "nan")
    except ValueError:
        memory = None
    return seconds, memory if memory is not None and np.isfinite(memory) else None


@lru_cache
def machine() -> dict[str, Any]:
    """The machine this process runs on: processor, cores, memory, system."""
    facts = {"processor": _processor(), "cores": f"{usable_cores()} usable of {os.cpu_count()}"}
    facts["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    facts["system"] = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return facts


def _processor() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def packages() -> Iterator[tuple[str, str]]:
    """Name and version of the installed packages that results depend on."""
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
