"""A run of the whole workflow on the digits, smaller than the quick start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
SHORT = {"epochs": 2, "warmup_epochs": 0}
SMALL = {
    "run": "small",
    "validation": {"every_epochs": 2, "num_images": 60, "num_steps": 2},
    "save_every_minutes": 0.001,
    "prepare_data": {"max_train_images": 320},
    "train_teacher": {**SHORT, "epochs": 12},
    "train_control": SHORT,
    "train_phase": {"phases": [{"name": "depth", "width": [1.0], **SHORT}, {"name": "all", **SHORT}]},
    "sample_archs": {"num_archs": 16, "strata": 4},
    "evaluate_archs": {"archs_per_shard": 16, "num_images": 60, "attack": {"num_steps": 3}},
    "fit_predictor": {"models": ["ridge"], "held_out": 6, "folds": 2, "bootstraps": 20},
    "search_front": {"population": 12, "generations": 3},
    "verify_front": {"num_archs": 2, "num_val_images": 60, "attacks": [{"name": "pgd3", "num_steps": 3}]},
    "select_student": {"budgets": ["macs=200K"], "candidates": 2, "num_images": 60, "attack": {"num_steps": 3}},
    "autoattack_student": {"run": True, "num_images": 12},
    "check_student": {"run": True, "num_images": 12},
}


class Run:
    """A run of the workflow in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results = folder, folder / "results" / "small"
        config = folder / "small.yaml"
        config.write_text(yaml.safe_dump(SMALL))
        self.command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "workflow" / "Snakefile"]
        quickstart = ROOT / "config" / "quickstart.yaml"
        self.options = [
            "--directory",
            folder,
            "--cores",
            os.environ["OMP_NUM_THREADS"],  # 1 beside other tests
            "--configfile",
            quickstart,
            config,
        ]

    def start(self, *arguments: str) -> subprocess.Popen:
        """Start Snakemake in a process group of its own."""
        command = [*map(str, self.command), *arguments, *map(str, self.options)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def __call__(self, *arguments: str) -> str:
        """Run to the end; what it printed."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output[-4000:]
        return output
