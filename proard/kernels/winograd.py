"""3x3 convolutions of an attack by Winograd's method, on CPUs that multiply at most eight floats at once.

There the library's direct convolution is limited by the number of multiplications, and F(4x4, 3x3) needs a quarter of
them. Where AVX-512 multiplies sixteen at once, the library is as fast, and nothing here is used.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.kernels.compiled import processor, winograd_library
from proard.kernels.dispatch import fused_for
from proard.kernels.maps import slope_
from proard.kernels.switch import in_use

LANES, FEWEST = 8, 16  # channels are a multiple of the first and not below the second
TILE = 4  # rows and columns of outputs computed together, with 36 products
ACTIVATIONS = ("none", "relu")
LAYOUT = torch.channels_last


def multiplies_eight() -> bool:
    """Whether the CPU multiplies at most eight floats at once: with AVX2, and with AVX-512 on AMD's Zen 4.

    Zen 4 (family 25) executes an instruction on sixteen floats in two halves. Measured there, float32, largest subnet
    of resnet_micro: logits 1.8 times, input gradients 1.7 times as fast as by the library.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    return capability == "AVX2" or (capability == "AVX512" and zen4())


@functools.cache
def zen4() -> bool:
    """Whether this is an AMD processor of family 25; among those, only Zen 4 has AVX-512."""
    fields = dict(line.split("\t: ", 1) for line in processor().decode().splitlines() if "\t: " in line)
    fields = {name.strip(): value for name, value in fields.items()}
    return (fields.get("vendor_id"), fields.get("cpu family")) == ("AuthenticAMD", "25")


class Winograd:
    """A dense 3x3 convolution of stride 1, padded by one, and its input gradient.

    Parameters
    ----------
    weight : Tensor of shape (out, in, 3, 3)
        float32 on the CPU, valid for `suits`. Its transforms are computed here, once, and later changes have no effect.

    Notes
    -----
    Results are float32 with errors about ten times those of a direct convolution: up to 5e-5 for values of unit
    variance, measured against float64. They depend neither on the number of threads nor on the rest of the batch.

    References
    ----------
    Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, arXiv:1509.09308.
    """

    def __init__(self, weight: Tensor) -> None:
        out, into, down, across = weight.stride()
        last = weight.data_ptr() + 2 * (down + across) * weight.element_size()  # tap (2, 2)
        self.ins, self.outs = weight.shape[1], weight.shape[0]
        self.filters = _transformed(weight.data_ptr(), (out, into, down, across), self.ins, self.outs)
        self.turned = _transformed(last, (into, out, -down, -across), self.outs, self.ins)

    @staticmethod
    def suits(weight: Tensor, size: int) -> bool:
        """Whether it computes a convolution with these filters to maps of `size` rows and columns, and is faster.

        A tile has as many products as four outputs of a direct convolution, at any size of the map.
        """
        outs, ins, *kernel = weight.shape
        return (
            weight.device.type == "cpu"
            and weight.dtype is torch.float32
            and kernel == [3, 3]
            and min(outs, ins) >= FEWEST
            and outs % LANES == ins % LANES == 0
            and 2 * 4 * (-(-size // TILE)) ** 2 <= size**2
            and in_use("winograd")
            and fused_for(weight.device) is None
            and multiplies_eight()
            and winograd_library() is not None
        )

    def convolve(self, x: Tensor, bias: Tensor, *, side: Tensor | None = None, activation: str = "none") -> Tensor:
        """Convolution plus a bias per channel and a map, activated; `plain_convolve` in one pass.

        Parameters
        ----------
        x : Tensor of shape (batch, in, height, width)
        bias : Tensor of shape (out,)
        side : Tensor of the shape of the result, optional
            Added before the activation.
        activation : {'none', 'relu'}
            One of `ACTIVATIONS`.

        Returns
        -------
        Tensor of shape (batch, out, height, width)
            channels_last.
        """
        return _convolved(x, self.filters, self.outs, bias=bias, side=side, relu=activation == "relu")

    def input_gradient(
        self, gradient: Tensor, *, before: Tensor | None = None, activation: str = "none", side: Tensor | None = None
    ) -> Tensor:
        """Gradient with respect to the input, plus a map, times an activation's slope, as `gradient_slope`'s.

        Parameters
        ----------
        gradient : Tensor of shape (batch, out, height, width)
            With respect to the convolution's result.
        before : Tensor of shape (batch, in, height, width), optional
            Where the slope of `activation` is taken.
        side : Tensor of the shape of `before`, optional
            Added before the multiplication by the slope.
        """
        mask = before if activation == "relu" else None
        out = _convolved(gradient, self.turned, self.ins, side=side, mask=mask)
        return slope_(out, before, activation=activation) if mask is None else out


def plain_convolve(
    x: Tensor, weight: Tensor, bias: Tensor, *, side: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """Reference implementation of `Winograd.convolve` by library calls, for any type."""
    out = F.conv2d(x, weight, bias, padding=1)
    out = out if side is None else out + side
    return F.relu(out) if activation == "relu" else out


def _transformed(origin: int, strides: tuple[int, ...], ins: int, outs: int) -> Tensor:
    """Transformed filters, in the order in which the kernel reads them."""
    filters = torch.empty((TILE + 2) ** 2 * outs * ins)
    _library().winograd_filters(origin, *strides, ins, outs, filters.data_ptr())
    return filters


def _convolved(
    x: Tensor,
    filters: Tensor,
    outs: int,
    *,
    bias: Tensor | None = None,
    side: Tensor | None = None,
    mask: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Convolution by transformed filters; zero where `mask` is not positive."""
    count, ins, height, width = x.shape
    x = x.contiguous(memory_format=LAYOUT)
    side, mask = (None if each is None else each.contiguous(memory_format=LAYOUT) for each in (side, mask))
    out = torch.empty((count, outs, height, width), memory_format=LAYOUT)
    places = (None if each is None else each.data_ptr() for each in (x, filters, bias, side, mask, out))
    failed = _library().winograd_convolve(*places, count, height, width, ins, outs, relu, torch.get_num_threads())
    if failed:
        raise MemoryError("Winograd's convolution found no memory")
    return out


def _library() -> ctypes.CDLL:
    """The compiled kernels, after `Winograd.suits`."""
    library = winograd_library()
    assert library is not None
    return library
