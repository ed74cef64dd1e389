"""Convolutions of cuDNN that add a bias and a map and apply ReLU in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class CudnnEpilogues:
    """cuDNN's convolutions with bias, sum and ReLU in half precision, as far as it has an engine for their shapes.

    Parameters
    ----------
    library : module
        Has `cudnn_convolution_relu` and `cudnn_convolution_add_relu` with the arguments of torch's.
    """

    def __init__(self, library: Any = torch) -> None:
        self.library = library
        self.refused: set[tuple] = set()

    def convolve_relu(
        self, x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, side: Tensor | None
    ) -> Tensor | None:
        """relu(convolution + bias + side); None where cuDNN cannot: channels not a multiple of 8, or no engine."""
        if len(weight) % 8 or weight.shape[1] % 8:
            return None
        key = (x.device, x.dtype, tuple(x.shape), tuple(weight.shape), stride, side is None)
        if key in self.refused:
            return None
        shape = ([stride] * 2, [weight.shape[-1] // 2] * 2, [1, 1], 1)
        try:
            if side is None:
                return self.library.cudnn_convolution_relu(x, weight, bias, *shape)
            return self.library.cudnn_convolution_add_relu(x, weight, side, 1.0, bias, *shape)
        except RuntimeError:  # no engine for this shape: it is not tried again
            self.refused.add(key)
            return None


class NoEpilogues:
    """In place of `CudnnEpilogues` where these convolutions give wrong results or do not exist."""

    def convolve_relu(self, *given: Any, **how: Any) -> None:
        """Refuse every shape."""
