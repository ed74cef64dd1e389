"""Run every benchmark of this folder and keep the result: one table, one JSON file and one figure per machine.

    python benchmarks/run_all.py                 # all bench_*.py but gpu, sync, pipeline and scale
    python benchmarks/run_all.py --only step attack --threads 1
    python benchmarks/run_all.py --also pipeline
    python benchmarks/run_all.py --quick         # shows that they run; nothing is kept
    python benchmarks/run_all.py --rows FILE     # runs none: keeps rows that benchmarks wrote with --json FILE

Each runs in a process of its own, after the one before, and hands over its rows as JSON lines.
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

from common import table

FOLDER = Path(__file__).parent
LEFT_OUT = ("gpu", "sync", "pipeline", "scale")  # another machine, several processes, minutes: asked for by name
MARKS = {"amx_bf16": "amx", "avx512_bf16": "avx512bf16", "avx512f": "avx512", "avx2": "avx2", "asimd": "neon"}
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print the table, write JSON and figure."""
    args = parse(argv)
    rows = [row for path in args.rows for row in rows_of(Path(path))]
    failed = []
    scripts = {} if args.rows else chosen(args.only, args.also)
    for name, script in scripts.items():
        print(f"== {script.name}", flush=True)
        found = run(script, quick=args.quick, threads=args.threads)
        if found is None:
            failed.append(name)
        rows += found or []
    print(summary(rows))
    if rows and not args.quick:
        facts = machine_of(rows)
        slug = args.machine or machine_slug(facts, cpu_flags())
        write_results(Path(args.results), slug, facts, rows)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; their rows are missing")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these alone, as in step for bench_step.py")
    parser.add_argument("--also", nargs="+", metavar="NAME", default=[], help=f"of {', '.join(LEFT_OUT)}")
    parser.add_argument("--rows", nargs="+", metavar="FILE", default=[], help="JSON lines of earlier runs; run none")
    parser.add_argument("--threads", type=int, help="threads of every benchmark that has the option")
    parser.add_argument("--machine", metavar="NAME", help="name of the results instead of the processor's")
    parser.add_argument("--results", metavar="FOLDER", default=str(FOLDER / "results"))
    parser.add_argument("--quick", action="store_true", help="pass --quick on; show that all run, keep nothing")
    return parser.parse_args(argv)


def chosen(only: Sequence[str] | None, also: Sequence[str], folder: Path = FOLDER) -> dict[str, Path]:
    """Benchmarks to run, by name; the training step first, because the figure is about it.

    Raises
    ------
    SystemExit
        A name has no script.
    """
    there = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    there = dict(sorted(there.items(), key=lambda item: item[0] != "step"))
    strange = {*(only or []), *also} - set(there)
    if strange:
        raise SystemExit(f"no benchmark {', '.join(sorted(strange))}; there are {', '.join(there)}")
    kept = set(only) if only else {name for name in there if name not in LEFT_OUT} | set(also)
    return {name: path for name, path in there.items() if name in kept}


def run(script: Path, *, quick: bool, threads: int | None) -> list[Row] | None:
    """Rows of one benchmark; None where it fails."""
    options = script.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, str(script)]
        command += ["--json", str(path)] if "--json" in options else []
        command += ["--quick"] if quick and "--quick" in options else []
        command += ["--threads", str(threads)] if threads and "--threads" in options else []
        search = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            command, env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": search}, check=False
        )
        if done.returncode:
            return None
        return rows_of(path, script.stem.removeprefix("bench_")) if path.exists() else []


def rows_of(path: Path, name: str = "") -> list[Row]:
    """The rows of a benchmark's JSON lines; `name` stands in those that do not say which benchmark they are of."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{"bench": name, **json.loads(line)} for line in lines if line.strip()]


def summary(rows: Sequence[Row]) -> str:
    """One table over all benchmarks: ratios to the named baseline and to the plain form, where a row has them."""
    cells = [
        (
            row["bench"],
            str(row.get("row", "")),
            *_over_baseline(row),
            *(_ratio(row.get(key)) for key in ("ratio_plain", "ratio_previous")),
            "noisy" if row.get("noisy") else "",
            ": ".join(filter(None, (row.get("space"), row.get("lever")))),
        )
        for row in rows
    ]
    return table(("bench", "row", "over baseline", "baseline", "/plain", "/previous", "", "what"), cells)


def _over_baseline(row: Row) -> tuple[str, str]:
    """A row's ratio and what it is over: the released form where the row has that ratio, else its own baseline."""
    if "ratio_released" in row:
        return _ratio(row["ratio_released"]), "released form"
    return _ratio(row.get("ratio_total")), row.get("baseline", "-") if "ratio_total" in row else "-"


def _ratio(value: float | None) -> str:
    """Two decimals, or a dash."""
    return "-" if value is None else f"{value:.2f}"


def machine_of(rows: Sequence[Row]) -> dict[str, Any]:
    """The machine that the first row names; its processor and versions stand for all rows."""
    return next((row["machine"] for row in rows if "machine" in row), {})


def machine_slug(facts: Mapping[str, Any], flags: Sequence[str] = ()) -> str:
    """Name of a machine: processor or GPU, cores, widest instruction set; as in `intel-xeon-2c-amx`."""
    model = str(facts.get("gpu") or facts.get("processor") or "unknown")
    model = re.sub(r"\((r|tm)\)|@.*|\b(processor|cpu|nvidia|\d+-core)\b", " ", model.lower())
    parts = [re.sub(r"[^a-z0-9]+", "-", model).strip("-")]
    if not facts.get("gpu"):
        parts += [f"{facts['cores']}c"] if facts.get("cores") else []
        parts += [next((mark for flag, mark in MARKS.items() if flag in flags), "")]
    return "-".join(filter(None, parts))


def cpu_flags() -> list[str]:
    """Instruction sets as the system lists them; empty where it does not."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])


def write_results(folder: Path, slug: str, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write `<slug>.json` and, where a training step was timed, `<slug>.svg`.

    Rows of benchmarks that an earlier run kept and this one did not repeat stay.
    """
    from figure import ladder_figure

    from proard.artifacts.files import write_text
    from proard.report.svg import to_svg

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
