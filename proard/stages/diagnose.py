"""Diagnose one network beside the teacher: weights and test images -> terms of the bound, radii, their summary."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from proard.artifacts import ArtifactError, read_header, write_table
from proard.config import TEACHER, ConfigError
from proard.data import ImageSet, keyed_generator, to_float
from proard.evaluation.certify import certify, clever, largest_radius
from proard.evaluation.diagnosis import measure_bound, search_points
from proard.evaluation.tables import (
    BOUND,
    RADII,
    SUMMARY,
    TERMS,
    bound_rows,
    clever_rows,
    smoothing_row,
    summary_rows,
)
from proard.export import load_student
from proard.nets import FixedNet, FoldedNet, StaticNet, fold, load_static
from proard.progress import Progress
from proard.space import Arch, NetArch
from proard.stages.common import Job, parse_arguments, run
from proard.stages.measuring import load_images, subnet_meter
from proard.stages.train_teacher import named_arch

KINDS = ("teacher", "control", "trained_student")  # of files that `load_static` reads
AT_ONCE = 50  # images in one search of the bound's points
BOUND_NOISE, CLEVER_NOISE, SMOOTHING_NOISE = range(3)  # streams of the seed


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="diagnose",
        reads=["teacher", "test"],
        writes=["bound", "radii", "summary"],
        optional=["weights", "supernet", "train"],
    )
    files = job.files
    teacher = load_network(files.teacher, job.device)
    name, network = chosen_network(job, teacher)
    test = load_images(job, "test")
    for which, path in ((teacher, files.teacher), (network, files.weights or files.supernet or files.teacher)):
        check_shape(which, test, path)
    who = {"network": name, **network.identity, "split": test.split, "seed": job.seed}
    bound = pd.DataFrame(diagnosed_bound(job, network.net, teacher.net, test, who))
    radii = pd.DataFrame([*clever_radii(job, network.net, test, who), *smoothed_radii(job, network.net, test, who)])
    radii = radii.reindex(columns=list(RADII))
    inputs = [path for path in (files.teacher, files.weights, files.supernet, files.train, files.test) if path]
    provenance = job.provenance(*inputs)
    write_table(files.bound, bound, BOUND, provenance)
    write_table(files.radii, radii, RADII, provenance)
    summary = summary_rows(bound, radii, seed=job.seed)
    write_table(files.summary, summary, SUMMARY, provenance)
    print(_words(name, bound, radii))
    job.record_costs()


@dataclass(frozen=True)
class LoadedNetwork:
    """A network as it is deployed, folded where that can be, and its identity in the tables."""

    net: nn.Module
    spec: Any
    identity: dict[str, Any]

    @classmethod
    def of(cls, net: StaticNet | FoldedNet | FixedNet, arch: NetArch, device: str) -> LoadedNetwork:
        """The network on its device; its weights require no gradient."""
        spec = net.spec
        folded = (fold(net) if isinstance(net, StaticNet) else net).requires_grad_(False)
        identity = {"arch_id": arch.arch_id, "macs": spec.macs, "params": spec.params}
        return cls(folded.to(device).eval(), spec, identity)


def load_network(path: str, device: str) -> LoadedNetwork:
    """Read an exported student, or a network that was trained by itself.

    Raises
    ------
    ArtifactError
        The file is missing, damaged, or holds no such network.
    """
    header = read_header(path)
    if header.get("kind") == "student":
        return LoadedNetwork.of(load_student(path), Arch.from_json(header["arch"]), device)
    if header.get("kind") not in KINDS:
        found = header.get("kind", "foreign tensors")
        raise ArtifactError(f"{path} holds {found!r}, expected student, {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    net, _, arch, _ = load_static(path, kind=KINDS)
    return LoadedNetwork.of(net, arch, device)


def chosen_network(job: Job, teacher: LoadedNetwork) -> tuple[str, LoadedNetwork]:
    """Name and network of the one entry of the settings; without an entry, the teacher itself."""
    networks, files = job.config.diagnose.networks, job.files
    if not networks:
        return TEACHER, teacher
    if len(networks) > 1:
        raise ConfigError(f"diagnose.networks lists {len(networks)} networks; a job diagnoses one")
    (entry,) = networks
    if entry.arch is None:
        if not files.weights:
            raise ConfigError(f"diagnose.{entry.name} is read from a file: give --weights")
        return entry.name, load_network(files.weights, job.device)
    if not (files.supernet and files.train):
        raise ConfigError(f"diagnose.{entry.name} is cut from the supernet: give --supernet and --train")
    meter = subnet_meter(job, cache=None)
    arch = named_arch(entry.arch, meter.supernet.space, where=f"diagnose.{entry.name}")
    return entry.name, LoadedNetwork.of(meter.student(arch), arch, job.device)


def check_shape(network: LoadedNetwork, images: ImageSet, path: str) -> None:
    """Refuse a network for other images."""
    spec, (height, _, channels) = network.spec, images.images.shape[1:]
    if (spec.image_channels, spec.image_size, spec.classes) != (channels, height, len(images.classes)):
        raise ConfigError(
            f"{path} is for {spec.image_channels}x{spec.image_size}x{spec.image_size} images of {spec.classes} "
            f"classes; this run has {channels}x{height}x{height} of {len(images.classes)}"
        )


def in_float64(net: nn.Module) -> nn.Module:
    """The same weights, computed in float64."""
    if not isinstance(net, FoldedNet):
        return copy.deepcopy(net).double()
    state = {name: tensor.double() for name, tensor in net.state_dict().items()}
    return FoldedNet.from_state(net.spec, state).to(net.head_weight.device)


def diagnosed_bound(
    job: Job, student: nn.Module, teacher: nn.Module, images: ImageSet, who: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Rows of BOUND: points searched in float32, all terms taken at them in float64."""
    settings, threat = job.config.diagnose, job.config.threat
    images = images.first(settings.num_images)
    exact = in_float64(student), in_float64(teacher)
    progress = Progress(f"{who['network']}: bound", len(images) * len(settings.shares), "images")
    for share in settings.shares:
        eps, norm = share * threat.eps, threat.norm
        for first, pixels, labels in chunks(images, min(AT_ONCE, job.config.measurement.batch_size)):
            generator_of = generators(job.seed, BOUND_NOISE, first, len(labels))
            points = search_points(
                student,
                teacher,
                pixels,
                labels,
                eps=eps,
                norm=norm,
                num_steps=settings.num_steps,
                restarts=settings.restarts,
                generator_of=generator_of,
            )
            bound = measure_bound(*exact, pixels.double(), labels, points, eps=eps, norm=norm)
            yield from bound_rows(bound, first=first, **who, eps=eps, norm=norm)
            progress.advance(len(labels), note=f"eps {eps:.4f}: least slack {float(bound.slack.min()):.2g}")
    progress.close()


def clever_radii(job: Job, net: nn.Module, images: ImageSet, who: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of RADII of CLEVER, in both norms."""
    settings = job.config.diagnose.clever
    if not settings.num_images:
        return
    images = images.first(settings.num_images)
    at_once = max(1, job.config.measurement.batch_size // settings.num_samples)
    sampling = {name: getattr(settings, name) for name in ("num_maxima", "num_samples", "targets")}
    progress = Progress(f"{who['network']}: CLEVER", 2 * len(images), "radii")
    for norm, limit in (("linf", settings.linf_radius), ("l2", settings.l2_radius)):
        for first, pixels, labels in chunks(images, at_once):
            streams = generators(job.seed, CLEVER_NOISE, first, len(labels))(0, 0)
            found = clever(net, pixels, norm=norm, radius=limit, generators=streams, **sampling)
            correct = (predicted(net, pixels) == labels).cpu().numpy()
            samples = settings.num_maxima * settings.num_samples
            yield from clever_rows(found, correct, first=first, **who, norm=norm, limit=limit, samples=samples)
            progress.advance(len(labels))
    progress.close()


def smoothed_radii(job: Job, net: nn.Module, images: ImageSet, who: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of RADII of randomised smoothing, for every standard deviation."""
    settings = job.config.diagnose.smoothing
    if not (settings.num_images and settings.sigmas):
        return
    images = images.first(settings.num_images)
    numbers: dict[str, Any] = {name: getattr(settings, name) for name in ("num_choose", "num_certify", "alpha")}
    progress = Progress(f"{who['network']}: smoothing", len(settings.sigmas) * len(images), "certificates")
    for sigma in settings.sigmas:
        limit = largest_radius(sigma, settings.num_certify, settings.alpha)
        shared = {"norm": "l2", "sigma": sigma, "limit": limit, "samples": settings.num_certify}
        shared["alpha"] = settings.alpha
        for first, pixels, labels in chunks(images, 1):
            (stream,) = generators(job.seed, SMOOTHING_NOISE, first, 1)(0, 0)
            batch_size = job.config.measurement.batch_size
            found = certify(net, pixels[0], sigma=sigma, batch_size=batch_size, generator=stream, **numbers)
            yield {**smoothing_row(found, int(labels[0]), **who, **shared), "image": first}
            progress.advance()
    progress.close()


def chunks(images: ImageSet, size: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Place of the first image, images as network input, and labels, so many at a time."""
    for first in range(0, len(images), size):
        part = slice(first, first + size)
        yield first, to_float(images.images[part]), images.labels[part]


def generators(seed: int, stream: int, first: int, number: int) -> Callable[[int, int], list[torch.Generator]]:
    """(search, restart) to a generator per image, by its place: results do not depend on how many go at once."""
    return lambda search, restart: [
        keyed_generator(seed, stream, search, restart, image) for image in range(first, first + number)
    ]


@torch.no_grad()
def predicted(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Predicted classes, of shape (batch,)."""
    return net(images).argmax(1)


def _words(name: str, bound: pd.DataFrame, radii: pd.DataFrame) -> str:
    """Summary line for the terminal."""
    lines = []
    for eps, rows in bound.groupby("eps"):
        left, right, slack = rows["left"].mean(), rows["right"].mean(), rows["slack"].min()
        terms = " + ".join(f"{rows[term].mean():.3f}" for term in TERMS)
        lines.append(
            f"{name}, eps {eps:.4f}: |l_S - l_T| up to {left:.3f} nats, bound {terms} = {right:.3f}, least slack "
            f"{slack:.1e}; {rows['student_robust'].mean():.1%} robust"
        )
    for (method, norm, sigma), rows in radii.groupby(["method", "norm", "sigma"], dropna=False):
        noise = "" if pd.isna(sigma) else f" sigma {sigma:g}"
        mean = rows["radius"].where(rows["correct"], 0.0).mean()
        lines.append(f"{name}, {method}{noise}: mean {norm} radius {mean:.4f}, right on {rows['correct'].mean():.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
