"""The convolution of all networks: the library's, without the operator that is broken on some CPUs.

oneDNN's weight gradient of a 1x1 convolution of stride 2 over channels-last maps is wrong if there are fewer input
channels than its vector block (8 with AVX2). It gives wrong numbers, hangs, or damages the heap (measured with torch
2.14.1 and oneDNN 3.12). A strided 1x1 convolution reads only every second pixel; here these pixels are selected first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, groups: int = 1) -> Tensor:
    """Convolve maps, padded by half the kernel; on a CPU a strided 1x1 convolution runs at stride 1 on selected pixels.

    Parameters
    ----------
    x : Tensor of shape (batch, in, height, width)
    weight : Tensor of shape (out, in / groups, kernel, kernel)
    bias : Tensor of shape (out,), optional
    stride : int
        Stride in rows and columns.
    groups : int
        As in `torch.nn.functional.conv2d`.

    Returns
    -------
    Tensor of shape (batch, out, height', width')
        The library's result up to rounding. During an export the library's operator is recorded, so that the file
        contains one strided convolution.
    """
    kernel = weight.shape[-1]
    if kernel == 1 and stride > 1 and x.device.type == "cpu" and not torch.compiler.is_exporting():
        x, stride = every(stride, x), 1
    return F.conv2d(x, weight, bias, stride, kernel // 2, 1, groups)


def every(stride: int, x: Tensor) -> Tensor:
    """Every `stride`-th row and column of maps, as a copy in the same memory layout."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return x[:, :, ::stride, ::stride].contiguous(memory_format=layout)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` computed by `convolution`: odd kernel, padded by half of it."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, h, w) to (batch, out, h', w')."""
        return convolution(x, self.weight, self.bias, stride=self.stride[0], groups=self.groups)
