"""Folders of runs: a new one, and Snakemake started in one. The workflow is part of the installed package.

`repository/` holds links to what lies beside the package in the repository; a wheel contains copies in their place.
"""

from pathlib import Path

HERE = Path(__file__).resolve().parent
SNAKEFILE = (HERE / "repository" / "workflow" / "Snakefile").resolve()
CONFIGS = {path.stem: path for path in sorted((HERE / "repository" / "config").glob("*.yaml")) if path.stem != "config"}

__all__ = ["CONFIGS", "SNAKEFILE"]
