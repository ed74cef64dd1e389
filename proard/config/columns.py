"""What the settings need from Parquet files: the column of the labels, and the class names stored in the file."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

LABEL_NAMES = ("label", "labels", "target", "class", "fine_label")


def matching_paths(text: str, *, folder_holds: str | None = None) -> list[Path]:
    """Existing files or folders that match a path or glob, sorted; in a folder, the files that match `folder_holds`."""
    path = Path(text).expanduser()
    if folder_holds is not None and path.is_dir():
        return sorted(path.glob(folder_holds))
    return [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]


def label_candidates(schema: pa.Schema, wanted: str | None) -> list[str]:
    """Columns that may hold the labels.

    Parameters
    ----------
    wanted : str, optional
        The column's name in the settings.

    Returns
    -------
    list of str
        The wanted column, if its type is integer, boolean or text. If none is wanted: the columns with a usual name of
        labels. Integers are preferred to booleans, booleans to text, and `label` to the other names.
    """
    import pyarrow as pa

    for fits in (pa.types.is_integer, pa.types.is_boolean, is_text):
        names = [entry.name for entry in schema if fits(entry.type)]
        called = [name for name in names if (name.lower() in LABEL_NAMES if wanted is None else name == wanted)]
        if called:
            return ["label"] if "label" in called else called
    return []


def is_text(kind: pa.DataType) -> bool:
    """Whether this is one of Arrow's text types, including categories of text."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def hub_classes(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Class names of a column, in label order, from a Hugging Face data set's entry in the file's metadata, or None."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return tuple(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None


def with_hub_classes(section: Any) -> Any:
    """The section `prepare_data`; if it lacks class names, with those stored in the first Parquet file."""
    if not isinstance(section, Mapping) or section.get("source") != "parquet" or section.get("classes") is not None:
        return section
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        paths = section.get("train") or []
        (first, *_) = matching_paths(paths if isinstance(paths, str) else paths[0], folder_holds="*.parquet")
        schema = pq.read_schema(first)
        (column,) = label_candidates(schema, section.get("label_column"))
    except (ValueError, TypeError, LookupError, OSError, pa.ArrowException):
        return section  # `prepare_data` reads the data and reports errors in them
    names = hub_classes(schema, column)
    return section if names is None else {**section, "classes": names}
