"""Checks that exported files are the measured network: outputs on clean and attacked test images, and accuracy."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from proard.attacks import pgd
from proard.config import UserError
from proard.data import ImageSet, to_float
from proard.export.formats import INPUT, OUTPUT, load_student
from proard.losses import CrossEntropy
from proard.nets import FixedNet, FoldedNet
from proard.progress import Progress

SINGLE_IMAGES = 32
ADVERSARIAL_IMAGES = 256
LATENCY_RUNS = 100
LATENCY_SECONDS = 10.0

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class Difference:
    """Difference between two runtimes' outputs on the same images.

    Attributes
    ----------
    max_softmax : float
        Largest difference of a class probability; the softmax is taken in float64.
    image : int
        Index of the image where it occurs.
    top1_agreement : float
        Fraction of the images with the same class.
    flipped : tuple of int
        Indices of the other images.
    margins : tuple of float
        The reference's margin between its two highest logits on those.
    """

    max_softmax: float
    image: int
    top1_agreement: float
    flipped: tuple[int, ...]
    margins: tuple[float, ...]


def difference(reference: NDArray[np.float32], other: NDArray[np.float32]) -> Difference:
    """Compare logits of shape (n, classes); ties go to the first class in both."""
    worst = np.abs(_softmax(reference) - _softmax(other)).max(axis=1)
    flipped = np.flatnonzero(reference.argmax(1) != other.argmax(1))
    highest = np.sort(reference[flipped].astype(np.float64), axis=1)[:, -2:]
    return Difference(
        float(worst.max()),
        int(worst.argmax()),
        1 - len(flipped) / len(reference),
        tuple(flipped.tolist()),
        tuple((highest[:, 1] - highest[:, 0]).tolist()),
    )


def export_is_the_network(name: str, found: Difference, *, tolerance: float, images: str) -> None:
    """Raise an error if an export differs from the measured network.

    Parameters
    ----------
    name : str
        File of the export.
    tolerance : float
        Largest accepted difference of a class probability.
    images : str
        Name of the images in the message.

    Raises
    ------
    UserError
        A probability differs by more, or an image gets another class.
    """
    if not found.max_softmax <= tolerance:  # NaN is refused too
        raise UserError(
            f"{name} is not the measured network: on {images} image {found.image} a class probability differs by "
            f"{found.max_softmax:.2e}, accepted is export_student.tolerance {tolerance:g}; try another "
            f"export_student.opset or version of onnxruntime (now {onnxruntime.__version__})"
        )
    if found.flipped:
        pairs = zip(found.flipped[:5], found.margins[:5], strict=True)
        places = ", ".join(f"{index} (margin of the two highest logits {margin:.1e})" for index, margin in pairs)
        raise UserError(
            f"{name} is not the measured network: {len(found.flipped)} {images} images get another class: {places}; "
            f"try another export_student.opset or version of onnxruntime (now {onnxruntime.__version__})"
        )


def measured_logits(
    net: FoldedNet | FixedNet, test: ImageSet, *, row_clean_acc: float, batch_size: int
) -> NDArray[np.float32]:
    """Logits of shape (n, classes) of the network as measured, rebuilt on the device of `test`.

    Parameters
    ----------
    row_clean_acc : float
        Clean accuracy of the selected row.

    Raises
    ------
    UserError
        The network's accuracy is not exactly the selected row's.
    """
    with torch.no_grad():
        logits = torch.cat([net(batch) for batch in to_float(test.images).split(batch_size)]).cpu().numpy()
    _same_accuracy("the network rebuilt from the supernet", logits, test.labels.cpu(), row_clean_acc)
    return logits


def check_parity(
    as_measured: NDArray[np.float32],
    test: ImageSet,
    *,
    weights: Path,
    onnx: Path,
    pt2: Path,
    row_clean_acc: float,
    eps: float,
    step_size: float,
    num_steps: int,
    norm: str = "linf",
    tolerance: float,
    batch_size: int,
    seed: int,
    threads: int,
) -> dict[str, Any]:
    """Run all three files over the test images and compare them with the network that was measured.

    Parameters
    ----------
    as_measured : ndarray of shape (n, classes)
        Output of `measured_logits`.
    test : ImageSet
        All test images.
    weights, onnx, pt2 : Path
        The exported files; each runs on the CPU.
    row_clean_acc : float
        Clean accuracy on `test` of the selected row, which weights and ONNX must reach exactly.
    eps, step_size, num_steps, norm
        PGD that perturbs some test images, in pixel units.
    batch_size : int
        Images per batch, as in the measurement.
    threads : int
        CPU threads of onnxruntime.

    Returns
    -------
    dict
        Contents of `parity.json`.

    Raises
    ------
    UserError
        A file is not the measured network; the message names the difference and the image.
    """
    clean, labels = to_float(test.images).cpu(), test.labels.cpu()
    student, session = load_student(weights), open_session(onnx, threads=threads)
    program = torch.export.load(pt2).module()
    progress = Progress("parity", 3 * len(test), "images")
    reference = _logits(_torch_predict(student), clean, batch_size, progress)
    batched = difference(reference, by_onnx := _logits(_onnx_predict(session), clean, batch_size, progress))
    by_pt2 = difference(reference, _logits(_torch_predict(program), clean, batch_size, progress))
    progress.close()
    single = difference(reference[:SINGLE_IMAGES], _logits(_onnx_predict(session), clean[:SINGLE_IMAGES], 1))

    few = clean[:ADVERSARIAL_IMAGES]
    start = torch.Generator().manual_seed(seed)
    objective = CrossEntropy(labels[: len(few)])
    ball: dict[str, Any] = {"norm": norm, "eps": eps}
    adv = pgd(student, objective, few, **ball, step_size=step_size, num_steps=num_steps, generator=start)
    adv_reference = _logits(_torch_predict(student), adv, batch_size)
    attacked = difference(adv_reference, _logits(_onnx_predict(session), adv, batch_size))

    for name, found, images in (
        (weights.name, difference(as_measured, reference), "test"),
        (onnx.name, batched, "test"),
        (onnx.name, single, "test (one at a time)"),
        (onnx.name, attacked, "adversarial test"),
        (pt2.name, by_pt2, "test"),
    ):
        export_is_the_network(name, found, tolerance=tolerance, images=images)
    torch_accuracy = _same_accuracy(weights.name, reference, labels, row_clean_acc)
    onnx_accuracy = _same_accuracy(onnx.name, by_onnx, labels, row_clean_acc)
    return {
        "passed": True,
        "tolerance": tolerance,
        "num_images": len(test),
        "batch_sizes": [1, min(batch_size, len(test))],
        "num_images_one_at_a_time": min(SINGLE_IMAGES, len(test)),
        "onnx_max_softmax_difference": max(batched.max_softmax, single.max_softmax),
        "onnx_max_softmax_difference_image": batched.image,
        "onnx_top1_agreement": batched.top1_agreement,
        "onnx_test_accuracy": onnx_accuracy,
        "torch_test_accuracy": torch_accuracy,
        "selected_row_clean_acc": row_clean_acc,
        "pt2_max_softmax_difference": by_pt2.max_softmax,
        "pt2_top1_agreement": by_pt2.top1_agreement,
        "adversarial": {
            "attack": {"objective": "ce", **ball, "step_size": step_size, "num_steps": num_steps, "seed": seed},
            "num_images": len(few),
            "onnx_max_softmax_difference": attacked.max_softmax,
            "onnx_top1_agreement": attacked.top1_agreement,
        },
        "bytes": {path.name: path.stat().st_size for path in (weights, onnx, pt2)},
        "latency": latency(onnx, clean[:1].numpy()),
        "image_passes": 3 * len(test) + min(SINGLE_IMAGES, len(test)) + (2 * num_steps + 2) * len(few),
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
    }


def open_session(path: Path, *, threads: int) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def latency(path: Path, image: NDArray[np.float32]) -> dict[str, Any]:
    """Time of one image on one CPU thread of this machine: for orientation, not a benchmark."""
    predict = _onnx_predict(open_session(path, threads=1))
    image = np.ascontiguousarray(image)
    return {
        "runtime": f"onnxruntime {onnxruntime.__version__}, CPU",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "threads": 1,
        "batch_size": 1,
        **timed(lambda: predict(image)),
    }


def timed(call: Callable[[], Any]) -> dict[str, Any]:
    """Number, median and 95th percentile, in milliseconds, of repeated calls after some for warming up."""
    for _ in range(10):
        call()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < LATENCY_RUNS and time.perf_counter() - started < LATENCY_SECONDS:
        before = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - before))
    return {"runs": len(times), "median_ms": float(np.median(times)), "p95_ms": float(np.percentile(times, 95))}


def _same_accuracy(name: str, logits: NDArray[np.float32], labels: Tensor, row_clean_acc: float) -> float:
    """Accuracy of these logits; raise an error unless it equals the selected row's exactly."""
    correct = logits.argmax(1) == labels.numpy()
    expected = round(row_clean_acc * len(correct))
    if int(correct.sum()) != expected:
        raise UserError(
            f"{name} classifies {int(correct.sum())} of {len(correct)} test images correctly, the selected row has "
            f"{expected}: supernet, training images, device or `measurement` changed since; rerun select_student"
        )
    return float(correct.mean())


def _logits(predict: Predict, images: Tensor, batch_size: int, progress: Progress | None = None) -> NDArray[np.float32]:
    """Logits of all images, of shape (n, classes)."""
    parts = []
    for batch in images.split(batch_size):
        parts.append(predict(batch.contiguous().numpy()))
        if progress is not None:
            progress.advance(len(batch))
    return np.concatenate(parts)


def _torch_predict(net: Callable[[Tensor], Tensor]) -> Predict:
    """A torch network on arrays."""

    def predict(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            return net(torch.from_numpy(images).contiguous(memory_format=torch.channels_last)).numpy()

    return predict


def _onnx_predict(session: onnxruntime.InferenceSession) -> Predict:
    """An onnxruntime session on arrays."""
    return lambda images: session.run([OUTPUT], {INPUT: images})[0]


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Class probabilities in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
