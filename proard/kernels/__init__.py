"""Own kernels with reference implementations: in Triton and as captured loops on a GPU, in C on a CPU."""

from proard.kernels.captured import CapturedCalls, CapturedSteps
from proard.kernels.convolution import Conv2d, convolution, every
from proard.kernels.depthwise import depthwise_convolution
from proard.kernels.dispatch import pgd_update_, softmax_difference
from proard.kernels.epilogues import convolve_activate, gradient_slope
from proard.kernels.maps import slope_
from proard.kernels.noise import KeyedNoise
from proard.kernels.norm import norm_activation
from proard.kernels.switch import plain_twins
from proard.kernels.types import computed_type, has_bfloat16, one_pass
from proard.kernels.winograd import Winograd

__all__ = [
    "CapturedCalls",
    "CapturedSteps",
    "Conv2d",
    "KeyedNoise",
    "Winograd",
    "computed_type",
    "convolution",
    "convolve_activate",
    "depthwise_convolution",
    "every",
    "gradient_slope",
    "has_bfloat16",
    "norm_activation",
    "one_pass",
    "pgd_update_",
    "plain_twins",
    "slope_",
    "softmax_difference",
]
