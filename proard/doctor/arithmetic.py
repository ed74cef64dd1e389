"""Whether this machine computes right gradients, and in which types: `python -m proard.doctor.arithmetic`.

It runs in a separate process: a broken operator of torch may crash the process instead of giving a wrong number.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.attacks import pgd
from proard.config import PRESETS
from proard.kernels import has_bfloat16
from proard.kernels.compiled import maps_library
from proard.losses import CrossEntropy
from proard.nets import Supernet
from proard.nets.modules import present
from proard.nets.view import SubnetView
from proard.space import Arch, SearchSpace

ALIKE = 0.9999  # least cosine between gradients of two backends
NOISE = 1e-5  # a parameter's gradient shorter than this share of the whole gradient is rounding alone
SMALL = ("resnet_digits", "mobilenet_digits")


def lowest_cosine(space: SearchSpace, arch: Arch, *, batch: int, seed: int = 0) -> tuple[float, str]:
    """Compare all gradients of a training step with those of the backend without oneDNN, in float32.

    Both compute a clean and an adversarial pass of the subnet on equal images, labels and weights. The adversarial
    images come from the default backend: with others, the attack's sign would turn a rounding difference into a step.

    Parameters
    ----------
    space, arch
        The subnet.
    batch : int
        Number of random images.

    Returns
    -------
    float
        The lowest cosine over all parameters that have a gradient; NaN gradients count as -1.
    str
        The parameter.
    """
    generator = torch.Generator().manual_seed(seed)
    channels, side = space.settings.image_channels, space.settings.image_size
    net = Supernet(space, mean=[0.5] * channels, std=[0.25] * channels, generator=generator)
    images = torch.rand(batch, channels, side, side, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(space.settings.classes, (batch,), generator=generator)
    view = SubnetView(net, arch)
    attack: dict[str, Any] = {"eps": 8 / 255, "step_size": 4 / 255, "num_steps": 2, "generator": generator}
    record: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        view(images, record=record)
    adversarial = pgd(view.folded(record), CrossEntropy(labels), images, **attack)

    def gradients() -> dict[str, Tensor]:
        view = SubnetView(net, arch)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        loss = F.cross_entropy(view(images), labels) + F.cross_entropy(view(adversarial), labels)
        loss.backward()
        view.scatter_gradients()
        return {name: present(parameter.grad).double() for name, parameter in net.named_parameters()}

    found = gradients()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the switch reads a setting that is deprecated
        with torch.backends.mkldnn.flags(enabled=False):
            expected = gradients()
    noise = NOISE * float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    cosines = {name: _cosine(found[name], expected[name], noise) for name in found}
    name = min(cosines, key=cosines.__getitem__)
    return cosines[name], name


def _cosine(found: Tensor, expected: Tensor, noise: float) -> float:
    """Cosine of two gradients; 1 where both are shorter than `noise`, -1 where one is NaN.

    The gradient of a shift before a convolution with batch norm is rounding alone: batch norm removes the shift.
    """
    if float(expected.norm()) <= noise:
        return 1.0 if float(found.norm()) <= 2 * noise else -1.0
    cosine = float((found * expected).sum() / (found.norm() * expected.norm()))
    return cosine if cosine == cosine else -1.0


def middle(space: SearchSpace) -> Arch:
    """The arch of the middle choice in every gene."""
    return space.arch([options // 2 for options in space.choices])


def main() -> None:
    """Print the result as one line of JSON."""
    lowest, where = 1.0, ""
    for name in SMALL:
        space = SearchSpace(PRESETS[name])
        for arch in (space.smallest, space.largest):
            cosine, parameter = lowest_cosine(space, arch, batch=64)
            if cosine < lowest:
                lowest, where = cosine, f"{parameter} of {name}"
    facts = {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": has_bfloat16("cpu"),
        "compiled": maps_library() is not None,
        "right": lowest >= ALIKE,
        "cosine": lowest,
        "parameter": where,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
