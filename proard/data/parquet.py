"""Parquet files of encoded images: one column of bytes (or struct<bytes, path>) and one of labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from proard.config import DataError, PrepareData
from proard.config.columns import LABEL_NAMES, hub_classes, is_text, label_candidates
from proard.data.decode import Encoded

BATCH = 2048  # rows per read


@dataclass(frozen=True)
class ImageTable:
    """A Parquet file with its labels read and its images not yet read; `classes` come from its metadata."""

    path: Path
    image_column: str
    nested: bool
    label_column: str
    labels: NDArray[np.int64]
    classes: tuple[str, ...] | None

    def encoded(self, position: NDArray[np.int64]) -> Iterator[list[Encoded]]:
        """Yield, in batches, the encoded images of the rows whose `position` in the result is not negative."""
        column = f"{self.image_column}.bytes" if self.nested else self.image_column
        row = 0
        try:
            for batch in pq.ParquetFile(self.path).iter_batches(BATCH, columns=[column]):
                values = pc.struct_field(batch.column(0), "bytes") if self.nested else batch.column(0)
                wanted = np.flatnonzero(position[row : row + len(values)] >= 0)
                items: list[Encoded] = []
                for index in wanted.tolist():
                    where, value = f"{self.path} row {row + index}", values[index].as_py()
                    if value is None:
                        raise DataError(f"{where} has no image: column {column} is null; expected encoded bytes")
                    items.append((int(position[row + index]), where, value))
                yield items
                row += len(values)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self.path, error) from None


def open_parquet(path: Path, settings: PrepareData) -> ImageTable:
    """Find the columns of a file by name and type, and read the labels.

    Raises
    ------
    DataError
        The file is not a Parquet file or has no rows, it has not exactly one image column and one label column, or a
        label is null or a text that is not a class.
    """
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        images = [entry.name for entry in schema if _is_image(entry.type)]
        if settings.image_column is not None:
            images = [name for name in images if name == settings.image_column]
        image_column = _only(path, schema, "image", images, settings.image_column)
        candidates = label_candidates(schema, settings.label_column)
        label_column = _only(path, schema, "label", candidates, settings.label_column)
        column = file.read(columns=[label_column]).column(0)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    if not len(column):
        raise DataError(f"{path} has no rows")
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise DataError(f"{path} row {row} has no label: column {label_column} is null; expected a class index")
    if is_text(column.type):
        column = _indices(path, label_column, column.cast(pa.string()), settings)
    labels = column.cast(pa.int64()).combine_chunks().to_numpy(zero_copy_only=False)
    nested = pa.types.is_struct(schema.field(image_column).type)
    return ImageTable(path, image_column, nested, label_column, labels, hub_classes(schema, label_column))


def _indices(path: Path, name: str, column: pa.ChunkedArray, settings: PrepareData) -> pa.ChunkedArray:
    """Class indices for a column of class names."""
    if not isinstance(settings.classes, tuple):
        raise DataError(
            f"{path}: column {name} contains text, such as {column[0].as_py()!r}, but prepare_data.classes is "
            f"{settings.classes}; set it to the list of names"
        )
    indices = pc.index_in(column, value_set=pa.array(settings.classes))
    if indices.null_count:
        row = int(np.flatnonzero(indices.is_null().to_numpy())[0])
        raise DataError(
            f"{path} row {row} has label {column[row].as_py()!r}; expected {', '.join(settings.classes[:10])}"
            f"{', ...' if len(settings.classes) > 10 else ''}, the names in prepare_data.classes "
            f"({indices.null_count} such rows in this file)"
        )
    return indices


def _is_bytes(kind: pa.DataType) -> bool:
    """Whether this is one of Arrow's types of bytes."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_image(kind: pa.DataType) -> bool:
    """Whether this is bytes, or a struct with a field `bytes` of bytes."""
    if not pa.types.is_struct(kind):
        return _is_bytes(kind)
    index = kind.get_field_index("bytes")
    return index >= 0 and _is_bytes(kind.field(index).type)


def _only(path: Path, schema: pa.Schema, role: str, names: list[str], wanted: str | None) -> str:
    """The single column of this role, or an error that lists all columns."""
    if len(names) == 1:
        return names[0]
    expected = {
        "image": "one of binary or struct<bytes, path>",
        "label": f"one of integers, booleans or text called {', '.join(LABEL_NAMES[:-1])} or {LABEL_NAMES[-1]}",
    }[role]
    if wanted is not None:
        found = f"no {role} column {wanted!r} (prepare_data.{role}_column)"
        expected = expected.split(" called ")[0]
    else:
        found = f"{len(names)} {role} columns" if names else f"no {role} column"
    columns = ", ".join(f"{entry.name}: {entry.type}" for entry in schema)
    way_out = f"; set the right one in prepare_data.{role}_column" if role == "label" or names else ""
    raise DataError(f"{path} has {found}, expected {expected}; its columns are {columns}{way_out}")


def _unreadable(path: Path, error: Exception) -> DataError:
    """The error of a damaged file."""
    return DataError(f"{path} is no readable Parquet file ({str(error).splitlines()[0]}); download or copy it again")
