"""Parquet files of encoded images: one column of bytes (or struct<bytes, path>) and one of integer labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from proard.data.decode import DataError, Encoded

BATCH = 2048  # rows read at once


@dataclass(frozen=True)
class ImageTable:
    """A Parquet file whose labels are read and whose images are not."""

    path: Path
    image_column: str
    nested: bool
    labels: NDArray[np.int64]

    def encoded(self, position: NDArray[np.int64]) -> Iterator[list[Encoded]]:
        """Yield, batch by batch, the encoded images of the rows whose `position` in the result is not negative."""
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


def open_parquet(path: Path, label_column: str | None = None) -> ImageTable:
    """Find the columns of a file by their types and read the labels.

    Parameters
    ----------
    label_column : str, optional
        Needed only where several columns hold integers and none is called `label`.

    Raises
    ------
    DataError
        The file is no Parquet file, has no rows, no single image column, no single label column, or a null label.
    """
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        image_column = _only(path, schema, "image", [entry.name for entry in schema if _is_image(entry.type)])
        integers = [entry.name for entry in schema if pa.types.is_integer(entry.type)]
        if label_column is not None:
            integers = [name for name in integers if name == label_column]
        elif "label" in integers:
            integers = ["label"]
        chosen = _only(path, schema, "label", integers)
        column = file.read(columns=[chosen]).column(0).cast(pa.int64()).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    if not len(column):
        raise DataError(f"{path} has no rows")
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{path} row {row} has no label: column {chosen} is null; expected a class index")
    nested = pa.types.is_struct(schema.field(image_column).type)
    return ImageTable(path, image_column, nested, column.to_numpy(zero_copy_only=False))


def _is_bytes(kind: pa.DataType) -> bool:
    """Any of Arrow's types of bytes."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_image(kind: pa.DataType) -> bool:
    """Bytes, or a struct with a field `bytes` of bytes."""
    if not pa.types.is_struct(kind):
        return _is_bytes(kind)
    index = kind.get_field_index("bytes")
    return index >= 0 and _is_bytes(kind.field(index).type)


def _only(path: Path, schema: pa.Schema, role: str, names: list[str]) -> str:
    """The one column of this role, or an error that lists the columns."""
    if len(names) == 1:
        return names[0]
    columns = ", ".join(f"{entry.name}: {entry.type}" for entry in schema)
    expected = {"image": "one of binary or struct<bytes, path>", "label": "one of integers"}[role]
    way_out = "; name the right one in prepare_data.label_column" if role == "label" and names else ""
    found = f"{len(names)} {role} columns" if names else f"no {role} column"
    raise DataError(f"{path} has {found}, expected {expected}; its columns are {columns}{way_out}")


def _unreadable(path: Path, error: Exception) -> DataError:
    """The error of a damaged file."""
    return DataError(f"{path} is no readable Parquet file ({str(error).splitlines()[0]}); fetch it again")
