"""How far a training is, and the rows of its history."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from proard.progress import duration
from proard.space import Work

Rows = list[dict[str, Any]]


@dataclass
class Done:
    """How far a training is; everything but tensors that a resumed process needs.

    Sums over the epoch end in `epoch_loss` (loss times images), `epoch_clean`, `epoch_robust` (correct images) and
    `epoch_images`; all others are sums over the training.
    """

    step: int = 0
    epoch_loss: float = 0.0
    epoch_clean: float = 0.0
    epoch_robust: float = 0.0
    epoch_images: int = 0
    images: int = 0
    forward_equivalents: int = 0
    work_macs: float = 0.0
    weight_gradients: int = 0
    gradients: int = 0
    seconds: float = 0.0
    best_score: float = -math.inf
    overfitted: bool = False

    def add(self, work: Work, gradients: int, *, images: int) -> None:
        """Add a step on so many images; `work` and `gradients` are those of one image."""
        self.step += 1
        self.epoch_images += images
        self.images += images
        self.forward_equivalents += round(work.forwards * images)
        self.work_macs += work.macs * images
        self.weight_gradients += round(work.weight_gradients * images)
        self.gradients += gradients * images

    def begin_epoch(self) -> None:
        """Start the sums of an epoch."""
        self.epoch_loss = self.epoch_clean = self.epoch_robust = 0.0
        self.epoch_images = 0


def epoch_rows(done: Done, validation: Rows, *, types: Mapping[str, torch.dtype], **common: Any) -> Rows:
    """Rows of the HISTORY table for an epoch that has ended: one per validated subnet."""
    count = max(done.epoch_images, 1)
    facts: dict[str, Any] = {
        "loss": done.epoch_loss / count,
        "train_clean_acc": done.epoch_clean / count,
        "train_robust_acc": done.epoch_robust / count,
    }
    totals = ("step", "images", "forward_equivalents", "work_macs", "weight_gradients", "gradients", "seconds")
    facts |= {name: getattr(done, name) for name in totals}
    facts |= {key: str(dtype).removeprefix("torch.") for key, dtype in types.items()}
    return [{**common, **facts, **row} for row in validation]


def summary(label: str, history: Rows) -> str:
    """One line on the newest epoch."""
    epoch = history[-1]["epoch"]
    rows = [row for row in history if row["epoch"] == epoch]
    text = f"{label} epoch {epoch}: loss {rows[0]['loss']:.4f}, {duration(rows[0]['seconds'])}"
    for row in rows:
        if row["arch"]:
            text += f"; {row['arch']} clean {row['val_clean_acc']:.1%} robust {row['val_robust_acc']:.1%}"
    return text + (" · best so far" if rows[0]["best"] else "")
