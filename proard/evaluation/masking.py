"""Twelve checks for masked gradients: signs that a robust accuracy is high because attacks fail, not the network holds.

Each check has one value, one threshold and a pass or fail. A threshold is never below one image of those measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyautoattack
import torch
from numpy.typing import NDArray
from torch import Tensor

from proard.attacks import input_gradient, pgd
from proard.config import Attack, Threat
from proard.data import keyed_generator
from proard.evaluation.adversary import Rounds, attack_images, clean_correct
from proard.evaluation.autoattack import ATTACKS, NORMS
from proard.kernels import computed_type
from proard.losses import CrossEntropy

Mask = NDArray[np.bool_]
Predict = Callable[[Tensor], Tensor]
RADII = (0.5, 1.0, 2.0, 4.0, 8.0)  # in units of eps: with 8/255 up to 64/255
DRAWS = 10  # of corner noise
LONGER = 300  # steps of the longer APGD, where AutoAttack takes 100
NOISE, TRANSFER = 7, 8  # keys of generators


@dataclass(frozen=True)
class Check:
    """One check: what holds if gradients are not masked, and the threshold of its value."""

    name: str
    expected: str
    threshold: float
    unit: str = "fraction of the images"
    relation: str = "<="


CHECKS = (
    Check("one step", "one step misclassifies no more images than twenty", 0.0),
    Check("radius", "accuracy falls with the radius, and is about 0 at eight times eps", 0.01),
    Check("more effort", "more steps, more restarts and a longer APGD misclassify few images more", 0.005),
    Check("objective", "cross-entropy and logit margin give similar accuracies", 0.05),
    Check("black box", "Square and transferred attacks misclassify no image that white-box attacks do not", 0.002),
    Check("noise", "noise at the corners of the ball costs little clean accuracy", 0.02),
    Check("zero gradients", "no correct image has a zero gradient", 0.0),
    Check(
        "linearity",
        "the gradient explains a part of the loss increase inside the ball",
        0.75,
        "fraction of the increase",
    ),
    Check("forward pass", "outputs are deterministic and independent of the batch", 1e-5, "probability"),
    Check("deployed file", "adversarial images have the same class in the ONNX file; bfloat16 finds no more", 0.005),
    Check("own network", "attacked again, the exported file gives the outcomes of its row", 0.01),
    Check("overfitting", "accuracy under 100 steps, over that under one step", 0.5, "ratio", ">="),
)


@dataclass
class Found:
    """Value of a check (None: it does not apply), and further figures."""

    value: float | None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Evidence:
    """What was measured before the checks, of the same first images of test; each part may be missing.

    Attributes
    ----------
    own : Attack, ndarray of shape (n,)
        An attack of the selection, and the outcomes under it.
    white_box : ndarray of shape (n,)
        bool: correct under all white-box attacks that were run before.
    after : dict of attack name to ndarray of shape (n,)
        Outcomes of AutoAttack, after each of its attacks and those before it.
    deployed : callable
        Images to logits by the exported ONNX file.
    others : dict of name to callable
        Networks from which attacks are transferred.
    """

    own: tuple[Attack, Mask] | None = None
    white_box: Mask | None = None
    after: Mapping[str, Mask] = field(default_factory=dict)
    deployed: Predict | None = None
    others: Mapping[str, Predict] = field(default_factory=dict)


class Examination:
    """Runs the checks on one network.

    Parameters
    ----------
    net : callable
        The network as it is deployed: images to logits.
    images : Tensor of shape (n, channels, height, width)
        In [0, 1].
    labels : Tensor of shape (n,)
    threat : Threat
        Norm and radius.
    accounting, batch_size
        As in `attack_images`.
    seed : int
        Seed of noise.
    evidence : Evidence
        Earlier measurements and other networks.

    Attributes
    ----------
    gradients, forwards : int
        Passes of one image through the network so far.
    """

    def __init__(
        self,
        net: Predict,
        images: Tensor,
        labels: Tensor,
        *,
        threat: Threat,
        accounting: str,
        batch_size: int,
        seed: int,
        evidence: Evidence,
    ) -> None:
        self.net, self.images, self.labels, self.threat = net, images, labels, threat
        self.accounting, self.batch_size, self.seed, self.evidence = accounting, batch_size, seed, evidence
        self.correct = clean_correct(net, images, labels, batch_size=batch_size)
        self.gradients, self.forwards = 0, len(images)
        self.masks: dict[tuple[Any, ...], Mask] = {}

    def run(self, advance: Callable[[str], None] = lambda name: None) -> list[Found]:
        """Values of all checks, in the order of `CHECKS`; `advance` is called with the name of each that is done."""
        found = []
        for check in CHECKS:
            found.append(getattr(self, "check_" + check.name.replace(" ", "_"))())
            advance(check.name)
        return found

    def threshold(self, check: Check) -> float:
        """Threshold for this number of images: at least one image, where shares of images are compared."""
        exact = check.name == "zero gradients"
        return check.threshold if exact or "images" not in check.unit else max(check.threshold, 1 / len(self.images))

    def robust(self, num_steps: int, *, share: float = 1.0, restarts: int = 1, **options: Any) -> Mask:
        """Outcomes under PGD of that many steps, in the ball of radius `share` * eps; each is computed once."""
        key = (num_steps, share, restarts, *sorted(options.items()))
        if key not in self.masks:
            eps = share * self.threat.eps
            eps = min(eps, 1.0) if self.threat.norm == "linf" else eps
            step = eps if num_steps == 1 else 2.5 * eps / min(num_steps, 20)
            attack = Attack.model_construct(name="check", **self._attack(num_steps, step, restarts), **options)
            self.masks[key] = self._outcomes(attack, eps)
        return self.masks[key]

    @staticmethod
    def _attack(num_steps: int, step_size: float, restarts: int) -> dict[str, Any]:
        """Settings of PGD; one step starts at the image itself."""
        start = "zero" if num_steps == 1 else "uniform"
        return {"num_steps": num_steps, "step_size": step_size, "restarts": restarts, "start": start}

    def _outcomes(self, attack: Attack, eps: float) -> Mask:
        """Outcomes under an attack of the measuring stages."""
        outcome = attack_images(
            self.net,
            self.images,
            self.labels,
            self.correct,
            attack=attack,
            eps=eps,
            norm=self.threat.norm,
            accounting=self.accounting,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        self.gradients, self.forwards = self.gradients + outcome.gradients, self.forwards + outcome.forwards
        return outcome.robust.numpy()

    def adversarial(self, net: Predict) -> Tensor:
        """Adversarial images of PGD with 20 steps on a network, against the true labels."""
        parts = zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
        generator, ball = keyed_generator(self.seed, TRANSFER), self.threat
        step = ball.eps / 8
        if net is self.net:
            self.gradients += 20 * len(self.images)
        options: dict[str, Any] = {"eps": ball.eps, "norm": ball.norm, "step_size": step, "num_steps": 20}
        return torch.cat(
            [pgd(net, CrossEntropy(truth), batch, **options, generator=generator) for batch, truth in parts]
        )

    def right(self, images: Tensor) -> Mask:
        """Which images the network classifies correctly."""
        self.forwards += len(images)
        return clean_correct(self.net, images, self.labels, batch_size=self.batch_size).cpu().numpy()

    @property
    def white_box(self) -> Mask:
        """Correct under all white-box attacks so far, those of AutoAttack among them."""
        masks = [self.robust(20), self.robust(100), self.robust(20, restarts=10), self.robust(20, objective="margin")]
        masks += [self.evidence.after[name] for name in ATTACKS[:-1] if name in self.evidence.after]
        masks += [] if self.evidence.white_box is None else [self.evidence.white_box]
        return np.logical_and.reduce(masks)

    def check_one_step(self) -> Found:
        """Twenty steps against one."""
        one, twenty = (float(self.robust(steps).mean()) for steps in (1, 20))
        return Found(max(0.0, twenty - one), {"one step": one, "20 steps": twenty})

    def check_radius(self) -> Found:
        """Accuracy over the radius."""
        accuracies = [float(self.robust(20, share=share).mean()) for share in RADII]
        rise = max(0.0, *np.diff(accuracies))
        details = {f"{share:g} eps": acc for share, acc in zip(RADII, accuracies, strict=True)}
        return Found(max(rise, accuracies[-1]), details)

    def check_more_effort(self) -> Found:
        """More steps, more restarts, and a longer APGD, on the images that all attacks before left correct."""
        parts = [mask for mask in (self.evidence.white_box, self.evidence.after.get(ATTACKS[-1])) if mask is not None]
        standing = np.logical_and.reduce(parts) if parts else self.robust(20)
        more = {"100 steps": self.robust(100), "10 restarts": self.robust(20, restarts=10)}
        lost = {name: float((standing & ~mask).mean()) for name, mask in more.items()}
        if parts:
            lost[f"APGD of {LONGER} steps"] = self._longer(standing)
        return Found(max(lost.values()), {"correct before": float(standing.mean()), **lost})

    def _longer(self, standing: Mask) -> float:
        """Share of the images that are correct so far, but not under a longer APGD with another start."""
        if not standing.any():
            return 0.0
        index = torch.from_numpy(standing.nonzero()[0]).to(self.labels.device)
        images, labels = self.images[index].contiguous(), self.labels[index]
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            attack = pyautoattack.autopgd_base.APGDAttack(
                self.net,
                n_iter=LONGER,
                norm=NORMS[self.threat.norm],
                eps=self.threat.eps,
                seed=self.seed + 1,
                device=images.device,
            )
            with torch.no_grad():
                adv = attack.perturb(images, labels)
                lost = self.net(adv).argmax(1) != labels
        self.gradients += (LONGER + 1) * len(images)
        return float(lost.sum()) / len(self.images)

    def check_objective(self) -> Found:
        """Cross-entropy against margin."""
        ce, margin = float(self.robust(20).mean()), float(self.robust(20, objective="margin").mean())
        return Found(abs(ce - margin), {"cross-entropy": ce, "margin": margin})

    def check_black_box(self) -> Found:
        """Images that only an attack without the network's gradients misclassifies."""
        standing, only = self.white_box, {}
        if ATTACKS[-1] in self.evidence.after:
            after = self.evidence.after
            only["Square"] = float((after[ATTACKS[-2]] & ~after[ATTACKS[-1]] & standing).mean())
        for name, net in self.evidence.others.items():
            only[f"transfer from {name}"] = float((standing & ~self.right(self.adversarial(net))).mean())
        return Found(max(only.values()) if only else None, only)

    def check_noise(self) -> Found:
        """Noise of full size: every pixel moved by eps, or the whole image by a random vector of length eps."""
        clean, eps = float(self.correct.double().mean()), self.threat.eps
        generator, accuracies = keyed_generator(self.seed, NOISE), []
        for _ in range(DRAWS):
            noise = torch.randn(self.images.shape, generator=generator)
            length = torch.linalg.vector_norm(noise, dim=(1, 2, 3), keepdim=True)
            noise = noise.sign() if self.threat.norm == "linf" else noise / length
            noisy = torch.clamp(self.images + eps * noise.to(self.images), 0, 1)
            accuracies.append(float(self.right(noisy).mean()))
        return Found(
            max(0.0, clean - float(np.mean(accuracies))), {"clean": clean, "noise": float(np.mean(accuracies))}
        )

    def check_zero_gradients(self) -> Found:
        """Gradients at the correct images."""
        index = self.correct.nonzero()[:, 0]
        if not len(index):
            return Found(None)
        _, gradient = input_gradient(self.net, CrossEntropy(self.labels[index]), self.images[index])
        self.gradients += len(index)
        sizes = gradient.flatten(1).abs().sum(1)
        return Found(float((sizes == 0).double().mean()), {"smallest L1 norm": float(sizes.min())})

    def check_linearity(self) -> Found:
        """The loss at an adversarial image against its linearisation at the clean one: median over the images."""
        objective, points = CrossEntropy(self.labels), self.adversarial(self.net)
        _, gradient = input_gradient(self.net, objective, self.images)
        with torch.no_grad():
            rise = (objective(self.net(points)) - objective(self.net(self.images))).double()
        linear = (gradient * (points - self.images)).flatten(1).sum(1).double()
        self.gradients, self.forwards = self.gradients + len(points), self.forwards + 2 * len(points)
        error = ((rise - linear).abs() / rise.abs().clamp(min=1e-6)).cpu()
        return Found(float(error.median()), {"loss increase, nats": float(rise.mean()), "linear": float(linear.mean())})

    def check_forward_pass(self) -> Found:
        """The same images twice, and in another batch."""
        half = self.images[: max(1, len(self.images) // 2)]
        with torch.no_grad():
            first, again, part = (self.net(batch).softmax(1) for batch in (self.images, self.images, half))
        self.forwards += 2 * len(self.images) + len(half)
        twice, other = float((first - again).abs().max()), float((first[: len(half)] - part).abs().max())
        return Found(max(twice, other), {"the same batch again": twice, "half of the batch": other})

    def check_deployed_file(self) -> Found:
        """The ONNX file on adversarial images, and attacks in bfloat16."""
        shares = {}
        if self.evidence.deployed is not None:
            adv = self.adversarial(self.net)
            with torch.no_grad():
                here = self.net(adv).argmax(1).cpu()
            shares["other class in the ONNX file"] = float(
                (self.evidence.deployed(adv).argmax(1) != here).double().mean()
            )
        if isinstance(self.net, Rounds) and computed_type("bfloat16", self.images.device) == "bfloat16":
            rounded = self.robust(20, dtype="bfloat16")
            shares["lost only in bfloat16"] = float((self.white_box & ~rounded).mean())
        return Found(max(shares.values()) if shares else None, shares)

    def check_own_network(self) -> Found:
        """The first attack of the selection, run again."""
        if self.evidence.own is None:
            return Found(None)
        attack, before = self.evidence.own
        again = self._outcomes(attack, self.threat.eps)
        return Found(
            float((again != before).mean()), {"in the row": float(before.mean()), "again": float(again.mean())}
        )

    def check_overfitting(self) -> Found:
        """A long attack against a single step, as in catastrophic overfitting."""
        one, many = float(self.robust(1).mean()), float(self.robust(100).mean())
        return Found(many / one if one else None, {"one step": one, "100 steps": many})
