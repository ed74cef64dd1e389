"""Any result table in the terminal, with its units and provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from proard import artifacts
from proard.config import UserError

SHORT_LISTS, SHORT_TEXT, FEW_INPUTS = 6, 28, 8


def show(path: str | Path, console: Console, *, rows: int = 20, columns: Sequence[str] | None = None) -> None:
    """Print a table: provenance, columns with one value, the rows, and the unit of every printed column.

    Parameters
    ----------
    rows : int
        Rows to print; 0 prints all.
    columns : sequence of str, optional
        Columns to print; by default all that differ between rows and are not empty.

    Raises
    ------
    UserError
        The file is no table of a run, or has no such column.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; name a .parquet file in it")
    frame, metadata = artifacts.read_table(path), artifacts.read_metadata(path)
    unknown = [name for name in columns or () if name not in frame]
    if unknown:
        raise UserError(f"{path} has no column {', '.join(unknown)}; it has {', '.join(frame.columns)}")
    units = metadata["units"]
    console.print(f"[bold]{escape(str(path))}[/]  {len(frame):,} rows, {len(frame.columns)} columns")
    _print_provenance(metadata, console)
    if frame.empty:
        console.print("no rows")
        return
    text = {name: [format_value(value, units.get(name, "")) for value in frame[name]] for name in columns or frame}
    if columns is None:
        text = {name: cells for name, cells in text.items() if any(cells)}
    shared = {name: cells[0] for name, cells in text.items() if columns is None and len(set(cells)) == 1}
    varying = [name for name in text if name not in shared]
    if shared:
        console.print("\n[bold]the same in every row[/]" if len(frame) > 1 else "")
        _print_shared(shared, units, console)
    if varying:
        shown = len(frame) if rows == 0 else min(rows, len(frame))
        _print_rows({name: text[name][:shown] for name in varying}, frame[varying], console)
        if shown < len(frame):
            console.print(f"[dim]{len(frame) - shown:,} more rows; --rows 0 prints all[/]")
        console.print()
        for name in varying:
            console.print(f"[dim]{name:<22} {escape(units.get(name, ''))}[/]")


def _print_provenance(metadata: Mapping[str, Any], console: Console) -> None:
    """Print which job wrote the table, from which inputs."""
    if "run" not in metadata:
        console.print("[dim]no provenance: not written by this package[/]")
        return
    parts = (f"{key} {metadata.get(key)}" for key in ("run", "stage", "seed"))
    console.print(escape(" · ".join([*parts, f"proard {metadata.get('version')}"])))
    inputs = metadata.get("inputs", {})
    for name, checksum in islice(inputs.items(), FEW_INPUTS):
        console.print(f"[dim]input {escape(name)} sha256 {checksum[:12]}[/]")
    if len(inputs) > FEW_INPUTS:
        console.print(f"[dim]and {len(inputs) - FEW_INPUTS:,} more inputs[/]")


def _print_shared(shared: Mapping[str, str], units: Mapping[str, str], console: Console) -> None:
    """Print columns with one value, each on a line."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in shared.items():
        table.add_row(name, Text(value, "bold"), Text(units.get(name, ""), "dim"))
    console.print(table)


def _print_rows(text: Mapping[str, Sequence[str]], frame: pd.DataFrame, console: Console) -> None:
    """Print rows in as many blocks of columns as the width needs; each block starts with the first column."""
    widths = {name: max(len(name), *map(len, cells)) + 2 for name, cells in text.items()}
    first, *others = text
    blocks: list[list[str]] = [[first]]
    for name in others:
        full = sum(widths[entry] for entry in blocks[-1]) + widths[name] > console.width
        if full and len(blocks[-1]) > 1:
            blocks.append([first])
        blocks[-1].append(name)
    for block in blocks:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name in block:
            numeric = pd.api.types.is_numeric_dtype(frame[name])
            table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
        for cells in zip(*(text[name] for name in block), strict=True):
            table.add_row(*map(Text, cells))
        console.print()
        console.print(table)


def format_value(value: Any, unit: str) -> str:
    """Text of a cell: fractions with four decimals, pixel lengths as n/255, long texts and lists shortened."""
    from proard.report.text import pixels

    if isinstance(value, (list, tuple, np.ndarray)):
        items = " ".join(str(item) for item in list(value)[:SHORT_LISTS])
        return f"{items} …" if len(value) > SHORT_LISTS else items
    if value is None or pd.isna(value):
        return ""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return str(value) if unit.startswith("seed") else f"{value:,}"
    if isinstance(value, (float, np.floating)):
        if unit.startswith("pixel"):
            return pixels(float(value))
        if unit.startswith("fraction"):
            return f"{value:.4f}"
        return f"{value:,.0f}" if float(value).is_integer() and abs(float(value)) < 1e15 else f"{value:.4g}"
    text = str(value)
    return f"{text[: SHORT_TEXT - 1]}…" if len(text) > SHORT_TEXT else text
