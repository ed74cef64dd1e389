"""Students, costs and fronts of a run, printed in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from proard import artifacts
from proard.cli.show import format_value
from proard.config import UserError


def students(run_folder: str | Path, console: Console) -> None:
    """Print the table of a run's exported students, and where its report lies; with AutoAttack where it was run.

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
    attacked = {student.budget: _autoattack(folder, student.budget) for student in found}
    known = {budget: row for budget, row in attacked.items() if row is not None}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    clean, robust = ("clean",) if known else ("clean", "95 %"), ("robust", "95 %")  # a line has 80 characters
    for name in ("budget", "MACs", "params", *clean, *robust, *(["AutoAttack"] if known else []), "exported"):
        table.add_column(name, justify="left" if name in ("budget", "exported") else "right", no_wrap=True)

    def add(name: str, row: Mapping[str, Any], exported: str, style: str | None = None) -> None:
        cells = [percent(row["clean_acc"]), interval(row, "clean_acc")][: len(clean)]
        cells += [percent(row["robust_acc"]), interval(row, "robust_acc")]
        if known:
            cells.append(percent(known[name]["robust_acc"]) if name in known else "")
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
    if known:
        numbers = sorted({int(row["num_images"]) for row in known.values()})
        images = " or ".join(f"{number:,}" for number in numbers)
        words = f"the first {images} test images" if max(numbers) < final["num_images"] else f"{images} test images"
        console.print(f"[dim]AutoAttack: standard, percent of {words}[/]")
    report = folder / "report" / "report.html"
    console.print(f"report: {report}" if report.exists() else "[dim]no report yet: the stage report writes it[/]")


def _autoattack(folder: Path, budget: str) -> pd.Series | None:
    """The row of all attacks of AutoAttack on a student, if it was run."""
    path = folder / "autoattack_student" / budget / "table.parquet"
    if not path.exists():
        return None
    rows = artifacts.read_table(path, columns=["attack", "num_images", "robust_acc"])
    rows = rows[rows["attack"] == artifacts.AUTOATTACK_UNION]
    return None if rows.empty else rows.iloc[0]


def fronts(first: str | Path, second: str | Path, console: Console) -> None:
    """Print the hypervolumes of measured archs on one scale and their difference, of two runs or two sets of tables.

    Parameters
    ----------
    first, second : str or path
        Folders of two runs, or tables, each named by file or pattern.

    Raises
    ------
    UserError
        There is no such table, or no measurements of the two can be compared.
    """
    from proard.report.fronts import compare_tables, sampled_tables, verified_tables

    tables = [str(path).endswith(".parquet") for path in (first, second)]
    if any(tables) and not all(tables):
        raise UserError(f"{first} and {second}: one is a run, the other a table; name two runs or two tables")
    if all(tables):
        found = compare_tables(*(_matching(str(pattern)) for pattern in (first, second)))
    else:
        verified = compare_tables(verified_tables(first), verified_tables(second))
        verified = verified[(verified["split"] == "test") & (verified["attack"] == "worst")]
        sampled = compare_tables(sampled_tables(first), sampled_tables(second))
        found = pd.concat([verified, sampled], ignore_index=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("split", "attack", "images", "archs"):
        table.add_column(name, no_wrap=True)
    for name in ("first", "second", "second minus first", "in both", "clean", "robust"):
        table.add_column(name, justify="right", no_wrap=True)
    for _, row in found.iterrows():
        archs = " and ".join(map(str, dict.fromkeys((row["first_archs"], row["second_archs"]))))
        volumes = [_span(row, name, "{:.4f}") for name in ("first", "second")]
        names = ("clean_gain", "robust_gain") if row["paired"] else ()
        gains = [_span(row, name, "{:+.1f}", scale=100) for name in names]
        cells = [f"{row['num_images']:,}", archs, *volumes, _span(row, "difference", "{:+.4f}")]
        table.add_row(row["split"], row["attack"], *cells, str(row["paired"]), *gains)
    console.print(table)
    console.print(
        "[dim]first, second: hypervolume in clean accuracy, robust accuracy and MACs, as a share of the box from the "
        "best values in both to 10 % of their range beyond the worst; clean, robust: mean gain of the archs in both, "
        "points; below: 95 % interval over the images, where outcomes per image of the same images are in the tables. "
        "It covers neither other archs nor other seeds[/]"
    )


def _matching(pattern: str) -> list[Path]:
    """Files that match a pattern.

    Raises
    ------
    UserError
        There is none.
    """
    found = sorted(map(Path, glob(pattern)))
    if not found:
        raise UserError(f"there is no table {pattern}")
    return found


def _span(row: pd.Series, name: str, form: str, *, scale: float = 1.0) -> str:
    """A value and, in a line of its own, its interval where it is known."""
    value, low, high = (form.format(scale * row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return value if pd.isna(row[f"{name}_low"]) else f"{value}\n{low} to {high}"


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
