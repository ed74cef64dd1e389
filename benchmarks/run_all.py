"""Run every benchmark of this folder and keep the result: one table, one JSON file and one figure per machine.

    python benchmarks/run_all.py                 # all bench_*.py but gpu, sync, pipeline, scale, strength, startup
    python benchmarks/run_all.py --only step attack --threads 1
    python benchmarks/run_all.py --also pipeline
    python benchmarks/run_all.py --quick         # a test run; nothing is kept
    python benchmarks/run_all.py --rows FILE     # runs none; keeps rows that benchmarks wrote with --json FILE

Each runs in a separate process, one after the other, and writes its rows as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from common import Row, cell, cpu_info, table
from matplotlib.figure import Figure

from proard.artifacts.files import write_text
from proard.report.svg import COLOURS, STYLE, to_svg

FOLDER = Path(__file__).parent
LEFT_OUT = (
    "gpu",
    "sync",
    "pipeline",
    "scale",
    "strength",
    "startup",
)  # another machine, processes, minutes or a run: named only
MARKS = {"amx_bf16": "amx", "avx512_bf16": "avx512bf16", "avx512f": "avx512", "avx2": "avx2", "asimd": "neon"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print the table, write JSON and figure."""
    args = parse(argv)
    rows = [row for path in args.rows for row in rows_of(Path(path))]
    failed = []
    for name, script in ({} if args.rows else chosen(args.only, args.also)).items():
        print(f"== {script.name}", flush=True)
        found = run(script, quick=args.quick, threads=args.threads)
        failed += [name] if found is None else []
        rows += found or []
    print(summary(rows))
    if rows and not args.quick:
        facts = next((row["machine"] for row in rows if "machine" in row), {})  # of the first row that names it
        slug = args.machine or machine_slug(facts, cpu_info("flags", "Features").split())
        write_results(Path(args.results), slug, facts, rows)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; their rows are missing")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these, such as step for bench_step.py")
    parser.add_argument("--also", nargs="+", metavar="NAME", default=[], help=f"of {', '.join(LEFT_OUT)}")
    parser.add_argument("--rows", nargs="+", metavar="FILE", default=[], help="JSON lines of earlier runs; run none")
    parser.add_argument("--threads", type=int, help="threads of every benchmark")
    parser.add_argument("--machine", metavar="NAME", help="name of the results instead of the processor's")
    parser.add_argument("--results", metavar="FOLDER", default=str(FOLDER / "results"))
    parser.add_argument("--quick", action="store_true", help="a test run of all with --quick; keep nothing")
    return parser.parse_args(argv)


def chosen(only: Sequence[str] | None, also: Sequence[str], folder: Path = FOLDER) -> dict[str, Path]:
    """Benchmarks to run, by name; the training step first, because the figure shows it."""
    there = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    there = dict(sorted(there.items(), key=lambda item: item[0] != "step"))
    strange = {*(only or []), *also} - set(there)
    if strange:
        raise SystemExit(f"no benchmark {', '.join(sorted(strange))}; there are {', '.join(there)}")
    kept = set(only) if only else {name for name in there if name not in LEFT_OUT} | set(also)
    return {name: path for name, path in there.items() if name in kept}


def run(script: Path, *, quick: bool, threads: int | None) -> list[Row] | None:
    """Rows of one benchmark; None if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, str(script), "--json", str(path)]
        command += [*(["--quick"] if quick else []), *(["--threads", str(threads)] if threads else [])]
        search = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
        environment = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000", **os.environ, "PYTHONPATH": search}
        if subprocess.run(command, env=environment, check=False).returncode:
            return None
        return rows_of(path, script.stem.removeprefix("bench_")) if path.exists() else []


def rows_of(path: Path, name: str = "") -> list[Row]:
    """The rows of a benchmark's JSON lines; `name` is added to those without the name of a benchmark."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{"bench": name, **json.loads(line)} for line in lines if line.strip()]


def summary(rows: Sequence[Row]) -> str:
    """One table over all benchmarks: ratios to the named baseline and to the plain form, if a row has them."""
    cells = [
        (
            row["bench"],
            str(row.get("row", "")),
            *_over_baseline(row),
            *(cell(row.get(key), ".2f") for key in ("ratio_plain", "ratio_previous")),
            "noisy" if row.get("noisy") else "",
            ": ".join(filter(None, (row.get("space"), row.get("lever")))),
        )
        for row in rows
    ]
    return table(("bench", "row", "over baseline", "baseline", "/plain", "/previous", "", "what"), cells)


def _over_baseline(row: Row) -> tuple[str, str]:
    """A row's ratio and its baseline: the released form if the row has that ratio, else its own baseline."""
    if "ratio_released" in row:
        return cell(row["ratio_released"], ".2f"), "released form"
    return cell(row.get("ratio_total"), ".2f"), row.get("baseline", "-") if "ratio_total" in row else "-"


def machine_slug(facts: Mapping[str, Any], flags: Sequence[str] = ()) -> str:
    """Name of a machine: processor or GPU, cores, widest instruction set; as in `intel-xeon-2c-amx`."""
    model = str(facts.get("gpu") or facts.get("processor") or "unknown")
    model = re.sub(r"\((r|tm)\)|@.*|\b(processor|cpu|nvidia|\d+-core)\b", " ", model.lower())
    parts = [re.sub(r"[^a-z0-9]+", "-", model).strip("-")]
    if not facts.get("gpu"):
        parts += [f"{facts['cores']}c"] if facts.get("cores") else []
        parts += [next((mark for flag, mark in MARKS.items() if flag in flags), "")]
    return "-".join(filter(None, parts))


def ladder_figure(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Bars of the ratios of the first run of `bench_step`, the released step at the top; None without such rows."""

    def run_of(row: Row) -> list[Any]:
        return [row.get(key) for key in ("space", "width_scale", "batch", "num_steps", "seed")]

    steps = [row for row in rows if row["bench"] == "step" and "ratio_plain" in row]
    if not steps:
        return None
    steps = [row for row in steps if run_of(row) == run_of(steps[0])]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 0.42 * len(steps) + 1.55))
        axis = figure.subplots()
        looks = (("ratio_total", "released", "blue", -0.18), ("ratio_plain", "plain", "orange", 0.18))
        for key, name, colour, offset in looks:
            places, label = [index + offset for index in range(len(steps))], f"times faster than the {name} step"
            bars = axis.barh(places, [row[key] for row in steps], height=0.34, color=COLOURS[colour], label=label)
            axis.bar_label(bars, fmt="%.2f", padding=3, size=8)
        axis.axvline(1, color=COLOURS["muted"], linewidth=0.8)
        axis.set_yticks(range(len(steps)), [row["lever"] for row in steps])
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        axis.set_xlim(0, 1.12 * max(max(row["ratio_total"], row["ratio_plain"]) for row in steps))
        first = steps[0]
        title = f"Training step, {first['space']} at width {first['width_scale']:g}, batch {first['batch']}, "
        title += f"PGD-{first['num_steps']}" + (" (noisy run)" if first.get("noisy") else "")
        figure.suptitle(title, x=0.01, ha="left", size=12, weight="bold")
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        figure.legend(loc="lower right", ncols=2)
    return figure


def write_results(folder: Path, slug: str, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write `<slug>.json` and, where a training step was timed, `<slug>.svg`.

    Rows of benchmarks that this run did not repeat are kept.
    """
    path = folder / f"{slug}.json"
    folder.mkdir(parents=True, exist_ok=True)
    repeated = {row["bench"] for row in rows}
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = [*rows, *(row for row in before if row["bench"] not in repeated)]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    write_text(path, f'{{"machine": {json.dumps(facts)},\n "rows": [\n{lines}\n]}}\n')
    print(f"written: {path}")
    figure = ladder_figure(rows)
    if figure is not None:
        write_text(path.with_suffix(".svg"), to_svg(figure, "Speed of the training step, lever by lever"))
        print(f"written: {path.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
