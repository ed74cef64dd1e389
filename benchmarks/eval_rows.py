"""The rows of the evaluation ladder, the checks that they agree, and the supernet that they measure."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
import yaml
from common import largest, relative_difference, require_close
from plain_step import sliced_forward
from torch import Tensor, nn

from proard.artifacts import read_header
from proard.config import Attack, Space, job_settings, load
from proard.data import ImageSet, keyed_generator, load_split, to_float
from proard.evaluation import attack_images, clean_correct
from proard.nets import StaticNet, Supernet, extract, fold, load_supernet, recalibrate
from proard.nets.elastic import BN_EPS
from proard.space import Arch, ConvSpec, SearchSpace, key_of
from proard.stages import prepare_data, train_phase, train_teacher

LEVERS = {
    "E0": "plain: sliced per forward, chained means, PGD on every image for every step",
    "E1": "subnet extracted, one-pass statistics, norms folded; misclassified images skipped, last iterate",
    "E2": "any iterate: misclassified images dropped, the working set refilled: the package",
}
STATISTICS = 1e-4  # largest difference of batch-norm statistics, relative to a layer's largest entry
QUICKSTART = Path(__file__).parents[1] / "config" / "quickstart.yaml"
FILES = ("train", "val", "test", "manifest", "teacher", "history", "supernet")


@dataclass
class Problem:
    """Inputs and settings of a measurement; `recalibration` are the training images that reset batch norm."""

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
        return replace(self, recalibration=self.recalibration.contiguous(), images=self.images.contiguous())

    @property
    def how(self) -> dict[str, object]:
        """Arguments of both forms of the attack."""
        return {"attack": self.attack, "eps": self.eps, "seed": self.seed, "batch_size": self.batch_size}


@dataclass(frozen=True)
class Label:
    """Result of measuring one subnet; `gradients` counts input gradients of one image."""

    clean: Tensor
    robust: Tensor
    gradients: int
    seconds: dict[str, float]


Measure = Callable[..., Label]


def measure_plainly(problem: Problem, arch: Arch, *, accounting: str = "last_iterate") -> Label:
    """Row E0, on NCHW images."""
    clock = Clock()
    net = plain_recalibrate(problem.supernet, arch, problem.recalibration, batch_size=problem.batch_size)
    clock.lap("recalibrate")
    with torch.no_grad():
        parts = zip(problem.images.split(problem.batch_size), problem.labels.split(problem.batch_size), strict=True)
        clean = torch.cat([net(batch, arch).argmax(1) == truth for batch, truth in parts])
    robust = plain_robust(problem, net, arch, accounting)
    clock.lap("attack")
    return Label(clean, robust & clean, len(robust) * problem.attack.num_steps, clock.seconds)


def measure_as_package(problem: Problem, arch: Arch, *, accounting: str = "any_iterate") -> Label:
    """Rows E1 and E2: as `SubnetMeter` measures an arch that is not in its cache."""
    clock, images, labels = Clock(), problem.images, problem.labels
    net = extract(problem.supernet, arch)
    clock.lap("materialise")
    recalibrate(net, problem.recalibration, batch_size=problem.batch_size)
    clock.lap("recalibrate")
    folded = fold(net, dtype=problem.supernet.head.weight.dtype).eval()
    clock.lap("materialise")
    clean = clean_correct(folded, images, labels, batch_size=problem.batch_size)
    outcome = attack_images(folded, images, labels, clean, accounting=accounting, **problem.how)
    clock.lap("attack")
    return Label(clean, outcome.robust, outcome.gradients, clock.seconds)


class Clock:
    """Wall seconds by part."""

    def __init__(self) -> None:
        self.seconds, self.last = {}, time.perf_counter()

    def lap(self, part: str) -> None:
        """Add the time since the last lap."""
        before, self.last = self.last, time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + self.last - before


ROWS: dict[str, Measure] = {
    "E0": measure_plainly,
    "E1": partial(measure_as_package, accounting="last_iterate"),
    "E2": measure_as_package,
}


def equality(problem: Problem, archs: Sequence[Arch], measure: Measure = measure_as_package) -> dict[str, float]:
    """Differences of plain and package form, in float64: statistics (largest, relative), other outcomes of images.

    `measure` is the package's form.
    """
    pixels = {name: getattr(problem, name).double() for name in ("recalibration", "images")}
    exact = replace(problem, supernet=problem.supernet.double(), **pixels)
    plain = exact.contiguous()
    found = {"statistics": 0.0, "clean": 0.0, "last_iterate": 0.0, "any_iterate": 0.0}
    try:
        for arch in archs:
            ours = recalibrate(extract(exact.supernet, arch), exact.recalibration, batch_size=exact.batch_size)
            theirs = plain_recalibrate(exact.supernet, arch, plain.recalibration, batch_size=exact.batch_size)
            found["statistics"] = largest([found["statistics"], statistics_difference(ours, theirs)])
            for accounting in ("last_iterate", "any_iterate"):
                first = measure_plainly(plain, arch, accounting=accounting)
                second = measure(exact, arch, accounting=accounting)
                found["clean"] += float((first.clean != second.clean).sum())
                found[accounting] += float((first.robust != second.robust).sum())
    finally:
        problem.supernet.float()
    return found


def statistics_difference(net: StaticNet, supernet: Supernet) -> float:
    """Largest relative difference of running statistics."""
    names = [(conv, name) for conv in net.spec.convs if conv.norm for name in ("running_mean", "running_var")]
    found = {(conv, name): getattr(net.norms[key_of(conv)], name) for conv, name in names}
    stored = {(conv, name): getattr(supernet.layers[key_of(conv)].bn, name) for conv, name in names}
    return relative_difference(found, {key: values[: key[0].out_channels] for key, values in stored.items()})


def require_equal(differences: dict[str, float]) -> None:
    """Exit if statistics differ by more than the tolerance, or an image has another outcome."""
    allowed = {**dict.fromkeys(differences, 0.0), "statistics": STATISTICS}
    require_close(differences, allowed, "plain and package form differ in float64")


def make_problem(
    supernet: Supernet, train: ImageSet, val: ImageSet, *, recalibration: int, images: int | None, **how: object
) -> Problem:
    """The first images of train and val."""
    data = val.first(images)
    return Problem(supernet, to_float(train.first(recalibration).images), to_float(data.images), data.labels, **how)


def read(supernet: str | Path, train: str | Path, val: str | Path) -> tuple[Supernet, ImageSet, ImageSet]:
    """A trained supernet, in evaluation mode, with the images of its run."""
    space = SearchSpace(Space.model_validate(read_header(supernet)["space"]))
    return load_supernet(supernet, space)[0].eval(), load_split(train), load_split(val)


def train_small(folder: Path, *, epochs: int, seed: int = 0) -> tuple[Supernet, ImageSet, ImageSet]:
    """The quick start's supernet on digits after a short teacher and one phase of `epochs` epochs each."""
    config = yaml.safe_load(QUICKSTART.read_text())
    for section in (config["train_teacher"], config["train_phase"]):
        section |= {"epochs": epochs, "warmup_epochs": min(1, epochs - 1)}
    config["validation"] |= {"every_epochs": epochs, "num_images": 50, "num_steps": 3}
    config["train_phase"]["phases"] = [{"name": "all"}]
    run, paths = load(config), {name: str(folder / f"{name}.safetensors") for name in FILES}

    def stage(module: ModuleType, *files: str, phase: str | None = None) -> None:
        settings = job_settings(run, module.__name__.rsplit(".", 1)[-1], phase=phase)
        flags = [f"--settings={settings}", f"--seed={seed}", "--device=cpu", f"--threads={torch.get_num_threads()}"]
        module.main([*flags, *(f"--{file}={paths[file]}" for file in files)])

    stage(prepare_data, "train", "val", "test", "manifest")
    stage(train_teacher, "train", "val", "teacher", "history")
    stage(train_phase, "train", "val", "teacher", "supernet", "history", phase="all")
    return read(paths["supernet"], paths["train"], paths["val"])


# --- the plain form, written from the description of the released evaluation -----------------------------------------
#
# A deep copy of the supernet whose every forward slices the active weights anew, NCHW memory, batch-norm statistics by
# chained means, then PGD on every image for every step, norms unfolded. Differences, so that outputs can be compared:
# the stored variance is the unbiased one, and all batches weigh the same, as in `proard.nets.recalibrate`; the start
# noise is the package's; `any_iterate` accounting is possible too.


@torch.no_grad()
def plain_recalibrate(supernet: Supernet, arch: Arch, images: Tensor, *, batch_size: int) -> Supernet:
    """A copy of the supernet with the arch's batch-norm statistics on `images`, (n, channels, h, w) in [0, 1]."""
    net = copy.deepcopy(supernet).to(memory_format=torch.contiguous_format).eval()
    sums: dict[ConvSpec, list[Tensor]] = {}
    # a smaller last batch is left out unless it is the only one
    batches = [batch for batch in images.split(batch_size) if len(batch) == min(batch_size, len(images))]

    def norm(layer: ConvSpec, bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
        mean = x.mean(0, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
        var = ((x - mean) ** 2).mean(0, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
        out = layer.out_channels
        mean, var, values = mean.flatten(), var.flatten(), x.numel() / out
        total = sums.setdefault(layer, [torch.zeros_like(mean), torch.zeros_like(var)])
        total[0] += mean
        total[1] += var * values / (values - 1)
        return F.batch_norm(x, mean, var, bn.weight[:out], bn.bias[:out], training=False, eps=BN_EPS)

    for batch in batches:
        sliced_forward(net, arch, net.normalise(batch), norm)
    for layer, (mean, var) in sums.items():
        bn = net.layers[key_of(layer)].bn
        bn.running_mean[: layer.out_channels] = mean / len(batches)
        bn.running_var[: layer.out_channels] = var / len(batches)
    return net


def plain_robust(problem: Problem, net: Supernet, arch: Arch, accounting: str) -> Tensor:
    """Which images, attacked by PGD with all its steps, are classified correctly; bool of shape (n,)."""
    images, labels, attack, eps, seed, batch_size = problem.images, problem.labels, *problem.how.values()
    noise = torch.empty(images.shape).uniform_(-eps, eps, generator=keyed_generator(seed, 0)).to(images.device)
    parts = zip(images.split(batch_size), labels.split(batch_size), noise.split(batch_size), strict=True)
    robust = []
    for clean, truth, start in parts:
        always = torch.ones_like(truth, dtype=torch.bool)
        adv = torch.clamp(clean + start, 0, 1)
        for _ in range(attack.num_steps):
            adv.requires_grad_()
            logits = net(adv, arch)
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, truth, reduction="sum"), adv)
            always &= logits.argmax(1) == truth
            adv = adv.detach() + attack.step_size * gradient.sign()
            adv = torch.min(torch.max(adv, clean - eps), clean + eps)
            adv = torch.clamp(adv, 0, 1)
        with torch.no_grad():
            last = net(adv, arch).argmax(1) == truth
        robust.append(last if accounting == "last_iterate" else always & last)
    return torch.cat(robust)
