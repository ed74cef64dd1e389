"""An exported student as a plain `torch.nn.Module`. Only torch is needed: this file can go with `student.pt2`.

`model = load_student("student.pt2")` maps images in [0, 1] of shape (batch, channels, height, width) to logits.
"""

from __future__ import annotations

from pathlib import Path

import torch


class Student(torch.nn.Module):
    """The network of a `student.pt2` file; normalisation is inside, and there is no training mode.

    Parameters
    ----------
    path : path
        The file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.net = torch.export.load(path).module()
        self.training = False

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of shape (batch, classes) for images in [0, 1] of shape (batch, channels, height, width)."""
        return self.net(images)

    def train(self, mode: bool = True) -> Student:
        """Do nothing: batch norm is folded into the convolutions, and an exported program has one mode."""
        return self


def load_student(path: str | Path = "student.pt2") -> Student:
    """Read a student."""
    return Student(path)
