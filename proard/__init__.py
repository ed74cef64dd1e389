"""Train one robust supernet once; ask for a student at any cost budget and get a checked artefact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proard.export.usage import Student

__version__ = "0.1.0"


def load_student(path: str | Path) -> Student:
    """Load an exported student.

    Parameters
    ----------
    path : path
        Folder of the export (`results/RUN/export_student/BUDGET`), or its `student.safetensors`.

    Returns
    -------
    Student
        A torch module: float32 images in [0, 1] of shape (batch, channels, height, width) to logits. `classes` names
        these, `preprocess` makes such an image of a Pillow image, `card` is the text of the model card.
    """
    from proard.export.usage import Student  # torch is not loaded before it is needed

    return Student(path)
