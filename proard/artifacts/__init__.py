"""Files of a run: atomic writes, checked reads, table columns and provenance."""

from proard.artifacts.checkpoints import check_finite, matched, read_state_dict
from proard.artifacts.experiments import GAINS, GAPS, TRAININGS
from proard.artifacts.files import ArtifactError, atomic_path, sha256, write_json, write_text
from proard.artifacts.quantised import EXECUTORCH, QUANTISED
from proard.artifacts.tables import (
    COSTS,
    FOOTPRINT,
    FRONT,
    HISTORY,
    MEASURED,
    OUTCOME,
    PREDICTED,
    STUDENT,
    Provenance,
    read_metadata,
    read_table,
    table_schema,
    wilson,
    write_table,
)
from proard.artifacts.tensors import load_arrays, load_tensors, read_header, save_arrays, save_tensors, tensors_checksum
from proard.artifacts.trust import AUTOATTACK, AUTOATTACK_UNION, CHECKS

__all__ = [
    "AUTOATTACK",
    "AUTOATTACK_UNION",
    "CHECKS",
    "COSTS",
    "EXECUTORCH",
    "FOOTPRINT",
    "FRONT",
    "GAINS",
    "GAPS",
    "HISTORY",
    "MEASURED",
    "OUTCOME",
    "PREDICTED",
    "QUANTISED",
    "STUDENT",
    "TRAININGS",
    "ArtifactError",
    "Provenance",
    "atomic_path",
    "check_finite",
    "load_arrays",
    "load_tensors",
    "matched",
    "read_header",
    "read_metadata",
    "read_state_dict",
    "read_table",
    "save_arrays",
    "save_tensors",
    "sha256",
    "table_schema",
    "tensors_checksum",
    "wilson",
    "write_json",
    "write_table",
    "write_text",
]
