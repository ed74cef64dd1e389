"""Kernels of our own with plain twins: for a GPU fused steps and captured loops, for a CPU batch norm in C."""

from proard.kernels.captured import CapturedSteps
from proard.kernels.depthwise import depthwise_convolution
from proard.kernels.dispatch import pgd_update_, softmax_difference
from proard.kernels.maps import mask_gradient_, norm_activation

__all__ = [
    "CapturedSteps",
    "depthwise_convolution",
    "mask_gradient_",
    "norm_activation",
    "pgd_update_",
    "softmax_difference",
]
