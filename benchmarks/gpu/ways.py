"""Ways of a GPU to convolve, add a bias and a map and apply ReLU, for the choices in `proard.kernels`.

A convolution of the library followed by one pass (`fused_maps`); for 1x1 filters a matrix product with all of it in
its epilogue (`fused_product`); cuDNN's convolution with an epilogue. A way that takes long at its first call for a
shape is of no use for a supernet, whose subnets have many shapes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.kernels.cudnn import CudnnEpilogues
from proard.kernels.dispatch import Fused

BATCH = 256
# (in, out, kernel, side): the ends and middles of bottlenecks of the published ResNet space
SHAPES = ((256, 64, 1, 32), (64, 256, 1, 32), (512, 128, 1, 16), (256, 1024, 1, 8), (64, 64, 3, 32), (128, 128, 3, 16))
FIRST = 0.1  # seconds that a first call for a shape may take
REPEATS, CALLS = 5, 10


class Layer(NamedTuple):
    """A convolution's tensors."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    side: Tensor


Way = Callable[[Layer], Tensor | None]


@dataclass(frozen=True)
class Times:
    """Seconds of a way for all its layers, of a convolution and a pass for the same ones, of a first call.

    `able`: it computes all of them.
    """

    own: float
    usual: float
    first: float
    able: bool

    @property
    def pays(self) -> bool:
        """Whether it is faster, and soon ready."""
        return self.able and self.first <= FIRST and self.own < self.usual


def times(
    fused: Fused, library: CudnnEpilogues, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Times]:
    """Times of `product` and `cudnn`."""
    layers = [layer(*shape, device) for shape in SHAPES]

    def product(of: Layer) -> Tensor:
        return fused.product.product(of.x, of.weight[:, :, 0, 0], bias=of.bias, side=of.side, activation="relu")

    def cudnn(of: Layer) -> Tensor | None:
        return library.convolve_relu(of.x, of.weight, of.bias, stride=1, side=of.side)

    def usual(of: Layer) -> Tensor:
        out = F.conv2d(of.x, of.weight, None, padding=of.weight.shape[-1] // 2)
        return fused.maps.finish_(out, of.bias, of.side, "relu")

    found = {}
    for way, pointwise in ((product, True), (cudnn, False)):
        among = [each for each in layers if (each.weight.shape[-1] == 1) == pointwise]
        first = [seconds(partial(way, each), device, clock, calls=1) for each in among]
        able = all(way(each) is not None for each in among)
        own, other = (total(each, among, device, clock) if able else 0.0 for each in (way, usual))
        found[way.__name__] = Times(own, other, statistics.median(first), able)
    return found


def layer(inputs: int, outputs: int, kernel: int, size: int, device: torch.device) -> Layer:
    """Random tensors, bfloat16, channels last."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).bfloat16().contiguous(memory_format=torch.channels_last)

    bias = torch.randn(outputs, device=device).bfloat16()
    weight = draw(outputs, inputs, kernel, kernel) / (kernel * inputs**0.5)
    return Layer(draw(BATCH, inputs, size, size), weight, bias, draw(BATCH, outputs, size, size))


def total(way: Way, among: list[Layer], device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of one call for each layer, medians over repeats."""
    medians = []
    for each in among:
        call = partial(way, each)
        call()
        medians.append(statistics.median(seconds(call, device, clock, calls=CALLS) for _ in range(REPEATS)))
    return sum(medians) / CALLS


def seconds(call: Callable[[], object], device: torch.device, clock: Callable[[], float], *, calls: int) -> float:
    """Seconds of some calls, until the device has finished."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begun = clock()
    for _ in range(calls):
        call()
    wait()
    return clock() - begun
