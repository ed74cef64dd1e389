"""Kernels of our own with plain twins: for a GPU fused steps and captured loops, for a CPU batch norm in C."""

from proard.kernels.captured import CapturedSteps
from proard.kernels.dispatch import pgd_update_, softmax_difference
from proard.kernels.maps import mask_gradient_, norm_activation

__all__ = ["CapturedSteps", "mask_gradient_", "norm_activation", "pgd_update_", "softmax_difference"]
