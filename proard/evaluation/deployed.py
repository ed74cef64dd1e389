"""Robustness of a network that runs where no gradient is: attacked through stand-ins, scored by its runtime alone.

A stand-in is a network that can be differentiated: a twin that computes the same, the float network, the teacher. An
image counts as robust only if it is classified correctly under the attacks through all of them, and under a search by
queries to the runtime.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyautoattack.square import SquareAttack
from scipy import stats
from torch import Tensor

from proard.attacks import differentiate, pgd
from proard.config import Attack, UserError
from proard.data import ImageSet, keyed_generator, to_float
from proard.evaluation.meter import Conditions, Measured, measure, rows_of
from proard.evaluation.pairing import mean_interval
from proard.losses import CrossEntropy
from proard.space import NetArch, NetSpace

Predict = Callable[[Tensor], Tensor]
SQUARE_NORMS = {"linf": "Linf", "l2": "L2"}


class OnDevice:
    """A runtime's logits, with the stand-in that attacks differentiate.

    Parameters
    ----------
    runtime, attacked : callable
        Images to logits.
    scale : float
        Factor of the stand-in's logits. A softmax that is saturated, or rounded to zero, has no gradient; logits whose
        margin is about 1 have one (Gupta and Ajanthan, AAAI 2022).
    """

    def __init__(self, runtime: Predict, attacked: Predict, *, scale: float = 1.0) -> None:
        self.runtime = runtime
        self.attacked = attacked if scale == 1 else lambda images: scale * attacked(images)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of the runtime."""
        return self.runtime(images)


@dataclass(frozen=True)
class Agreement:
    """How far a twin and the runtime agree on the same images.

    Attributes
    ----------
    top1 : float
        Share of the images with the same class.
    max_difference : float
        Largest difference of a logit.
    """

    top1: float
    max_difference: float


def agreement(first: Tensor, second: Tensor) -> Agreement:
    """Compare logits of shape (n, classes)."""
    same = (first.argmax(1) == second.argmax(1)).double().mean()
    return Agreement(float(same), float((first - second).abs().max()))


def accept_twin(file: str, found: Mapping[str, Agreement], *, least: float, setting: str, runtime: str) -> None:
    """Refuse a twin that is not the file: attacks on it would not be white-box attacks.

    Parameters
    ----------
    found : mapping of str to Agreement
        Agreement of twin and runtime by kind of images.
    least : float
        Share of images with the same class that `setting` requires.
    runtime : str
        Name and version, as in "onnxruntime 1.32.0".

    Raises
    ------
    UserError
        On which images they agree too rarely.
    """
    for images, each in found.items():
        if not each.top1 >= least:
            raise UserError(
                f"{file}: twin and runtime give the same class on {each.top1:.2%} of the {images} test images, "
                f"accepted is {setting}.min_agreement {least:g}; the largest difference of a logit is "
                f"{each.max_difference:.2g}; try another version than {runtime}"
            )


@torch.no_grad()
def logits_of(predict: Predict, images: Tensor, batch_size: int) -> Tensor:
    """Logits of shape (n, classes)."""
    return torch.cat([predict(batch) for batch in images.split(batch_size)])


def last_iterates(net: Predict, images: ImageSet, attack: Attack, conditions: Conditions) -> Tensor:
    """Adversarial images of every image: the last iterate of PGD on cross-entropy, whether or not it succeeded."""
    threat, generator, parts = conditions.threat, keyed_generator(conditions.seed, 0), []
    pixels, size = to_float(images.images), conditions.measurement.batch_size
    steps: dict[str, Any] = {"step_size": 2.5 * threat.eps / attack.num_steps, "num_steps": attack.num_steps}
    for batch, labels in zip(pixels.split(size), images.labels.split(size), strict=True):
        parts.append(
            pgd(net, CrossEntropy(labels), batch, eps=threat.eps, norm=threat.norm, **steps, generator=generator)
        )
    return torch.cat(parts)


def on_pixel_grid(adv: Tensor, images: Tensor, *, eps: float, norm: str = "linf") -> Tensor:
    """Adversarial images as a camera gives them: multiples of 1/255, inside the ball where it is one of linf."""
    rounded = torch.round(255 * adv)
    if norm == "linf":
        reach = np.floor(255 * eps + 1e-6)
        clean = torch.round(255 * images)
        rounded = torch.clamp(rounded, clean - reach, clean + reach)
    return rounded.clamp(0, 255) / 255


def zero_gradients(net: Predict, images: Tensor, labels: Tensor, batch_size: int) -> float:
    """Share of the images at which the input gradient of cross-entropy is zero."""
    found = []
    for batch, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        _, gradient = differentiate(net)(CrossEntropy(truth), batch)
        found.append(gradient.flatten(1).eq(0).all(1))
    return float(torch.cat(found).double().mean())


def typical_margin(logits: Tensor) -> float:
    """Median difference of the two highest logits."""
    highest = logits.topk(2, dim=1).values
    return float((highest[:, 0] - highest[:, 1]).median())


def square(
    runtime: Predict,
    images: ImageSet,
    left: NDArray[np.bool_],
    conditions: Conditions,
    *,
    queries: int,
    batch_size: int,
) -> dict[str, Any]:
    """Search by queries (Square), without any gradient, on the images in `left`; the others stay as they are.

    References
    ----------
    Andriushchenko et al., Square Attack, ECCV 2020, arXiv:1912.00049; the implementation is AutoAttack's.
    """
    started, robust, threat = time.monotonic(), left.copy(), conditions.threat
    places = torch.from_numpy(np.flatnonzero(left)).to(images.labels.device)
    forwards = 0

    def counted(batch: Tensor) -> Tensor:
        nonlocal forwards
        forwards += len(batch)
        return runtime(batch)

    for part in places.split(batch_size):
        pixels, labels = to_float(images.images[part]).contiguous(), images.labels[part]
        attack = SquareAttack(
            counted, norm=SQUARE_NORMS[threat.norm], n_queries=queries, eps=threat.eps, seed=conditions.seed
        )
        with torch.random.fork_rng():
            adv = attack.perturb(pixels, labels)
        robust[part.cpu().numpy()] = (runtime(adv).argmax(1) == labels).cpu().numpy()
    return {"robust": robust, "gradients": 0, "forwards": forwards, "seconds": time.monotonic() - started}


def attack_deployed(
    runtime: Predict,
    images: ImageSet,
    attacks: Sequence[Attack],
    conditions: Conditions,
    *,
    white_box: tuple[str, Predict],
    transfers: Mapping[str, tuple[str, Predict]],
    queries: int,
) -> Measured:
    """Every attack on a network in a runtime; only the runtime's logits decide which images are right.

    Parameters
    ----------
    attacks : sequence of Attack
        Run as a white box. The first one on cross-entropy is run again on scaled logits, and for each transfer.
    white_box : (str, callable)
        Name and network of the stand-in that computes what the runtime computes. Neither has a random choice in it, so
        averaging gradients over draws would change nothing.
    transfers : mapping of str to (str, callable)
        By the attack's name: name and network of other stand-ins.
    queries : int
        Of the search on what all other attacks left; 0 leaves it out.

    Returns
    -------
    dict of attack name to dict
        As `measure` returns, with `crafted_on`. Beside `attacks` and `transfers`: `scaled`; `rounded`, the last
        iterates on the pixel grid; `square`, which counts an image as robust only if all other attacks left it;
        `worst`, the worst case per image over `attacks`; `union`, that over everything.
    """
    pixels, size = to_float(images.images), conditions.measurement.batch_size
    attacks = [attack.model_copy(update={"dtype": "float32"}) for attack in attacks]
    name, twin = white_box
    found = measure(runtime if runtime is twin else OnDevice(runtime, twin), images, attacks, conditions)
    for entry in found.values():
        entry["crafted_on"] = name
    worst = {**worst_case(found), "crafted_on": name}
    probe = probe_of(attacks)
    scale = 1 / max(typical_margin(logits_of(twin, pixels, size)), 1e-6)
    nets = {"scaled": (name, OnDevice(runtime, twin, scale=scale))}
    nets |= {attack: (on, OnDevice(runtime, other)) for attack, (on, other) in transfers.items()}
    for attack, (on, net) in nets.items():
        (entry,) = measure(net, images, [probe.model_copy(update={"name": attack})], conditions).values()
        found[attack] = {**entry, "crafted_on": on}
    started = time.monotonic()
    adv = last_iterates(twin, images, probe, conditions)
    grid = on_pixel_grid(adv, pixels, eps=conditions.threat.eps, norm=conditions.threat.norm)
    right = (logits_of(runtime, grid, size).argmax(1) == images.labels).cpu().numpy()
    common = {"clean": worst["clean"], "dtype": "float32"}
    found["rounded"] = {
        **common, "robust": common["clean"] & right, "crafted_on": name, "gradients": probe.num_steps * len(images),
        "forwards": len(images), "seconds": time.monotonic() - started,
    }  # fmt: skip
    if queries:
        left = worst_case(found)["robust"]
        by_queries = square(runtime, images, left, conditions, queries=queries, batch_size=size)
        found["square"] = {**common, **by_queries, "crafted_on": "queries"}
    return {**found, "worst": worst, "union": worst_case(found)}


def probe_of(attacks: Sequence[Attack]) -> Attack:
    """The first attack on cross-entropy, else the first, with one restart."""
    first = next((attack for attack in attacks if attack.objective == "ce"), attacks[0])
    return first.model_copy(update={"restarts": 1})


def worst_case(found: Measured) -> dict[str, Any]:
    """The entry of the worst case per image over all attacks."""
    entries = list(found.values())
    return {
        "clean": entries[0]["clean"],
        "robust": np.logical_and.reduce([entry["robust"] for entry in entries]),
        "dtype": "float32",
        "crafted_on": "all",
        "gradients": sum(entry["gradients"] for entry in entries),
        "forwards": sum(entry.get("forwards", 0) for entry in entries),
        "seconds": sum(entry["seconds"] for entry in entries),
    }


def deployed_rows(
    found: Measured,
    *,
    images: ImageSet,
    attacks: Sequence[Attack],
    queries: int,
    space: NetSpace,
    arch: NetArch,
    conditions: Conditions,
    common: Mapping[str, Any],
    against: Measured | None = None,
) -> list[dict[str, Any]]:
    """What `attack_deployed` found, as table rows with the columns `common`.

    `against` holds the measurements of another file under the same attacks on the same images: rows then say how they
    differ from it, image by image.
    """
    named, probe, rows = {attack.name: attack for attack in attacks}, probe_of(attacks), []
    described: dict[str, Any] = {"space": space, "arch": arch, "images": images, "conditions": conditions}
    for name, entry in found.items():
        settings = named.get(name, probe).model_copy(update={"name": name})
        (row,) = rows_of({name: entry}, attacks=[settings], **described)
        if name in ("worst", "union", "square"):
            row |= {"step_size": None, "num_steps": queries if name == "square" else None}
        row |= {**common, "crafted_on": entry["crafted_on"]}
        if against is not None:
            row |= paired(against[name]["robust"], entry["robust"], seed=conditions.seed)
            clean = paired(against[name]["clean"], entry["clean"], seed=conditions.seed)
            row |= {f"clean_{key}": clean[key] for key in ("difference", "lost", "gained")}
        rows.append(row)
    return rows


def paired(first: NDArray[np.bool_], second: NDArray[np.bool_], *, seed: int) -> dict[str, Any]:
    """How `second` differs from `first` on the same images: counts, mean with its 95 % interval, exact McNemar test.

    Returns
    -------
    dict
        `lost` and `gained`: images that only the first, or only the second, gets right; `difference` (second minus
        first, a fraction), `difference_low`, `difference_high`, `mcnemar_p`.
    """
    lost, gained = int((first & ~second).sum()), int((second & ~first).sum())
    value, low, high = mean_interval(second.astype(np.float64) - first.astype(np.float64), seed=seed)
    p = float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    counts = {"lost": lost, "gained": gained, "mcnemar_p": p}
    return {"difference": value, "difference_low": low, "difference_high": high, **counts}
