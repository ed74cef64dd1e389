"""Each room of the package imports only from the floors below it (see the table in `FLOORS`)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from export_runs import arguments
from helpers import tiny_config

ROOT = Path(__file__).parents[1] / "proard"

# Room: its floor. A room may import itself, lower floors, and what `BESIDE` lists of its own floor.
FLOORS = {
    "config": 0,
    "host": 0,
    "progress": 0,
    "artifacts": 0,
    "data": 1,
    "space": 1,
    "kernels": 2,
    "nets": 2,
    "attacks": 2,
    "losses": 2,
    "training": 3,
    "evaluation": 3,
    "predictor": 3,
    "search": 3,
    "doctor": 4,
    "export": 4,
    "latency": 4,
    "report": 4,
    "runs": 4,
    "cli": 5,
    "stages": 5,
}
BESIDE = {
    "artifacts": {"config"},  # errors that a user can fix
    "latency": {"export"},  # how students are quantised
}
ONLY = {  # rooms that may import less than their floor allows
    "attacks": {"losses", "kernels"},  # the type of an objective
    "losses": {"kernels"},
    "kernels": set(),
    "nets": {"config", "artifacts", "space", "progress", "kernels"},
    "predictor": {"config", "artifacts", "space", "progress"},
    "search": {"config", "artifacts", "space", "progress"},
    "cli": {"config", "host", "artifacts", "export", "report", "doctor", "latency", "runs"},
    "runs": {"config"},
    "latency": {"config", "artifacts", "progress", "space", "nets", "export"},
    "doctor": {"config", "space", "kernels", "nets", "attacks", "losses"},
}
WITHOUT_TORCH = ("config", "host", "progress", "space", "search", "runs", "cli")
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} - {"__init__"} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_come_from_below(path):
    here = room(path)
    if here == "__init__":
        return
    rooms = {name.split(".")[1] for name in imported_modules(path) if name.startswith("proard.")} & set(FLOORS)
    below = {name for name, floor in FLOORS.items() if floor < FLOORS[here]}
    allowed = ONLY.get(here, below) | BESIDE.get(here, set()) | {here}
    assert rooms <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_needs_snakemake_and_light_rooms_need_no_torch(path):
    packages = {name.split(".")[0] for name in imported_modules(path)}
    assert "snakemake" not in packages
    assert room(path) not in WITHOUT_TORCH or "torch" not in packages


def test_stages_that_run_no_networks_do_not_wait_for_torch(tmp_path):
    names = ("sample_archs", "merge_table", "fit_predictor", "search_front", "report", "compare_experiment")
    stages = [f"proard.stages.{name}" for name in names]
    argv = arguments("sample_archs", tiny_config(), archs=tmp_path / "archs.parquet")
    code = f"import sys, {', '.join(stages)}; {stages[0]}.main({argv!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (tmp_path / "archs.parquet").exists()


def test_the_lines_stay_readable_in_one_sitting():
    assert {path.name: lines for path in FILES if (lines := len(path.read_text("utf-8").splitlines())) >= 400} == {}
