"""Result tables in Parquet: columns with units, provenance in the file's metadata, checked reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from proard import __version__
from proard.artifacts.files import ArtifactError, atomic_path, sha256

INT, FLOAT, TEXT, FLAG = pa.int64(), pa.float64(), pa.string(), pa.bool_()

# column: (type, unit or meaning). Other programs rely on the names.
IDENTITY: dict[str, tuple[pa.DataType, str]] = {
    "arch_id": (TEXT, "stable hash of the canonical arch"),
    "genotype": (pa.list_(INT), "choice index of every gene"),
    "arch": (TEXT, "JSON of the canonical arch"),
    "macs": (INT, "multiply-accumulates of one image"),
    "params": (INT, "trained parameters"),
}
FOOTPRINT: dict[str, tuple[pa.DataType, str]] = {
    "flash": (INT, "bytes of the exported weights, float32"),
    "sram": (INT, "bytes, peak of the activations of one image, float32"),
    "latency": (FLOAT, "milliseconds of one image, predicted for the device that the run names"),
}
OUTCOME: dict[str, tuple[pa.DataType, str]] = {
    "clean": (pa.list_(FLAG), "per image: classified correctly"),
    "robust": (pa.list_(FLAG), "per image: classified correctly, both clean and under the attack"),
}
MEASURED: dict[str, tuple[pa.DataType, str]] = {
    **IDENTITY,
    "split": (TEXT, "train, val or test"),
    "attack": (
        TEXT,
        "name of the attack; targeted: counts the attacks before it too; worst: worst case per image of all",
    ),
    "norm": (TEXT, "norm of the perturbation"),
    "eps": (FLOAT, "pixel units of [0, 1]"),
    "step_size": (FLOAT, "pixel units of [0, 1], of the first step"),
    "last_step_size": (FLOAT, "pixel units of [0, 1], of the last step; smaller under a schedule"),
    "num_steps": (INT, "steps per restart and target"),
    "targets": (INT, "wrong classes attacked in turn; empty for attacks that are not targeted"),
    "restarts": (INT, "restarts"),
    "dtype": (TEXT, "type of the attack's gradients; an image counts as misclassified only by float32 logits"),
    "accounting": (TEXT, "any_iterate or last_iterate"),
    "bn_mode": (TEXT, "batch-norm statistics inside the attack"),
    "num_images": (INT, "images"),
    "clean_acc": (FLOAT, "fraction"),
    "clean_acc_low": (FLOAT, "fraction, 95 % Wilson"),
    "clean_acc_high": (FLOAT, "fraction, 95 % Wilson"),
    "robust_acc": (FLOAT, "fraction"),
    "robust_acc_low": (FLOAT, "fraction, 95 % Wilson"),
    "robust_acc_high": (FLOAT, "fraction, 95 % Wilson"),
    "clean_acc_half_a": (FLOAT, "fraction, images of even index"),
    "clean_acc_half_b": (FLOAT, "fraction, images of odd index"),
    "robust_acc_half_a": (FLOAT, "fraction, images of even index"),
    "robust_acc_half_b": (FLOAT, "fraction, images of odd index"),
    "gradients": (INT, "input gradients of the attack, counted per image"),
    "seconds": (FLOAT, "wall seconds of the measurement"),
    "seed": (INT, "seed of images and noise"),
    "image_set": (TEXT, "checksum of the images and labels in their order"),
    **OUTCOME,
}
PREDICTED: dict[str, tuple[pa.DataType, str]] = {
    **IDENTITY,
    **FOOTPRINT,
    "predicted_clean_acc": (FLOAT, "fraction, predicted"),
    "predicted_robust_acc": (FLOAT, "fraction, predicted"),
    "found_by": (TEXT, "search that evaluated the arch: nsga2, random, uniform, exhaustive or anchor"),
    "seed": (INT, "seed of the search"),
}
FRONT: dict[str, tuple[pa.DataType, str]] = {
    **MEASURED,
    **FOOTPRINT,
    "predicted_clean_acc": (FLOAT, "fraction, predicted"),
    "predicted_robust_acc": (FLOAT, "fraction, predicted"),
    "found_by": (TEXT, "search that found the arch: nsga2, random, uniform, exhaustive or anchor"),
}
STUDENT: dict[str, tuple[pa.DataType, str]] = {
    **FRONT,
    "arena": (INT, "bytes, block in which onnxruntime places the activations of one image, float32"),
    "latency_file": (TEXT, "file of the student that the latency is predicted for; empty without a device"),
    "budget": (TEXT, "the requested limit"),
    "role": (TEXT, "candidate: measured on val for the selection; choice: the selected student under every attack"),
    "chosen": (FLAG, "the student of this budget"),
}
HISTORY: dict[str, tuple[pa.DataType, str]] = {
    "phase": (TEXT, "teacher, control or the phase's name"),
    "epoch": (INT, "epochs done"),
    "step": (INT, "optimizer steps done"),
    "planned_steps": (INT, "optimizer steps of the settings' epochs; a training that minutes shorten makes fewer"),
    "lr": (FLOAT, "learning rate at the epoch's end"),
    "dtype": (TEXT, "type of the training passes, as computed here"),
    "attack_dtype": (TEXT, "type of the training attack's gradients, as computed here"),
    "loss": (FLOAT, "nats per image, mean over the epoch"),
    "train_clean_acc": (FLOAT, "fraction of augmented training images, in training mode; NaN without a clean pass"),
    "train_robust_acc": (FLOAT, "fraction under the training attack, in training mode"),
    "arch": (TEXT, "validated subnet: largest, smallest or middle; empty without a validation"),
    "macs": (INT, "multiply-accumulates of one image"),
    "val_clean_acc": (FLOAT, "fraction"),
    "val_robust_acc": (FLOAT, "fraction, PGD"),
    "val_num_images": (INT, "images"),
    "val_train_attack_acc": (
        FLOAT,
        "fraction, under the training's attack; only if overfitting is monitored",
    ),
    "images": (INT, "training images seen"),
    "forward_equivalents": (INT, "image forward-equivalents of the training so far: forward 1, input gradient 1 more"),
    "work_macs": (FLOAT, "multiply-accumulates of the training so far: passes times the MACs of their network"),
    "weight_gradients": (INT, "gradient evaluations so far: images times the subnets trained on them"),
    "gradients": (INT, "backward passes of one image so far: attack steps, input gradients of a loss, updates"),
    "seconds": (FLOAT, "wall seconds of the training so far"),
    "best": (FLAG, "the epoch whose weights are kept"),
    "seed": (INT, "seed of the run"),
}
COSTS: dict[str, tuple[pa.DataType, str]] = {
    "stage": (TEXT, "stage of the pipeline"),
    "job": (TEXT, "folder of the job in its stage; empty if the stage is one job"),
    "attempts": (INT, "processes whose costs are added here; those of a resumed training up to their last saved state"),
    "seconds": (FLOAT, "wall seconds"),
    "device": (TEXT, "cpu, or the GPU's name"),
    "devices": (INT, "CPU threads or GPUs reserved by the job"),
    "device_seconds": (FLOAT, "wall seconds times devices"),
    "forward_equivalents": (
        FLOAT,
        "image forward-equivalents: forward 1, input gradient 1 more, weights' 2 more",
    ),
    "work_macs": (FLOAT, "multiply-accumulates of the same passes: each times the MACs of its network"),
    "weight_gradients": (FLOAT, "gradient evaluations: images times the networks trained on them"),
    "train_forward_equivalents": (FLOAT, "image forward-equivalents of training steps"),
    "train_macs": (FLOAT, "multiply-accumulates of training steps"),
    "alone_forward_equivalents": (
        FLOAT,
        "passes of one image through a subnet that is trained alone, with a phase's loss and attack; of train_phase",
    ),
    "alone_other_forwards": (FLOAT, "passes of the same image through teacher and control; of train_phase"),
    "measure_forward_equivalents": (FLOAT, "image forward-equivalents of validation, recalibration and measurement"),
    "measure_macs": (FLOAT, "multiply-accumulates of validation, recalibration and measurement"),
    "cached_forward_equivalents": (FLOAT, "image forward-equivalents of results found in the cache; not in the others"),
    "cached_macs": (FLOAT, "multiply-accumulates of results found in the cache; not in the others"),
    "cached_seconds": (FLOAT, "wall seconds in which results found in the cache were computed; not in the others"),
    "peak_rss_bytes": (INT, "bytes, largest resident set of an attempt"),
    "peak_cuda_bytes": (INT, "bytes, largest allocation on the GPU; empty without one"),
    "energy_wh": (FLOAT, "watt-hours"),
    "energy_method": (TEXT, "method of the energy measurement"),
    "seed": (INT, "seed of the job"),
}


@dataclass(frozen=True)
class Provenance:
    """The origin of a file; written into the metadata of every artefact."""

    run: str
    stage: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict)
    version: str = __version__

    @classmethod
    def of(cls, *, stage: str, settings: Mapping[str, Any], seed: int, inputs: Iterable[str | Path]) -> Provenance:
        """Provenance of a job: its settings and the checksum of every input file."""
        paths = [Path(path) for path in inputs]
        names = [path.name for path in paths]
        checksums = {
            path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}": sha256(path)
            for path in paths
        }
        return cls(settings["run"], stage, settings, seed, checksums)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)


def table_schema(columns: Mapping[str, tuple[pa.DataType, str]]) -> pa.Schema:
    """Arrow schema whose fields contain their unit."""
    return pa.schema([pa.field(name, kind, metadata={"unit": unit}) for name, (kind, unit) in columns.items()])


def write_table(
    path: str | Path,
    rows: pd.DataFrame | list[Mapping[str, Any]],
    columns: Mapping[str, tuple[pa.DataType, str]],
    provenance: Provenance,
    **notes: Any,
) -> None:
    """Write rows with exactly these columns, their units and the provenance; missing values become null.

    `notes` are further JSON values for the metadata, beside the provenance.

    Raises
    ------
    ValueError
        A row has a column that the table lacks, or a value of the wrong type.
    """
    frame = pd.DataFrame(rows, columns=None if len(rows) else list(columns))
    strange = set(frame.columns) - set(columns)
    if strange:
        raise ValueError(f"{path}: columns {sorted(strange)} do not belong to this table")
    schema = table_schema(columns).with_metadata(
        {"proard": json.dumps({**asdict(provenance), **notes}, sort_keys=True)}
    )
    data = frame.reindex(columns=list(columns)).to_dict("list")
    arrays = [pa.array([_null_if_missing(value) for value in data[entry.name]], type=entry.type) for entry in schema]
    table = pa.Table.from_arrays(arrays, schema=schema)
    table = table.replace_schema_metadata({**schema.metadata, "checksum": _checksum(table)})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def _checksum(table: pa.Table) -> str:
    """SHA-256 of names, types, values and provenance; Parquet's own checksums cover data pages, not their headers."""
    digest = hashlib.sha256((table.schema.metadata or {}).get(b"proard", b""))
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = getattr(column.type, "value_type", column.type)  # the entries of a list have another name after reading
        digest.update(f"{name}{kind}{column.to_pylist()}".encode())
    return digest.hexdigest()


def _null_if_missing(value: Any) -> Any:
    """None for NaN and NA scalars."""
    return None if not isinstance(value, (list, tuple, np.ndarray)) and pd.isna(value) else value


def read_table(path: str | Path, *, columns: Iterable[str] = ()) -> pd.DataFrame:
    """Read a table as a data frame.

    Raises
    ------
    ArtifactError
        The file is missing, damaged, or lacks one of `columns`.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        said = (table.schema.metadata or {}).get(b"checksum")  # tables of earlier versions have none
        if said is not None and said.decode() != _checksum(table):
            raise ValueError("its contents do not match their checksum")
        frame = table.to_pandas()
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; rerun the stage that writes it") from None
    except (pa.ArrowException, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{path} is no readable Parquet table ({reason}); delete it and rerun its stage") from None
    missing = set(columns) - set(frame.columns)
    if missing:
        raise ArtifactError(
            f"{path} lacks the columns {sorted(missing)}; it was written by another version of the package"
        )
    return frame


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Provenance of a table, and the unit of every column under `units`."""
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{path} is no readable Parquet table ({reason}); delete it and rerun its stage") from None
    metadata = json.loads((schema.metadata or {}).get(b"proard", b"{}"))
    units = {entry.name: (entry.metadata or {}).get(b"unit", b"").decode() for entry in schema}
    return {**metadata, "units": units}


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """95 % Wilson score interval of the fraction `successes` / `trials`."""
    z = 1.959963984540054
    share = successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * np.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))
