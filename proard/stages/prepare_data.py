"""Read the images and split them once: source -> train, val and test tensors and manifest.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from proard import __version__, artifacts
from proard.data import Splits, make_splits, pixel_statistics, save_split
from proard.stages.common import parse_arguments, run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(__doc__, argv, stage="prepare_data", writes=["train", "val", "test", "manifest"])
    splits = make_splits(job.config.prepare_data, seed=job.seed)
    own, added = len(splits.labels["train"]) - splits.additional, job.config.prepare_data.additional
    mean, std = pixel_statistics(splits.images["train"][:own])
    inputs = {str(path): artifacts.sha256(path) for path in splits.files if path.is_file()}
    provenance = replace(job.provenance(), inputs=inputs)
    written = {}
    for name in ("train", "val", "test"):
        path, labels = getattr(job.files, name), splits.labels[name]
        second: dict[str, Any] = (
            {} if name != "train" or added is None else {"additional": splits.additional, "share": added.share}
        )
        checksum = save_split(
            path,
            splits.images[name],
            labels,
            split=name,
            classes=splits.classes,
            mean=mean,
            std=std,
            provenance=provenance,
            **second,
        )
        count = len(labels) - second.get("additional", 0)
        per_class = np.bincount(labels[:count], minlength=len(splits.classes)).tolist()
        written[name] = {
            "file": path,
            "count": count,
            **second,
            "per_class": per_class,
            "image_shape": list(splits.images[name].shape[1:]),
            "sha256": artifacts.sha256(path),
            "checksum": checksum,
        }
    manifest = {
        "run": job.config.run,
        "source": splits.source,
        "inputs": inputs,
        "classes": list(splits.classes),
        "mean": list(mean),
        "std": list(std),
        "splits": written,
        "seed": job.seed,
        "settings": job.sections,
        "version": __version__,
    }
    artifacts.write_json(job.files.manifest, manifest)
    print(_summary(splits, written))
    job.record_costs()


def _summary(splits: Splits, written: dict[str, dict]) -> str:
    """Summary lines for the terminal."""
    height, width, channels = written["train"]["image_shape"]
    number = len(splits.classes)
    names = ", ".join(splits.classes[:10]) + (", ..." if number > 10 else "")
    pixels = f"{width} x {height} pixels, {channels} channel{'s' if channels > 1 else ''}"
    lines = [f"{splits.source}: {pixels}, {number} classes ({names})"]
    for name, entry in written.items():
        low, high = min(entry["per_class"]), max(entry["per_class"])
        share = f"{low}" if low == high else f"{low} to {high}"
        lines.append(f"  {name:<5} {entry['count']:>7} images, {share} per class -> {entry['file']}")
        if "additional" in entry:
            lines.append(f"        {entry['additional']:>7} additional images, {entry['share']:.0%} of every batch")
    lines += [f"  {note}" for note in splits.notes]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
