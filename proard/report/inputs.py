"""Reads and checks the report's inputs: tables with their provenance, parity records, benchmarks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from proard import artifacts
from proard.artifacts import ArtifactError
from proard.report.costs import read_ledgers

ACCURACIES = ("clean_acc", "robust_acc")
EVALUATED = ("arch_id", "macs", "params", "split", "attack", "num_images", "clean_acc", "robust_acc")
PREDICTIONS = ("arch_id", "macs", "predicted_clean_acc", "predicted_robust_acc", "found_by")
HISTORY = ("phase", "epoch", "loss", "arch", "val_clean_acc", "val_robust_acc", "best")

# flag of the stage: columns that the page needs of that table
TABLES: dict[str, tuple[str, ...]] = {
    "table": EVALUATED,
    "teacher_history": HISTORY,
    "control_table": EVALUATED,
    "control_history": HISTORY,
    "quality": ("model", "chosen", "target", "num_held_out", "kendall_tau", "noise_ceiling"),
    "held_out": ("macs", "clean_acc", "robust_acc", "predicted_clean_acc", "predicted_robust_acc"),
    "archive": PREDICTIONS,
    "front": PREDICTIONS,
    "search_history": ("search", "evaluations", "hypervolume"),
    "verified": (*EVALUATED, "found_by", "predicted_clean_acc", "predicted_robust_acc"),
    "trained_students": (
        *EVALUATED,
        "group",
        "role",
        "net",
        "loss",
        "eps",
        "train_steps",
        "train_gradients",
        "peak_memory",
    ),
    "diagnosis_summary": ("network", "quantity", "norm", "eps", "sigma", "value", "low", "high"),
    "diagnosis_radii": ("network", "method", "norm", "sigma", "radius", "limit", "correct"),
    "diagnosis_pairs": ("first", "second", "eps", "num_images", "mcnemar_p_holm", "first_nearer", "nearer_robust"),
}
LISTS: dict[str, tuple[str, ...]] = {
    "phase_histories": HISTORY,
    "students": (*EVALUATED, "budget", "role", "chosen", "predicted_clean_acc", "predicted_robust_acc"),
    "autoattacked": (*EVALUATED, "budget", "attacked", "left_out", "own_robust_acc", "version", "warnings"),
    "checked": ("budget", "number", "check", "expected", "value", "relation", "threshold", "passed", "details"),
    "quantised": (
        *EVALUATED,
        "budget",
        "file",
        "precision",
        "variant",
        "difference",
        "lost",
        "gained",
        "latency_ms",
        "bytes",
    ),
    "deployed": ("budget", "file", "precision", "bytes", "latency_ms", *ACCURACIES, "difference"),
}
MANIFEST_KEYS = ("source", "classes", "splits")
PARITY_KEYS = ("budget", "passed", "onnx_max_softmax_difference", "onnx_top1_agreement", "onnx_test_accuracy")


@dataclass(frozen=True)
class InputFile:
    """One input file of the page."""

    path: Path
    sha256: str
    stage: str = ""
    version: str = ""


@dataclass(frozen=True)
class Card:
    """The export of one student: its parity record and the folder of its files."""

    folder: Path
    parity: Mapping[str, Any]


@dataclass
class Results:
    """All results of a run; a table that was not given is None.

    Attributes
    ----------
    frames : dict of str to DataFrame
        Tables by the name of their flag.
    histories : list of DataFrame
        Trainings in the order they ran: teacher, control, phases.
    students, autoattacked, checked, quantised : list of DataFrame
        One per budget.
    deployed : list of DataFrame
        Files for other runtimes, a row per file; of several rows those on test under all attacks count.
    folder, ledgers : Path, DataFrame, optional
        The run's folder, and the costs of its jobs.
    settings : dict
        Every section found in the tables' provenance.
    """

    run: str
    seed: int
    manifest: dict[str, Any]
    frames: dict[str, pd.DataFrame] = field(default_factory=dict)
    histories: list[pd.DataFrame] = field(default_factory=list)
    students: list[pd.DataFrame] = field(default_factory=list)
    autoattacked: list[pd.DataFrame] = field(default_factory=list)
    checked: list[pd.DataFrame] = field(default_factory=list)
    quantised: list[pd.DataFrame] = field(default_factory=list)
    deployed: list[pd.DataFrame] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    benchmarks: Path | None = None
    folder: Path | None = None
    ledgers: pd.DataFrame | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: list[InputFile] = field(default_factory=list)

    def get(self, name: str) -> pd.DataFrame | None:
        """The table of that flag, or None where it is absent or empty."""
        frame = self.frames.get(name)
        return None if frame is None or frame.empty else frame

    @property
    def label_attack(self) -> str | None:
        """Attack under which the sampled subnets were measured."""
        table = self.get("table")
        return None if table is None else str(table["attack"].iloc[0])


def load_results(
    files: Mapping[str, str | Sequence[str] | None],
    *,
    run: str,
    seed: int,
    benchmarks: str | Path | None = None,
    ledgers: str | Path | None = None,
) -> Results:
    """Read the files of a run.

    Parameters
    ----------
    files : mapping
        Paths by flag: those of `TABLES` (one each), of `LISTS` and `cards` (several), and `manifest`. The page omits
        what is missing or empty.
    benchmarks : path, optional
        Folder of Snakemake's benchmark records; used if it exists.
    ledgers : path, optional
        Folder of the run, to report the costs of its jobs.

    Raises
    ------
    ArtifactError
        A file that was named is missing or damaged, or a table lacks a column.
    """
    results = Results(run, seed, {})
    for path in _paths(files.get("manifest")):
        results.manifest = _read_json(results, path, MANIFEST_KEYS)
        _merge_sections(results.settings, results.manifest.get("settings", {}))
    for name, columns in TABLES.items():
        for path in _paths(files.get(name)):
            results.frames[name] = _read_table(results, path, columns)
    lists = {
        name: [_read_table(results, path, columns) for path in _paths(files.get(name))]
        for name, columns in LISTS.items()
    }
    trained = [results.get("teacher_history"), results.get("control_history"), *lists["phase_histories"]]
    results.histories = [frame for frame in trained if frame is not None and not frame.empty]
    results.students = [frame for frame in lists["students"] if not frame.empty]
    results.autoattacked, results.checked = lists["autoattacked"], lists["checked"]
    for name in ("quantised", "deployed"):
        setattr(results, name, [frame for frame in lists[name] if not frame.empty])
    cards = _paths(files.get("cards"))
    results.cards = [Card(Path(path).parent, _read_json(results, path, PARITY_KEYS)) for path in cards]
    if benchmarks and Path(benchmarks).is_dir():
        results.benchmarks = Path(benchmarks)
    if ledgers:
        results.folder, results.ledgers = Path(ledgers), read_ledgers(ledgers)
    return results


def _paths(given: str | Sequence[str] | None) -> list[str]:
    """The paths of a flag, one or several; empty ones are left out."""
    return [path for path in ([given] if isinstance(given, str) else given or ()) if path]


def _read_table(results: Results, path: str | Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a table; store its settings and checksum in `results`."""
    frame = artifacts.read_table(path, columns=columns)
    metadata = artifacts.read_metadata(path)
    _merge_sections(results.settings, metadata.get("settings", {}))
    checksum = artifacts.sha256(path)
    results.inputs.append(InputFile(Path(path), checksum, metadata.get("stage", ""), metadata.get("version", "")))
    return frame


def _read_json(results: Results, path: str | Path, keys: Sequence[str]) -> dict[str, Any]:
    """Read a JSON record and check its keys."""
    checksum = artifacts.sha256(path)
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is no valid JSON ({error}); delete it and rerun its stage") from None
    missing = [key for key in keys if not isinstance(record, dict) or key not in record]
    if missing:
        raise ArtifactError(f"{path} lacks {', '.join(missing)}; its stage in this version writes them: rerun it")
    results.inputs.append(InputFile(Path(path), checksum, version=record.get("version", "")))
    return record


def _merge_sections(known: dict[str, Any], sections: Mapping[str, Any]) -> None:
    """Add a job's sections; a job of one phase adds its phase to the others."""
    for name, section in sections.items():
        if name == "train_phase" and isinstance(known.get(name), Mapping):
            names = {phase["name"] for phase in known[name]["phases"]}
            fresh = [phase for phase in section["phases"] if phase["name"] not in names]
            known[name] = {"phases": [*known[name]["phases"], *fresh]}
        else:
            known[name] = section
