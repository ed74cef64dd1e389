"""Standard AutoAttack by the package of its authors, attack by attack and block by block, each result kept on disk.

The result of one attack on one block of images depends on the network, the block, the images of it that are still
robust, the attack, the threat model and the seed. It is stored under a hash of all of these. A job that was killed, or
is repeated, therefore continues after the last complete result.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyautoattack
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from proard.artifacts import tensors_checksum
from proard.config import LEAST_CLASSES, Threat, UserError
from proard.data import ImageSet, to_float
from proard.evaluation.meter import read_entry, write_entry
from proard.nets import FoldedNet

STEPS = {"apgd-ce": 100, "apgd-t": 100, "fab-t": 100, "square": 5000}  # of one run; square: queries
ATTACKS = tuple(STEPS)  # of version `standard`, in its order
NORMS = {"linf": "Linf", "l2": "L2"}
MOST_TARGETS = 9  # wrong classes that apgd-t and fab-t try, of those with the largest logits
SLACK = 1e-5  # by which rounding may exceed eps, in pixel units; in l2 relative to eps where that is larger


@dataclass
class Attacked:
    """Outcomes of all attacks.

    Attributes
    ----------
    clean : ndarray of shape (n,)
        bool: classified correctly without an attack.
    entries : dict of attack name to dict
        For each attack `robust` (bool, shape (n,)): correct after this attack and all before it; `attacked`: number of
        images that it was run on; `gradients` and `forwards`: passes of one image; `seconds`.
    left_out : int
        Images that are correct without an attack and were not attacked.
    warnings : list of str
        Messages of AutoAttack's own checks, each once.
    """

    clean: NDArray[np.bool_]
    entries: dict[str, dict[str, Any]]
    left_out: int
    warnings: list[str] = field(default_factory=list)


class Counted(nn.Module):
    """A network that counts its passes: images with a gradient, and images without.

    Attacks get logits and gradients by the network's own `input_gradient`, if it has one, whose rounding may differ
    from that of the network (`approximate`); `exact` is the network itself, which decides.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.own = net.input_gradient() if isinstance(net, FoldedNet) else None
        self.gradients = self.forwards = 0

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes), for an attack."""
        if torch.is_grad_enabled() and images.requires_grad:
            self.gradients += len(images)
            return self.net(images) if self.own is None else self.own.differentiable(images)
        self.forwards += len(images)
        return self.net(images) if self.own is None else self.own.logits(images)

    @torch.no_grad()
    def exact(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes) of the network itself."""
        self.forwards += len(images)
        return self.net(images)


def check_classes(classes: int) -> None:
    """Refuse a classification problem on which AutoAttack is not defined.

    Raises
    ------
    UserError
        There are fewer than four classes.
    """
    if classes < LEAST_CLASSES:
        raise UserError(
            f"AutoAttack's targeted loss is defined from {LEAST_CLASSES} classes on, there are {classes}: set "
            "autoattack_student.run: false; the accuracies under the attacks of verify_front remain"
        )


def attack_seed(seed: int, block: int, attack: str) -> int:
    """Seed of one attack on one block."""
    return 1000 * seed + len(ATTACKS) * block + ATTACKS.index(attack)


def run_attack(
    net: Counted, images: Tensor, labels: Tensor, *, attack: str, threat: Threat, seed: int
) -> tuple[Tensor, list[str]]:
    """Run one attack of standard AutoAttack on correctly classified images.

    Parameters
    ----------
    net : Counted
        Images to logits.
    images : Tensor of shape (batch, channels, height, width)
        In [0, 1], all classified correctly.
    labels : Tensor of shape (batch,)
    attack : {'apgd-ce', 'apgd-t', 'fab-t', 'square'}
    threat : Threat
        Norm and radius.
    seed : int
        Seed of the attack's random numbers.

    Returns
    -------
    robust : Tensor of shape (batch,)
        bool: the image that the attack returned is classified correctly by `net.exact`.
    warnings : list of str
        Messages of AutoAttack's checks: random outputs, probabilities in place of logits, zero gradients, optimisation
        inside the network.

    Notes
    -----
    With fewer than ten classes, apgd-t and fab-t try all wrong classes instead of nine.

    References
    ----------
    Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks,
    ICML 2020, arXiv:2003.01690. Package pyautoattack.
    """
    images = images.contiguous()  # the package flattens by views
    devices = [images.device] if images.is_cuda else []
    with heard() as warnings, torch.random.fork_rng(devices):  # it seeds torch's global generators
        adversary = pyautoattack.AutoAttack(
            net, norm=NORMS[threat.norm], eps=threat.eps, seed=seed, version="standard", device=images.device
        )
        with torch.no_grad():
            classes = net(images[:1]).shape[1]
        targets = min(MOST_TARGETS, classes - 1)
        adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
        adversary.attacks_to_run = [attack]
        adv, _ = adversary.run_standard_evaluation(images, labels, batch_size=len(images))
    change = (adv - images).flatten(1)
    size = change.abs().amax(1) if threat.norm == "linf" else torch.linalg.vector_norm(change, dim=1)
    assert float(size.max()) <= threat.eps + SLACK * max(1.0, threat.eps), f"{attack} left the ball"
    assert float(adv.min()) >= 0 and float(adv.max()) <= 1, f"{attack} left the pixel range"  # noqa: PT018
    return net.exact(adv).argmax(1) == labels, warnings


@contextmanager
def heard() -> Iterator[list[str]]:
    """Collect what AutoAttack's checks say, instead of printing it."""
    messages: list[str] = []
    logger, handler = logging.getLogger("auto-attack"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def autoattack(
    net: nn.Module,
    images: ImageSet,
    *,
    threat: Threat,
    seed: int,
    block_size: int,
    left_out: NDArray[np.bool_] | None = None,
    cache: str | Path | None = None,
    advance: Callable[[int, str], None] = lambda images, note: None,
) -> Attacked:
    """Attack images with the four attacks of standard AutoAttack, one after the other.

    Parameters
    ----------
    net : nn.Module
        The network as it is deployed; its weights require no gradient.
    images : ImageSet
        On the device of the network.
    threat : Threat
        Norm and radius.
    seed : int
        Every attack on every block has its own seed, made from this one.
    block_size : int
        Images that are attacked together. The random numbers of an image depend on it.
    left_out : ndarray of shape (n,), optional
        bool: images that are known to be misclassified under an attack; they are not attacked and count as lost.
    cache : path, optional
        Folder of results, of this network and of others.
    advance : callable
        Called after each attack on each block, with the number of images of the block and a note.

    Raises
    ------
    UserError
        There are fewer than four classes.
    """
    check_classes(len(images.classes))
    counted, found = Counted(net), []
    weights = tensors_checksum(net.state_dict())
    for block, first in enumerate(range(0, len(images), block_size)):
        part = images.take(range(first, min(first + block_size, len(images))))
        pixels = to_float(part.images)
        clean = (counted.exact(pixels).argmax(1) == part.labels).cpu().numpy()
        standing = clean.copy() if left_out is None else clean & ~left_out[first : first + block_size]
        spared, entries, said = int((clean & ~standing).sum()), {}, []
        for attack in ATTACKS:
            key: dict[str, Any] = {
                "network": weights,
                "images": part.checksum,
                "threat": threat.model_dump(),
                "attack": attack,
            }
            key |= {"seed": attack_seed(seed, block, attack), "standing": np.packbits(standing).tobytes().hex()}
            entry = _attacked_block(counted, pixels, part.labels, standing, key=key, threat=threat, cache=cache)
            standing, entries[attack] = entry["robust"], entry
            said += entry["warnings"]
            advance(len(part), f"{attack}, block {block + 1}: {int(standing.sum())} of {len(part)} robust")
        found.append((clean, entries, spared, said))
    merged = {attack: _merged([entries[attack] for _, entries, _, _ in found]) for attack in ATTACKS}
    messages = list(dict.fromkeys(message for _, _, _, said in found for message in said))
    clean = np.concatenate([clean for clean, _, _, _ in found])
    return Attacked(clean, merged, sum(spared for _, _, spared, _ in found), messages)


def _attacked_block(
    counted: Counted,
    pixels: Tensor,
    labels: Tensor,
    standing: NDArray[np.bool_],
    *,
    key: dict[str, Any],
    threat: Threat,
    cache: str | Path | None,
) -> dict[str, Any]:
    """One attack on the images of a block that are still robust; from the cache where it is there."""
    key = {**key, "pyautoattack": metadata.version("pyautoattack")}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = None if cache is None else Path(cache) / name[:2] / f"{name[2:34]}.json"
    known = read_entry(path)
    if known is not None:
        return {**known, "cached": True}
    started, before = time.monotonic(), (counted.gradients, counted.forwards)
    robust, warnings = standing.copy(), list[str]()
    if standing.any():
        index = torch.from_numpy(standing.nonzero()[0]).to(labels.device)
        options: dict[str, Any] = {"attack": key["attack"], "threat": threat, "seed": key["seed"]}
        still_robust, warnings = run_attack(counted, pixels[index], labels[index], **options)
        robust[standing] = still_robust.cpu().numpy()
    entry = {
        "clean": standing,
        "robust": robust,
        "gradients": counted.gradients - before[0],
        "forwards": counted.forwards - before[1],
        "warnings": warnings,
        "seconds": time.monotonic() - started,
    }
    write_entry(path, entry)
    return {**entry, "cached": False}


def _merged(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """One attack's results on all blocks."""
    sums = {name: sum(entry[name] for entry in blocks) for name in ("gradients", "forwards", "seconds")}
    spent = [entry for entry in blocks if not entry["cached"]]
    return {
        **sums,
        "robust": np.concatenate([entry["robust"] for entry in blocks]),
        "attacked": int(sum(entry["clean"].sum() for entry in blocks)),
        "spent": {name: sum(entry[name] for entry in spent) for name in ("gradients", "forwards")},
    }
