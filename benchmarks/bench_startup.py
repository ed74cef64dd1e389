"""Seconds before a stage works: its process with `--help`, and whether that imports torch.

A stage without networks must not import torch, which takes most of the time. Times are minima over the rounds.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common import Options, Row, machine, show, write_rows

import proard.stages

STAGES = Path(proard.stages.__file__).parent
LISTED = "import sys, runpy; import proard.stages.{name}; print('torch' in sys.modules)"


def stage_names() -> list[str]:
    """Modules that are stages: those with a main function."""
    return sorted(path.stem for path in STAGES.glob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8"))


def main(argv: Sequence[str] | None = None) -> None:
    """Time every stage, print, and write one JSON line per stage with `--json`."""
    args = Options(__doc__, "startup", quick={"rounds": 1, "stages": 2}, stages=(100, "stages at most")).read(argv)
    rows: list[Row] = []
    for name in stage_names()[: args.stages]:
        seconds = []
        for _ in range(args.rounds):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", f"proard.stages.{name}", "--help"], check=True, capture_output=True)
            seconds.append(time.perf_counter() - started)
        found = subprocess.run([sys.executable, "-c", LISTED.format(name=name)], check=True, capture_output=True)
        torch = found.stdout.strip() == b"True"
        rows.append({"bench": "startup", "row": name, "lever": "imports torch" if torch else "without torch"})
        rows[-1] |= {"seconds": round(min(seconds), 3), "rounds": args.rounds, "machine": machine()}
    show("seconds before a stage works", rows, {"seconds": "s:.2f"})
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
