"""The repository around the code: requirements agree, commands exist, nothing points at one machine."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

import proard

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
CONDA_NAMES = {"torch": "pytorch"}  # of those that differ from the package index


def split(requirement: str) -> tuple[str, str]:
    """Name and version bounds of a requirement."""
    match = re.fullmatch(r"([A-Za-z0-9_.-]+?)\s*((?:[<>=!~].*)?)", requirement)
    assert match, requirement
    return match[1].lower(), match[2]


def test_conda_environment_equals_the_requirements():
    wanted = dict(map(split, PROJECT["dependencies"]))
    wanted = {CONDA_NAMES.get(name, name): bounds for name, bounds in wanted.items()}
    wanted |= {"python": PROJECT["requires-python"], "pip": ""}
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    *conda, by_pip = environment["dependencies"]
    assert dict(map(split, conda + by_pip["pip"])) == wanted


OWN = {"proard", "triton"}  # triton comes with torch where there may be a GPU, and is done without elsewhere


def test_every_imported_package_is_required():
    of_extra = PROJECT["optional-dependencies"]["executorch"]
    required = {split(requirement)[0] for requirement in PROJECT["dependencies"] + of_extra}
    required |= {"markupsafe", "pydantic-core"}
    distributions, missing = packages_distributions(), {}
    for path in (ROOT / "proard").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for package in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - OWN:
                known = {name.lower().replace("_", "-") for name in distributions.get(package, [package])}
                if not known & required:
                    missing[package] = path.name
    assert missing == {}


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == proard.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in (ROOT / "LICENSE").read_text("utf-8")


def test_what_is_no_python_is_packaged():
    files = [path for path in (ROOT / "proard").rglob("*.*") if path.is_file() and "__pycache__" not in path.parts]
    files = [path for path in files if not path.is_symlink()]  # tests/test_runs.py looks for these in the wheel
    sources = {str(path.relative_to(ROOT / "proard")) for path in files if path.suffix != ".py"}
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["proard"]
    assert sources
    assert all(any(Path(source).match(pattern) for pattern in patterns) for source in sources)


def test_the_console_command_is_there():
    module, function = PROJECT["scripts"]["proard"].split(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_ci_runs_what_a_person_would_run():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text("utf-8").rstrip().splitlines()[-1] == "make test"


@pytest.mark.parametrize("target", ["quickstart", "test", "bench"])
def test_make_knows(target):
    plan = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"quickstart": "students results/quickstart", "test": "pytest", "bench": "run_all"}[target] in plan


def test_the_literal_profile_name_is_found_from_the_root():
    link = ROOT / "slurm"
    assert link.is_symlink()
    assert os.readlink(link) == "workflow/profiles/slurm"
    assert (link / "profile.yaml").is_file()


def test_profiles_leave_each_other_alone():
    # A profile called default would be loaded beside every other one, win whole keys of it, and cap cluster jobs.
    profiles = ROOT / "workflow" / "profiles"
    assert not (profiles / "default").exists()
    slurm = yaml.safe_load((profiles / "slurm" / "profile.yaml").read_text("utf-8"))
    assert "cores" not in slurm
    assert slurm["executor"] == "slurm"
    assert slurm["retries"] >= 3
    assert slurm["rerun-incomplete"] is True


def test_no_committed_text_names_a_place_on_one_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    pattern = re.compile(r"(?<![\w.])/(?:work|root|home/\w+|mnt)/")
    own = Path(__file__).relative_to(ROOT)
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if (
            path.suffix in {".md", ".py", ".smk", ".yaml", ".yml", ".toml", ".cff", ""}
            and path.is_file()
            and Path(name) != own
        ):
            found += [name for line in path.read_text("utf-8", errors="ignore").splitlines() if pattern.search(line)]
    assert found == []


def test_other_machines_run_all_tests_and_the_quick_start():
    """On Linux of both processors and on macOS, with the oldest Python that is allowed and a newer one."""
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text("utf-8"))["jobs"]["tests"]
    systems, pythons = job["strategy"]["matrix"]["system"], job["strategy"]["matrix"]["python"]
    assert [name.split("-")[0] for name in systems] == ["ubuntu", "ubuntu", "macos"]
    assert sum(name.endswith("-arm") for name in systems) == 1
    assert pythons[0] == PROJECT["requires-python"].removeprefix(">=")
    assert int(pythons[-1].split(".")[1]) >= 13
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test", "make quickstart"]


@pytest.mark.parametrize("given", [{}, {"HOME": "/home/me", "USER": "me"}])
def test_make_gives_a_home_folder_and_a_name_to_a_user_without(given):
    environment = {"PATH": os.environ["PATH"], **given}
    command = ["make", "--print-data-base", "--dry-run", "help"]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"^(HOME|USER) :?= (.*)$", said, re.MULTILINE))
    own = subprocess.run(["id", "-un"], capture_output=True, text=True, check=False).stdout.strip()
    assert found == (given or {"HOME": f"{ROOT}/.venv/home", "USER": own or "user"})
