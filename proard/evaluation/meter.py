"""Measures networks: table rows with the MEASURED columns, and a cache so that nothing is measured twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from proard.artifacts import wilson, write_text
from proard.config import Attack, Measurement, Threat
from proard.data import ImageSet, to_float
from proard.evaluation.adversary import Outcome, attack_images, clean_correct, stands_training_attack
from proard.kernels import computed_type
from proard.nets import FixedNet, FoldedNet, Supernet, extract, fold, recalibrate
from proard.space import Arch, NetArch, NetSpace, Tally, Work, one_pass

Measured = dict[str, dict[str, Any]]


def free_memory(device: torch.device) -> int:
    """Bytes that a GPU can still give, those that torch keeps for later among them; 0 on other devices."""
    if device.type != "cuda":
        return 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


@dataclass(frozen=True)
class Conditions:
    """What a measurement depends on beside network, images and attacks.

    Attributes
    ----------
    threat : Threat
        Norm and radius, in pixel units.
    measurement : Measurement
        Accounting, recalibration images, batch size.
    seed : int
        Seed of the start noise.
    """

    threat: Threat
    measurement: Measurement
    seed: int


def measure(
    net: Callable[[Tensor], Tensor],
    images: ImageSet,
    attacks: Sequence[Attack],
    conditions: Conditions,
    *,
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> Measured:
    """Run attacks on a folded network, in their order.

    `known` holds results of some of the attacks by name. These attacks are not run again.

    Returns
    -------
    dict of attack name to dict
        Of the attacks that were run. `clean` and `robust`: bool arrays of shape (n,); `gradients` and `forwards`: how
        many of one image the attack computed; `dtype`: type of these gradients; `seconds`: time, including the clean
        pass. A targeted attack continues with the images that are robust under all attacks before it.
    """
    pixels, results, known = to_float(images.images), {}, known or {}
    threat, measurement = conditions.threat, conditions.measurement
    attacks = [_as_computed(attack, pixels.device) for attack in attacks]
    batch_size = batch_that_fits(net, pixels, least=measurement.batch_size)
    started = time.monotonic()
    correct = clean_correct(net, pixels, images.labels, batch_size=batch_size)
    clean_seconds = time.monotonic() - started
    left = correct
    for attack in attacks:
        if attack.name in known:
            left = left & torch.from_numpy(known[attack.name]["robust"]).to(left.device)
            continue
        started = time.monotonic()
        outcome: Outcome = attack_images(
            net,
            pixels,
            images.labels,
            left if attack.objective == "targeted" else correct,
            attack=attack,
            eps=threat.eps,
            norm=threat.norm,
            accounting=measurement.accounting,
            seed=conditions.seed,
            batch_size=batch_size,
        )
        left = left & outcome.robust.to(left.device)
        results[attack.name] = {
            "clean": correct.cpu().numpy(),
            "robust": outcome.robust.numpy(),
            "gradients": outcome.gradients,
            "forwards": outcome.forwards,
            "dtype": attack.dtype,
            "seconds": clean_seconds + time.monotonic() - started,
        }
    return results


def batch_that_fits(
    net: Callable[[Tensor], Tensor],
    pixels: Tensor,
    *,
    least: int,
    free: Callable[[torch.device], int] = free_memory,
) -> int:
    """Images of a batch: `least`, or on a GPU so many times that as its memory holds for this network.

    An attack keeps every map in float32 and makes a gradient of each; half of the free memory is left. Results do not
    depend on the batch, apart from rounding.

    Parameters
    ----------
    net : callable
        Images to logits; without a `spec` with convolutions its batch is `least`.
    pixels : Tensor of shape (n, channels, height, width)
        All images, on the device.
    least : int
        The batch in the settings.
    free : callable
        Free bytes of a device; 0 where there is no limit to ask for.
    """
    maps = sum(conv.out_channels * conv.out_size**2 for conv in getattr(getattr(net, "spec", None), "convs", ()))
    room = free(pixels.device) // 2 // max(2 * 4 * maps, 1) if maps else 0
    batch = least
    while 2 * batch <= min(room, len(pixels)):
        batch *= 2
    return batch


def _as_computed(attack: Attack, device: torch.device) -> Attack:
    """The attack with the floating-point type that this device uses for it."""
    return attack.model_copy(update={"dtype": computed_type(attack.dtype, device)})


def work_of(entries: Collection[Mapping[str, Any]], macs: int) -> Work:
    """Work of measuring one network with that many MACs on the same images: one clean pass and all attacks."""
    if not entries:
        return Work()
    clean = max(len(entry["clean"]) for entry in entries)
    passes = sum(2 * entry["gradients"] + entry.get("forwards", 0) for entry in entries)  # not in the oldest caches
    return (clean + passes) * one_pass(macs)


def rows_of(
    measured: Measured,
    *,
    space: NetSpace,
    arch: NetArch,
    images: ImageSet,
    attacks: Sequence[Attack],
    conditions: Conditions,
    worst: bool = False,
) -> list[dict[str, Any]]:
    """Table rows (MEASURED columns), one per attack; `worst` adds a row for the worst case per image."""
    spec = space.spec(arch)
    common = {
        "arch_id": arch.arch_id,
        "genotype": list(space.genotype(arch)),
        "arch": arch.to_json(),
        "macs": spec.macs,
        "params": spec.params,
        "split": images.split,
        "image_set": images.checksum,
        "norm": conditions.threat.norm,
        "eps": conditions.threat.eps,
        "accounting": conditions.measurement.accounting,
        "bn_mode": "recalibrated",
        "seed": conditions.seed,
    }
    rows = []
    for attack in attacks:
        lengths = attack.step_lengths(conditions.threat.eps)
        steps = {
            "step_size": lengths[0],
            "last_step_size": lengths[-1],
            "num_steps": attack.num_steps,
            "targets": attack.num_targets,
            "restarts": attack.restarts,
        }
        rows.append({**common, "attack": attack.name, **steps, **_accuracies(measured[attack.name])})
    if worst:
        entries = [measured[attack.name] for attack in attacks]
        whole = {
            "clean": entries[0]["clean"],
            "robust": np.logical_and.reduce([entry["robust"] for entry in entries]),
            "dtype": ", ".join(sorted({entry.get("dtype") or "float32" for entry in entries})),
            "gradients": sum(entry["gradients"] for entry in entries),
            "seconds": sum(entry["seconds"] for entry in entries),
        }
        steps = {
            "num_steps": max(attack.num_steps for attack in attacks),
            "restarts": sum(attack.restarts for attack in attacks),
        }
        rows.append({**common, "attack": "worst", **steps, **_accuracies(whole)})
    return rows


def _accuracies(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Outcomes of one measurement, and their accuracies with intervals, of all images and of both halves."""
    row: dict[str, Any] = {
        "num_images": len(entry["clean"]),
        "dtype": entry.get("dtype"),
        "gradients": entry["gradients"],
        "seconds": entry["seconds"],
        "clean": entry["clean"].tolist(),
        "robust": entry["robust"].tolist(),
    }
    for kind in ("clean", "robust"):
        mask = entry[kind]
        low, high = wilson(int(mask.sum()), len(mask))
        row |= {f"{kind}_acc": float(mask.mean()), f"{kind}_acc_low": low, f"{kind}_acc_high": high}
        row |= {f"{kind}_acc_half_a": float(mask[::2].mean()), f"{kind}_acc_half_b": float(mask[1::2].mean())}
    return row


class SubnetMeter:
    """Measures subnets of one supernet, each extracted and recalibrated in the same way; results are cached on disk.

    Parameters
    ----------
    supernet : Supernet
        In evaluation mode or not: only its weights are read.
    checksum : str
        Of the supernet's weights.
    train : ImageSet
        Its first `measurement.recalibration_images` reset the batch-norm statistics.
    cache : path, optional
        Folder of measurements, shared by all stages of a run.
    tally : Tally, optional
        Accumulates the work.
    """

    def __init__(
        self,
        supernet: Supernet,
        *,
        checksum: str,
        train: ImageSet,
        conditions: Conditions,
        cache: str | Path | None = None,
        tally: Tally | None = None,
    ) -> None:
        self.tally = tally if tally is not None else Tally()
        self.supernet, self.checksum, self.conditions = supernet, checksum, conditions
        self.cache = Path(cache) if cache is not None else None
        self.recalibration = train.first(conditions.measurement.recalibration_images)
        self.student = lru_cache(maxsize=2)(self._student)

    def _student(self, arch: Arch) -> FoldedNet | FixedNet:
        """The subnet as it is measured and exported: extracted, recalibrated, folded."""
        net = extract(self.supernet, arch)
        recalibrate(net, to_float(self.recalibration.images), batch_size=self.conditions.measurement.batch_size)
        self.tally.spent += len(self.recalibration) * one_pass(net.spec.macs)
        return fold(net).eval()

    def measure(self, arch: Arch, images: ImageSet, attacks: Iterable[Attack]) -> Measured:
        """Measure one subnet; attacks whose results are in the cache are not run again."""
        attacks = [_as_computed(attack, self.supernet.mean.device) for attack in attacks]
        paths = {attack.name: self._path(arch, images, attacks[: place + 1]) for place, attack in enumerate(attacks)}
        found = {name: entry for name, path in paths.items() if (entry := read_entry(path)) is not None}
        macs = self.supernet.space.spec(arch).macs
        self.tally.cached += work_of(found.values(), macs)
        self.tally.cached_seconds += sum(entry["seconds"] for entry in found.values())
        if len(found) < len(attacks):
            fresh = measure(self.student(arch), images, attacks, self.conditions, known=found)
            for name, entry in fresh.items():
                write_entry(paths[name], entry)
            self.tally.spent += work_of(fresh.values(), macs)
            found |= fresh
        return found

    def rows(
        self,
        arch: Arch,
        images: ImageSet,
        attacks: Sequence[Attack],
        *,
        worst: bool = False,
    ) -> list[dict[str, Any]]:
        """Measure one subnet and describe it as table rows."""
        return rows_of(
            self.measure(arch, images, attacks),
            space=self.supernet.space,
            arch=arch,
            images=images,
            attacks=attacks,
            conditions=self.conditions,
            worst=worst,
        )

    def _path(self, arch: Arch, images: ImageSet, attacks: Sequence[Attack]) -> Path | None:
        """Cache path of the last attack's measurement: a hash of everything it depends on."""
        if self.cache is None:
            return None
        *earlier, attack = attacks
        key = {
            "arch": arch.to_json(),
            "supernet": self.checksum,
            "images": images.checksum,
            "recalibration": self.recalibration.checksum,
            "threat": self.conditions.threat.model_dump(),
            "accounting": self.conditions.measurement.accounting,
            "recalibration_batch": self.conditions.measurement.batch_size,
            "attack": attack.model_dump(exclude={"name"}),
            "seed": self.conditions.seed,
        }
        if attack.objective == "targeted":
            key["after"] = [other.model_dump(exclude={"name"}) for other in earlier]
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.cache / name[:2] / f"{name[2:34]}.json"


def read_entry(path: Path | None) -> dict[str, Any] | None:
    """A cached measurement, or None; a damaged file is treated as missing."""
    if path is None:
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored.pop("checksum") != _checksum(stored):
            return None
        for kind in ("clean", "robust"):
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(stored[kind]), dtype=np.uint8), count=stored["num_images"])
            stored[kind] = bits.astype(bool)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return stored


def write_entry(path: Path | None, entry: Mapping[str, Any]) -> None:
    """Write a measurement to the cache."""
    if path is None:
        return
    masks = {kind: np.packbits(entry[kind]).tobytes().hex() for kind in ("clean", "robust")}
    stored = {**entry, **masks, "num_images": len(entry["clean"])}
    write_text(path, json.dumps({**stored, "checksum": _checksum(stored)}))


def _checksum(stored: Mapping[str, Any]) -> str:
    """Checksum of a measurement's JSON."""
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def validation_rows(
    supernet: Supernet | FixedNet,
    archs: Mapping[str, Any],
    *,
    recalibration: Tensor,
    val: ImageSet,
    attack: Attack,
    conditions: Conditions,
    training_attack: Mapping[str, Any] | None = None,
    tally: Tally | None = None,
) -> list[dict[str, Any]]:
    """Rows of a training's history: each named subnet after recalibration, clean and under one attack.

    `training_attack` (keyword arguments of `pgd`) adds the accuracy under the attack of the training itself. `tally`
    accumulates the work.
    """
    rows, tally = [], tally if tally is not None else Tally()
    batch_size = conditions.measurement.batch_size
    for name, arch in archs.items():
        net = extract(supernet, arch)
        recalibrate(net, recalibration, batch_size=batch_size)
        with torch.enable_grad():
            entry = measure(fold(net), val, [attack], conditions)[attack.name]
        tally.spent += len(recalibration) * one_pass(net.spec.macs) + work_of([entry], net.spec.macs)
        own = {}
        if training_attack is not None:
            given: dict[str, Any] = {"batch_size": batch_size, "seed": conditions.seed, "attack": training_attack}
            right = stands_training_attack(fold(net), to_float(val.images), val.labels, **given)
            own = {"val_train_attack_acc": float(right.double().mean())}
            tally.spent += len(val) * (2 * training_attack["num_steps"] + 1) * one_pass(net.spec.macs)
        rows.append(
            {
                "arch": name,
                "macs": net.spec.macs,
                "val_clean_acc": float(entry["clean"].mean()),
                "val_robust_acc": float(entry["robust"].mean()),
                "val_num_images": len(entry["clean"]),
                **own,
            }
        )
    return rows
