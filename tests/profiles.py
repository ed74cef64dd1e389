"""The SLURM profile as a site edits it, with the commented lines filled in; and the rules that use GPUs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def edited_profile(folder: Path, *, partition: str, gpu_partition: str) -> Path:
    """Write the profile with partitions, GPU model and job arrays uncommented; the folder to name it by."""
    text = (ROOT / "slurm" / "profile.yaml").read_text("utf-8")
    block = re.search(r"(?m)^# set-resources:\n(#   .*\n)+", text)[0]
    text = text.replace(block, re.sub(r"(?m)^# ", "", block))
    text = re.sub(r"(?m)^# slurm-array-", "slurm-array-", text)
    text = text.replace("# slurm_partition: YOUR_CPU_PARTITION", f"slurm_partition: {partition}")
    text = text.replace("YOUR_GPU_PARTITION", gpu_partition)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.yaml").write_text(text, "utf-8")
    return folder


def rules_with_a_gpu() -> set[str]:
    """Rules that request one."""
    found = set()
    for path in (ROOT / "workflow" / "rules").glob("*.smk"):
        for rule in re.split(r"(?m)^rule ", path.read_text("utf-8"))[1:]:
            if re.search(r"(?m)^        gpu=", rule):
                found.add(rule.split(":")[0])
    return found
