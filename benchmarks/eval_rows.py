"""The rows of the evaluation ladder, the checks that they agree, and the supernet that they measure."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from plain_eval import plain_clean, plain_recalibrate, plain_robust
from torch import Tensor

from proard.artifacts import read_header
from proard.config import Attack, Space, job_settings, load
from proard.data import ImageSet, load_split, to_float
from proard.evaluation import attack_images, clean_correct
from proard.nets import FoldedNet, StaticNet, Supernet, extract, fold, load_supernet, recalibrate
from proard.nets.elastic import key_of
from proard.space import Arch, SearchSpace
from proard.stages import prepare_data, train_phase, train_teacher

LEVERS = {
    "E0": "plain: sliced per forward, chained means, PGD on every image for every step",
    "E1": "subnet extracted, one-pass statistics, norms folded; wrong images skipped, last iterate",
    "E2": "any iterate: broken images dropped, the working set refilled: the package",
}
STATISTICS = 1e-4  # largest difference of batch-norm statistics, relative to a layer's largest entry
QUICKSTART = Path(__file__).parents[1] / "config" / "quickstart.yaml"


@dataclass
class Problem:
    """What is measured, and how.

    Attributes
    ----------
    recalibration : Tensor of shape (m, channels, height, width)
        Training images in [0, 1] that reset batch norm.
    images : Tensor of shape (n, channels, height, width)
        Images in [0, 1] that are attacked.
    labels : Tensor of shape (n,)
    """

    supernet: Supernet
    recalibration: Tensor
    images: Tensor
    labels: Tensor
    attack: Attack
    eps: float
    batch_size: int = 250
    seed: int = 0
    parts: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def contiguous(self) -> Problem:
        """The same with NCHW images."""
        return Problem(
            self.supernet,
            self.recalibration.contiguous(),
            self.images.contiguous(),
            self.labels,
            self.attack,
            self.eps,
            self.batch_size,
            self.seed,
            self.parts,
        )


@dataclass(frozen=True)
class Label:
    """What measuring one subnet gives; `gradients` counts input gradients of one image."""

    clean: Tensor
    robust: Tensor
    gradients: int
    seconds: dict[str, float]


def measure_plainly(problem: Problem, arch: Arch, *, accounting: str = "last_iterate") -> Label:
    """Row E0, on NCHW images."""
    clock = Clock()
    net = plain_recalibrate(problem.supernet, arch, problem.recalibration, batch_size=problem.batch_size)
    clock.lap("recalibrate")
    data = (problem.images, problem.labels)
    clean = plain_clean(net, arch, *data, batch_size=problem.batch_size)
    robust = plain_robust(
        net,
        arch,
        *data,
        attack=problem.attack,
        eps=problem.eps,
        seed=problem.seed,
        batch_size=problem.batch_size,
        accounting=accounting,
    )
    clock.lap("attack")
    return Label(clean, robust & clean, len(robust) * problem.attack.num_steps, clock.seconds)


def measure_as_package(problem: Problem, arch: Arch, *, accounting: str = "any_iterate") -> Label:
    """Rows E1 and E2: what `SubnetMeter` does for an arch that is not in its cache."""
    clock = Clock()
    net = extract(problem.supernet, arch)
    clock.lap("materialise")
    recalibrate(net, problem.recalibration, batch_size=problem.batch_size)
    clock.lap("recalibrate")
    folded = fold(net, dtype=problem.supernet.head.weight.dtype).eval()
    clock.lap("materialise")
    clean, outcome = attacked(problem, folded, accounting=accounting)
    clock.lap("attack")
    return Label(clean, outcome.robust, outcome.gradients, clock.seconds)


def attacked(problem: Problem, net: FoldedNet, *, accounting: str) -> tuple[Tensor, Any]:
    """Clean pass and attack of a folded network."""
    clean = clean_correct(net, problem.images, problem.labels, batch_size=problem.batch_size)
    outcome = attack_images(
        net,
        problem.images,
        problem.labels,
        clean,
        attack=problem.attack,
        eps=problem.eps,
        accounting=accounting,
        seed=problem.seed,
        batch_size=problem.batch_size,
    )
    return clean, outcome


class Clock:
    """Wall seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Count the time since the last lap to a part."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now


ROWS: dict[str, Callable[[Problem, Arch], Label]] = {
    "E0": lambda problem, arch: measure_plainly(problem, arch),
    "E1": lambda problem, arch: measure_as_package(problem, arch, accounting="last_iterate"),
    "E2": lambda problem, arch: measure_as_package(problem, arch),
}


def equality(problem: Problem, archs: list[Arch]) -> dict[str, float]:
    """Differences of plain and package form, in float64: statistics (largest, relative), images judged otherwise."""
    exact = Problem(
        problem.supernet.double(),
        *(part.double() for part in (problem.recalibration, problem.images)),
        problem.labels,
        problem.attack,
        problem.eps,
        problem.batch_size,
        problem.seed,
    )
    plain = exact.contiguous()
    found = {"statistics": 0.0, "clean": 0.0, "last_iterate": 0.0, "any_iterate": 0.0}
    try:
        for arch in archs:
            ours = recalibrate(extract(exact.supernet, arch), exact.recalibration, batch_size=exact.batch_size)
            theirs = plain_recalibrate(exact.supernet, arch, plain.recalibration, batch_size=exact.batch_size)
            found["statistics"] = max(found["statistics"], statistics_difference(ours, theirs))
            for accounting in ("last_iterate", "any_iterate"):
                first, second = (
                    measure_plainly(plain, arch, accounting=accounting),
                    measure_as_package(exact, arch, accounting=accounting),
                )
                found["clean"] += float((first.clean != second.clean).sum())
                found[accounting] += float((first.robust != second.robust).sum())
    finally:
        problem.supernet.float()
    return found


def statistics_difference(net: StaticNet, supernet: Supernet) -> float:
    """Largest difference of running statistics, relative to the largest entry of a layer."""
    largest = 0.0
    for conv in net.spec.convs:
        if not conv.norm:
            continue
        norm, bn = net.norms[key_of(conv)], supernet.layers[key_of(conv)].bn
        for name in ("running_mean", "running_var"):
            wanted = getattr(bn, name)[: conv.out_channels]
            difference = (getattr(norm, name) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
            largest = max(largest, float(difference))
    return largest


def require_equal(differences: dict[str, float]) -> None:
    """Stop where statistics differ beyond the tolerance, or an image is judged otherwise.

    Raises
    ------
    SystemExit
        The text names the quantities.
    """
    allowed = {"statistics": STATISTICS}
    wrong = [f"{name}: {value:.2g}" for name, value in differences.items() if not value <= allowed.get(name, 0)]
    if wrong:
        raise SystemExit(f"plain and package form differ in float64, nothing is timed: {', '.join(wrong)}")


def make_problem(
    supernet: Supernet,
    train: ImageSet,
    val: ImageSet,
    *,
    recalibration: int,
    images: int | None,
    attack: Attack,
    eps: float,
    batch_size: int = 250,
    seed: int = 0,
) -> Problem:
    """The first images of train and val."""
    data = val.first(images)
    recalibrating = to_float(train.first(recalibration).images)
    return Problem(supernet, recalibrating, to_float(data.images), data.labels, attack, eps, batch_size, seed)


def read(supernet: str | Path, train: str | Path, val: str | Path) -> tuple[Supernet, ImageSet, ImageSet]:
    """A trained supernet, in evaluation mode, with the images of its run."""
    space = SearchSpace(Space.model_validate(read_header(supernet)["space"]))
    return load_supernet(supernet, space)[0].eval(), load_split(train), load_split(val)


def train_small(folder: Path, *, epochs: int, seed: int = 0) -> tuple[Supernet, ImageSet, ImageSet]:
    """The quick start's supernet on digits after a short teacher and one phase of `epochs` epochs each."""
    config = yaml.safe_load(QUICKSTART.read_text())
    for section in (config["train_teacher"], config["train_phase"]):
        section |= {"epochs": epochs, "warmup_epochs": min(1, epochs - 1)}
        section["validation"] = {**section["validation"], "every_epochs": epochs, "num_images": 50, "num_steps": 3}
    config["train_phase"]["phases"] = [{"name": "all"}]
    run, paths = load(config), {name: str(folder / f"{name}.safetensors") for name in NAMES}

    def stage(module: Any, name: str, *files: str, phase: str | None = None) -> None:
        flags = [part for file in files for part in (f"--{file}", paths[file])]
        settings = job_settings(run, name, phase=phase)
        threads = str(torch.get_num_threads())
        module.main(["--settings", settings, "--seed", str(seed), "--device", "cpu", "--threads", threads, *flags])

    stage(prepare_data, "prepare_data", "train", "val", "test", "manifest")
    stage(train_teacher, "train_teacher", "train", "val", "teacher", "history")
    stage(train_phase, "train_phase", "train", "val", "teacher", "supernet", "history", phase="all")
    return read(paths["supernet"], paths["train"], paths["val"])


NAMES = ("train", "val", "test", "manifest", "teacher", "history", "supernet")
