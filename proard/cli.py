"""The command `proard`: show a run's tables and costs in the terminal; check the machine before a run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from proard import __version__, artifacts
from proard.config import UserError
from proard.doctor.command import add_doctor
from proard.host import take_any_character
from proard.latency.command import add_latency, latency
from proard.runs.command import add_runs

SHORT_LISTS, SHORT_TEXT, FEW_INPUTS = 6, 28, 8
PIPE_WIDTH = 2000  # characters of a line where no terminal sets a limit


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; an error that the user can fix is printed in one line, with exit status 1."""
    take_any_character()
    arguments = _parser().parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    try:
        if arguments.command == "show":
            columns = arguments.columns.split(",") if arguments.columns else None
            show(arguments.file, console, rows=arguments.rows, columns=columns)
        elif arguments.command == "cost":
            cost(arguments.run_folder, console, numbers=arguments.students, country=arguments.country)
        elif arguments.command == "fronts":
            fronts(arguments.first, arguments.second, console)
        elif arguments.command == "predict":
            from proard.export.usage import print_classes

            print_classes(arguments.student, arguments.images)
        elif arguments.command == "robustbench":
            from proard.export.robustbench import submit

            submit(arguments, console)
        elif arguments.command == "latency":
            latency(arguments, console)
        elif "call" in arguments:
            arguments.call(arguments, console)
        else:
            students(arguments.run_folder, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:
        sys.stderr.close()  # the reader (such as `head`) closed the pipe


def _parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(prog="proard", description="Show a run's results; check a machine.")
    parser.add_argument("--version", action="version", version=f"proard {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("show", help="a result table with its units and provenance")
    table.add_argument("file", metavar="FILE.parquet")
    table.add_argument("--rows", type=_row_count, default=20, metavar="N", help="rows to print (default 20; 0: all)")
    table.add_argument("--columns", metavar="A,B", help="only these columns")
    run = commands.add_parser("students", help="the exported students of a run")
    run.add_argument("run_folder", metavar="results/RUN")
    use = commands.add_parser("predict", help="classes that an exported student gives to image files")
    use.add_argument("student", metavar="FOLDER", help="of the export, or an ONNX file")
    use.add_argument("images", nargs="+", metavar="IMAGE")
    spent = commands.add_parser("cost", help="the costs of a run, compared with students trained one by one")
    spent.add_argument("run_folder", metavar="results/RUN")
    spent.add_argument("--students", type=_numbers, default=(1, 5, 20, 100), metavar="N,N", help="numbers of students")
    spent.add_argument("--country", default="USA", metavar="ABC", help="ISO 3166 code for CO2 equivalents (USA)")
    both = commands.add_parser("fronts", help="the measured fronts of two runs: hypervolumes and their difference")
    both.add_argument(
        "first", metavar="results/RUN", help="a run, or result tables: a .parquet file or a quoted pattern"
    )
    both.add_argument("second", metavar="results/OTHER", help="the same for the other run")
    listed = commands.add_parser("robustbench", help="the leaderboard's JSON and submission text of a student")
    listed.add_argument("folder", metavar="results/RUN/export_student/BUDGET")
    for name in ("title", "link", "authors", "venue"):
        listed.add_argument(f"--{name}", help="of the paper, for the leaderboard")
    listed.add_argument("--additional-data", choices=("yes", "no"), help="whether more training images were used")
    add_latency(commands)
    add_doctor(commands)
    add_runs(commands)
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    """Numbers of students."""
    if not all(part.isdigit() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers; write 1 or more, as in 1,5,20")
    return tuple(int(part) for part in text.split(","))


def _row_count(text: str) -> int:
    """A number of rows."""
    if text.isdigit():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of rows; write 0 or more")


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


def students(run_folder: str | Path, console: Console) -> None:
    """Print the table of a run's exported students, and where its report lies.

    Raises
    ------
    UserError
        The folder holds no selected students, or one of its tables is damaged.
    """
    from proard.report.facts import exported_students, headline_row, rows_by_attack
    from proard.report.text import count, interval, percent

    folder = Path(run_folder)
    paths = sorted(folder.glob("select_student/*/student.parquet"))
    if not paths:
        raise UserError(
            f"{folder} holds no select_student/BUDGET/student.parquet; expected a run's folder, results/RUN"
        )
    found = exported_students([artifacts.read_table(path, columns=["budget", "role"]) for path in paths])
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("budget", "MACs", "params", "clean", "95 %", "robust", "95 %", "exported"):
        table.add_column(name, justify="left" if name in ("budget", "exported") else "right", no_wrap=True)

    def add(name: str, row: Mapping[str, Any], exported: str, style: str | None = None) -> None:
        cells = [percent(row["clean_acc"]), interval(row, "clean_acc")]
        cells += [percent(row["robust_acc"]), interval(row, "robust_acc")]
        table.add_row(name, count(row["macs"]), count(row["params"]), *cells, exported, style=style)

    for student in found:
        add(student.budget, student.final, _parity_mark(folder / "export_student" / student.budget / "parity.json"))
    control = folder / "train_control" / "table.parquet"
    if control.exists():
        rows = rows_by_attack(artifacts.read_table(control, columns=["split", "attack", "robust_acc"]), "test")
        if rows:
            add("control", headline_row(rows), "plainly trained", "dim")
    final = found[0].final
    console.print(table)
    console.print(
        f"[dim]percent of {int(final['num_images']):,} test images; robust: {final['attack']}, eps "
        f"{format_value(final.get('eps'), 'pixel')}; control: plainly trained[/]"
    )
    report = folder / "report" / "report.html"
    console.print(f"report: {report}" if report.exists() else "[dim]no report yet: the stage report writes it[/]")


def fronts(first: str | Path, second: str | Path, console: Console) -> None:
    """Print the hypervolumes of two runs' measured archs on one scale, and the interval of their difference.

    Raises
    ------
    UserError
        A run lacks the tables, or the two were not measured alike.
    """
    from proard.report.fronts import compare_outcomes, sampled_outcomes, verified_outcomes

    tables = [str(path).endswith(".parquet") for path in (first, second)]
    if all(tables):
        table_fronts(first, second, console)
        return
    if any(tables):
        raise UserError(f"{first} and {second}: one is a run, the other a table; name two runs or two tables")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("archs", "number", "images", str(first), str(second), "second minus first"):
        table.add_column(name, no_wrap=True)
    kinds = (("verified fronts, test, all attacks", verified_outcomes), ("sampled, val", sampled_outcomes))
    for name, read in kinds:
        found = compare_outcomes(read(first), read(second))
        cells = [f"{value:.4f} ({low:.4f} to {high:.4f})" for value, low, high in (found.first, found.second)]
        value, low, high = found.difference
        number = " and ".join(map(str, dict.fromkeys(found.num_archs)))
        table.add_row(name, number, f"{found.num_images:,}", *cells, f"{value:+.4f} ({low:+.4f} to {high:+.4f})")
    console.print(table)
    console.print(
        "[dim]hypervolume in clean accuracy, robust accuracy and MACs, as a share of the box from the best values "
        "in both runs to 10 % of their range beyond the worst; "
        "intervals: 95 % over resampled images, one training each[/]"
    )


def table_fronts(first: str | Path, second: str | Path, console: Console) -> None:
    """Print the hypervolumes of two sets of result tables, named by file or pattern, and the gains of equal archs.

    Raises
    ------
    UserError
        There is no such table, or no measurements of the two can be compared.
    """
    from proard.report.fronts import compare_tables

    paths = [sorted(map(Path, glob(str(pattern)))) for pattern in (first, second)]
    for pattern, found in zip((first, second), paths, strict=True):
        if not found:
            raise UserError(f"there is no table {pattern}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("split", "attack", "images", "archs", "hypervolume: first", "second", "in both", "clean", "robust"):
        table.add_column(name, no_wrap=True)
    for row in compare_tables(*paths).itertuples():
        gains = [f"{100 * gain:+.1f} points" if row.paired else "" for gain in (row.clean_gain, row.robust_gain)]
        archs = " and ".join(map(str, dict.fromkeys((row.first_archs, row.second_archs))))
        volumes = (f"{row.first:.4f}", f"{row.second:.4f}")
        table.add_row(row.split, row.attack, f"{row.num_images:,}", archs, *volumes, str(row.paired), *gains)
    console.print(table)
    console.print(
        "[dim]hypervolume in clean accuracy, robust accuracy and MACs, as a share of the box from the best values "
        "in both sets to 10 % of their range beyond the worst; "
        "gains: mean over the archs in both, second minus first[/]"
    )


def _parity_mark(path: Path) -> str:
    """Whether the exported file was checked against the measured network."""
    if not path.exists():
        return "not yet"
    try:
        passed = json.loads(path.read_text(encoding="utf-8"))["passed"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no parity record; delete it and rerun export_student") from None
    return "parity checked" if passed else "parity FAILED"


def cost(run_folder: str | Path, console: Console, *, numbers: Sequence[int], country: str) -> None:
    """Print the costs of every stage, and the cost of students trained one by one divided by the supernet's.

    Raises
    ------
    UserError
        The folder holds no run, or the country is unknown.
    """
    from proard.report.costs import by_stage, compare, emissions, read_ledgers
    from proard.report.text import amount

    ledgers = read_ledgers(run_folder)
    stages = by_stage(ledgers)
    names = {"seconds": "wall s", "device_seconds": "device s", "forward_equivalents": "passes", "work_macs": "MACs"}
    names |= {"cached_macs": "cached MACs", "peak_rss_bytes": "peak bytes"}
    names |= {"peak_cuda_bytes": "peak GPU bytes"} if stages["peak_cuda_bytes"].gt(0).any() else {}
    names |= {"energy_wh": "Wh"}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("stage")
    for name in ("jobs", *names.values()):
        table.add_column(name, justify="right", no_wrap=True)
    sums = stages[[name for name in names if not name.startswith("peak")]].sum(min_count=1)
    total = {**sums, "stage": "total", "jobs": stages["jobs"].sum()}
    for entry in [*stages.to_dict("records"), total]:
        cells = ["" if pd.isna(entry.get(name)) else amount(entry[name]) for name in names]
        table.add_row(entry["stage"], str(entry["jobs"]), *cells, style="bold" if entry is total else None)
    console.print(table)
    if ledgers.get("energy_wh") is not None and ledgers["energy_wh"].notna().any():
        watt_hours = float(ledgers["energy_wh"].sum())
        console.print(
            f"[dim]{watt_hours:.3g} Wh, {emissions(watt_hours, country):.3g} g CO2 equivalents in {country}[/]"
        )
        for method in sorted(set(ledgers["energy_method"].dropna())):
            console.print(f"[dim]{escape(method)}[/]")
    for source in sorted(set(ledgers["counted"]) - {"ledger"}):
        stages_of = ", ".join(dict.fromkeys(ledgers.loc[ledgers["counted"] == source, "stage"]))
        console.print(f"[dim]no costs.parquet, costs are from the {source}: {stages_of}[/]")
    found = compare(run_folder, ledgers)
    if isinstance(found, str):
        console.print(f"\n{escape(found)}")
    else:
        _print_comparison(found, numbers, console)


def _print_comparison(found: Any, numbers: Sequence[int], console: Console) -> None:
    """Print the ratio for each kind of student, and the number of students from which the supernet costs less."""
    from proard.report.text import amount

    console.print("\n[bold]students trained one by one / supernet run[/] (in MACs; above 1 the supernet is cheaper)")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("student", "MACs", "budget", "counted", "alone", "break-even", *(f"K={number}" for number in numbers)):
        table.add_column(name, justify="left" if name in ("student", "budget", "counted") else "right", no_wrap=True)
    sizes = {**found.sizes, **{f"student {budget}": macs for budget, macs in found.students.items()}}
    for name, macs in sizes.items():
        for budget in found.images:
            even, alone = found.break_even(macs, budget), amount(found.alone(macs, budget))
            ratios = [f"{found.ratio(number, macs, budget):.2f}" for number in numbers]
            table.add_row(name, amount(macs), budget, "everything", alone, str(even or "never"), *ratios)
            ratios = [f"{found.training_ratio(number, macs, budget):.2f}" for number in numbers]
            table.add_row("", "", "", "training", "", "", *ratios, style="dim")
    console.print(table)
    console.print(
        f"[dim]both sides: data and teacher, {amount(found.shared)} MACs; the supernet: {amount(found.once)} once, "
        f"of which {amount(found.training)} training, and {amount(found.each)} per student; a student alone: each "
        f"image passes {found.own:g} times through the student and {found.others:g} times through the teacher; "
        "what is counted: docs/costs.md[/]"
    )


if __name__ == "__main__":
    main()
