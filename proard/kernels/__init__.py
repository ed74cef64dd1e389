"""What a GPU is given instead of many small launches: fused kernels and captured loops; plain twins elsewhere."""

from proard.kernels.captured import CapturedSteps
from proard.kernels.dispatch import pgd_update_, softmax_difference

__all__ = ["CapturedSteps", "pgd_update_", "softmax_difference"]
