"""Own kernels with reference implementations: on a GPU fused steps and captured loops, on a CPU batch norm in C."""

from proard.kernels.captured import CapturedSteps
from proard.kernels.convolution import Conv2d, convolution, every
from proard.kernels.depthwise import depthwise_convolution
from proard.kernels.dispatch import pgd_update_, softmax_difference
from proard.kernels.maps import mask_gradient_, norm_activation
from proard.kernels.switch import plain_twins
from proard.kernels.types import computed_type, has_bfloat16, one_pass

__all__ = [
    "CapturedSteps",
    "Conv2d",
    "computed_type",
    "convolution",
    "depthwise_convolution",
    "every",
    "has_bfloat16",
    "mask_gradient_",
    "norm_activation",
    "one_pass",
    "pgd_update_",
    "plain_twins",
    "softmax_difference",
]
