"""An exported student in use: one line to load it, classes for image files, and what the hubs of models read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from proard.artifacts import ArtifactError, read_header
from proard.data import preprocess
from proard.data.decode import decode_image
from proard.export.formats import INPUT, OUTPUT, StudentFacts, load_student

WEIGHTS, ONNX, CARD, CONFIG, LABELS = "student.safetensors", "student.onnx", "card.md", "config.json", "labels.txt"


class Student(nn.Module):
    """An exported student: images in [0, 1] to logits, on the CPU, in evaluation mode.

    Parameters
    ----------
    path : path
        Folder of the export, or its `student.safetensors`.

    Attributes
    ----------
    classes : tuple of str
        Class names in the order of the logits.
    card : str
        Text of the model card beside the weights; empty where there is none.

    Raises
    ------
    ArtifactError
        There are no weights, or they are damaged.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        weights = Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)
        self.net = load_student(weights)
        header = read_header(weights)
        self.classes = tuple(header["classes"])
        card = weights.with_name(CARD)
        self.card = card.read_text(encoding="utf-8") if card.exists() else ""
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes) for images in [0, 1] of shape (batch, channels, height, width)."""
        return self.net(images)

    def preprocess(self, image: Image.Image) -> Tensor:
        """A Pillow image as the network's input, float32 of shape (1, channels, height, width), as in training."""
        channels, side = self.net.spec.image_channels, self.net.spec.image_size
        return torch.from_numpy(as_input(preprocess(image, side, mode_of(channels))))


def mode_of(channels: int) -> str:
    """Pillow's mode of images with that many channels."""
    return "L" if channels == 1 else "RGB"


def as_input(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels of shape (side, side) or (side, side, channels) as (1, channels, side, side) in [0, 1]."""
    maps = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)
    return np.ascontiguousarray(maps[None], dtype=np.float32) / np.float32(255)


def predict_files(path: str | Path, files: Sequence[str | Path]) -> list[tuple[str, float]]:
    """Class and its share of the softmax for each image file, by onnxruntime.

    Parameters
    ----------
    path : path
        Folder of an export, or an ONNX file (`student.onnx`, `student.int8.onnx`).

    Raises
    ------
    ArtifactError
        There is no such file, or it is no student.
    DataError
        A file is no image; it is named.
    """
    import onnxruntime

    file = Path(path) / ONNX if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise ArtifactError(f"{file} does not exist; name the folder of an exported student, or its ONNX file")
    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{file} is no exported student ({type(error).__name__}: {reason})") from None
    _, channels, side, _ = session.get_inputs()[0].shape
    found = []
    for name in files:
        pixels = decode_image(Path(name), str(name), size=side, mode=mode_of(channels))
        (logits,) = session.run([OUTPUT], {INPUT: as_input(pixels)})
        shares = np.exp(logits[0].astype(np.float64) - logits.max())
        found.append((classes[int(shares.argmax())], float(shares.max() / shares.sum())))
    return found


def print_classes(path: str | Path, files: Sequence[str | Path]) -> None:
    """Print a line for each image file: its name, its class, the class's share of the softmax."""
    for file, (name, share) in zip(files, predict_files(path, files), strict=True):
        print(f"{file}\t{name}\t{share:.4f}")


def hub_config(facts: StudentFacts) -> dict[str, Any]:
    """Contents of `config.json`, in the form that timm and model hubs read.

    The normalisation is inside the network: for whoever prepares images, the mean is 0 and the deviation 1.
    """
    spec = facts.space.spec(facts.arch)
    shape = [spec.image_channels, spec.image_size, spec.image_size]
    names = list(facts.classes)
    return {
        "architecture": "proard_student",
        "num_classes": len(names),
        "label_names": names,
        "id2label": dict(enumerate(names)),
        "label2id": {name: place for place, name in enumerate(names)},
        "pretrained_cfg": {
            "tag": facts.name,
            "input_size": shape,
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [0.0] * spec.image_channels,
            "std": [1.0] * spec.image_channels,
            "num_classes": len(names),
            "license": facts.license,
            "label_names": names,
        },
        "proard": facts.to_header(),
    }


def labels_text(facts: StudentFacts) -> str:
    """Contents of `labels.txt`: one class name a line, in the order of the logits."""
    return "".join(f"{name}\n" for name in facts.classes)
