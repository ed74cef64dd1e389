"""Check of the fused kernels against their reference implementations: `python -m proard.kernels.prove DEVICE`.

It prints one line of JSON: whether cuDNN's convolutions with an epilogue may be used. If a kernel is wrong, it ends
with an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product as every_pair
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.kernels import plain
from proard.kernels.cudnn import CudnnEpilogues, NoEpilogues
from proard.kernels.dispatch import Fused, all_fused
from proard.kernels.maps import SLOPES
from proard.kernels.noise import plain_uniform
from proard.kernels.norm import JOINED, PLAIN, plain_norm_activation

# Whether cuDNN's convolutions with an epilogue are used where they are right. No GPU has shown yet that they are
# faster, and cuDNN may compile an engine for every shape (`make bench-gpu`, ways to convolve).
LIBRARY = False
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of a result, over its largest number
Shape = tuple[int, int, int, int]
FINE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8}
# Every type and activation is another program, which takes half a second to compile. This check runs one of each
# kernel, `make bench-gpu` all of them.
TYPES, ACTIVATION = (torch.bfloat16,), ("relu",)
# Of maps: odd sides, channel counts that fill no tile, several tiles of rows and of channels.
SHAPES: tuple[Shape, ...] = ((1, 8, 19, 19), (3, 24, 7, 5), (64, 88, 16, 16))
CHANNELS = ((8, 24), (64, 64), (88, 264), (264, 88), (512, 128))  # in and out of products and convolutions
BATCHES = ((1, 10), (64, 10))  # images and classes


class Case(NamedTuple):
    """Results beside their references, and how far they may differ by type."""

    name: str
    results: Sequence[Tensor]
    references: Sequence[Tensor]
    rounding: Mapping[torch.dtype, float] = ROUNDING


def main(device: torch.device) -> None:
    """Check all kernels on a device."""
    fused = all_fused(NoEpilogues())
    for check in CHECKS.values():
        require(check(fused, device))
    print(json.dumps({"cudnn": LIBRARY and works(CudnnEpilogues(), device)}))


def differences(cases: Iterator[Case]) -> Iterator[tuple[str, float, float]]:
    """Of every case its name, the largest difference of a result, and its limit: rounding.

    Both are in units of the reference's largest number, if that is above 1.
    """
    torch.manual_seed(0)
    for case in cases:
        for result, reference in zip(case.results, case.references, strict=True):
            largest = max(float(reference.abs().max()), 1.0)
            difference = float((result.double() - reference.double()).abs().max()) / largest
            yield case.name, difference, case.rounding[result.dtype]


def require(cases: Iterator[Case]) -> None:
    """Compare results with their references.

    Raises
    ------
    RuntimeError
        They differ by more than rounding.
    """
    for name, difference, limit in differences(cases):
        if not difference <= limit:
            raise RuntimeError(f"{name} differs from its reference by {difference:.2g}")


def draw(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers, channels last where they are maps or filters."""
    numbers = torch.randn(*shape, device=device).to(dtype)
    return numbers.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else numbers


def updates(fused: Fused, device: torch.device, shapes: Sequence[Shape] = SHAPES) -> Iterator[Case]:
    """The attack's update of images in both memory layouts."""
    for shape, layout in every_pair(shapes, (torch.channels_last, torch.contiguous_format)):
        adv, gradient = (draw(shape, torch.float32, device).contiguous(memory_format=layout) for _ in range(2))
        low, high = adv - 0.03, adv + 0.03
        if not fused.steps.fits(adv, gradient, low, high):
            raise RuntimeError(f"the fused update does not take images of shape {shape}")
        twins = (fused.steps, plain)
        moved = [twin.pgd_update_(adv.clone(), gradient.clone(), low, high, step_size=2 / 255) for twin in twins]
        yield Case(f"pgd_update_ {shape} {layout}", moved[:1], moved[1:], {torch.float32: 0.0})


def logit_gradients(
    fused: Fused,
    device: torch.device,
    types: Sequence[torch.dtype] = TYPES,
    batches: Sequence[tuple[int, int]] = BATCHES,
) -> Iterator[Case]:
    """The gradient of cross-entropy and divergence with respect to the logits."""
    for (images, classes), dtype in every_pair(batches, types):
        logits, labels = 10 * draw((images, classes), dtype, device), torch.arange(images, device=device) % classes
        for target in (labels, logits.float().flip(1).softmax(1)):
            found = [twin.softmax_difference(logits, target) for twin in (fused.steps, plain)]
            yield Case(f"softmax_difference {(images, classes)} {dtype}", found[:1], found[1:], FINE)


def noise(fused: Fused, device: torch.device, shapes: Sequence[Shape] = SHAPES) -> Iterator[Case]:
    """Random numbers by counter, equal bit for bit."""
    for shape, key in every_pair(shapes, (5, 2**62 + 12345)):
        given = (shape, key, 7, 1, device)
        found = [fused.steps.philox_uniform(*given), plain_uniform(*given)]
        yield Case(f"philox_uniform {shape}", found[:1], found[1:], {torch.float32: 0.0})


def passes(
    fused: Fused,
    device: torch.device,
    types: Sequence[torch.dtype] = TYPES,
    shapes: Sequence[Shape] = SHAPES,
    kinds: Sequence[str] = ACTIVATION,
) -> Iterator[Case]:
    """Bias, sum and activation of a map; sum and slope of its gradient."""
    for shape, dtype, kind in every_pair(shapes, types, kinds):
        x, side, before = (draw(shape, dtype, device) for _ in range(3))
        before.masked_fill_(before.abs() == 3, 0.5)  # there versions of torch differ about hard-swish's slope
        bias = draw(shape[1:2], dtype, device)
        wanted = PLAIN[kind](x.double() + bias.double()[:, None, None] + side.double())
        yield Case(f"finish_ {kind} {shape} {dtype}", [fused.maps.finish_(x.clone(), bias, side, kind)], [wanted])
        slope = x.double() + side.double()
        slope = slope if kind == "none" else SLOPES[kind](slope, before.double())
        yield Case(f"slope_ {kind} {shape} {dtype}", [fused.maps.slope_(x.clone(), before, side, kind)], [slope])


def norms(
    fused: Fused,
    device: torch.device,
    types: Sequence[torch.dtype] = TYPES,
    shapes: Sequence[Shape] = SHAPES,
    kinds: Sequence[str] = ACTIVATION,
) -> Iterator[Case]:
    """Batch norm with activation, with and without a sum, in both directions."""
    for shape, dtype, kind, joins in every_pair(shapes, types, kinds, (False, True)):
        if joins and kind not in JOINED:
            continue
        x, dy, side = (draw(shape, dtype, device) for _ in range(3))
        scale, shift = (draw(shape[1:2], torch.float32, device) for _ in range(2))
        given = (x, scale, shift, 1e-5, kind)
        y, mean, var = fused.norms.norm_forward(*given, side if joins else None)
        leaves = [each.double().requires_grad_() for each in (x, scale, shift, side)]
        joined = leaves[3] if joins else None
        references = plain_norm_activation(leaves[0], leaves[1], leaves[2], eps=1e-5, activation=kind, side=joined)
        used = leaves if joins else leaves[:3]
        # Where the activation's input is about 0, rounding decides about its slope: such pixels get no gradient.
        clear = dy if kind == "none" else dy * (y.abs() > 0.05)
        found = fused.norms.norm_backward(clear, x, scale, shift, mean, var, 1e-5, kind, y if joins else None)
        gradients = torch.autograd.grad(references[0], used, clear.double())
        name = f"norm {kind} {shape} {dtype}" + " with a sum" * joins
        yield Case(name, [y, mean, var], [each.detach() for each in references])
        yield Case(f"gradient of {name}", [each for each in found if each is not None], gradients)


def products(
    fused: Fused,
    device: torch.device,
    channels: Sequence[tuple[int, int]] = CHANNELS,
    sizes: Sequence[tuple[int, int, int]] = ((5, 7, 5), (16, 16, 16)),
) -> Iterator[Case]:
    """1x1 convolutions with all that can follow them, and their input gradients; sizes are (batch, height, width)."""
    for (inputs, outputs), dtype in every_pair(channels, fused.types[:1]):
        for images, *size in sizes:
            shape = (images, inputs, *size)
            x, weight = draw(shape, dtype, device), draw((outputs, inputs, 1, 1), dtype, device) / inputs**0.5
            bias, side = draw((outputs,), dtype, device), draw((shape[0], outputs, *shape[2:]), dtype, device)
            plain_sum = F.conv2d(x.double(), weight.double(), bias.double()) + side.double()
            filters = weight[:, :, 0, 0]
            own = fused.product.product(x, filters, bias=bias, side=side, activation="relu")
            yield Case(f"product {inputs} to {outputs}", [own], [plain_sum.relu()])
            slope = F.conv2d(side.double(), weight.double().transpose(0, 1)) + x.double()
            own = fused.product.product(side, filters.t(), side=x, before=x, slope="relu")
            yield Case(f"its gradient {outputs} to {inputs}", [own], [slope * (x > 0)])


def works(library: CudnnEpilogues, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the library's convolutions with an epilogue are right, in memory that holds no numbers before.

    A convolution without a sum must not read its result's memory.
    """
    try:
        for (inputs, outputs), stride, joins in every_pair(CHANNELS, (1, 2), (False, True)):
            x, weight = draw((4, inputs, 16, 16), dtype, device), draw((outputs, inputs, 3, 3), dtype, device)
            weight, bias = weight / (3 * inputs**0.5), draw((outputs,), dtype, device)
            wanted = F.conv2d(x.double(), weight.double(), bias.double(), stride, 1)
            side = draw(tuple(wanted.shape), dtype, device) if joins else None
            wanted = (wanted if side is None else wanted + side.double()).relu()
            spoiled = [torch.full_like(wanted, torch.nan).to(dtype) for _ in range(8)]
            del spoiled
            found = library.convolve_relu(x, weight, bias, stride=stride, side=side)
            if found is not None:
                require(iter([Case("convolution", [found], [wanted])]))
    except (RuntimeError, AttributeError) as error:
        print(f"cuDNN's convolutions with an epilogue are not used: {error}", file=sys.stderr)
        return False
    return True


CHECKS: dict[str, Callable[..., Iterator[Case]]] = {
    "updates": updates,
    "logit gradients": logit_gradients,
    "noise": noise,
    "passes": passes,
    "batch norm": norms,
    "products": products,
}

if __name__ == "__main__":
    main(torch.device(sys.argv[1]))
