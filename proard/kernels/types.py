"""The type in which a network computes: bfloat16 only if the device has instructions for it."""

from __future__ import annotations

import platform
from functools import cache

import torch

PLAIN = "float32"


@cache
def one_pass(dtype: torch.dtype) -> bool:
    """Whether oneDNN can convolve with an epilogue in this type on this CPU; tried once per process."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight, bias = torch.ones(1, 1, 1, 1, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype), torch.ones(1).to(dtype)
    shape = ([0, 0], [1, 1], [1, 1], 1)
    try:
        torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *shape, "relu", [], "")
    except (RuntimeError, AttributeError):  # no such instructions in the processor, or no such operator in the build
        return False
    return True


@cache
def has_bfloat16(kind: str) -> bool:
    """Whether devices of this kind (`cpu`, `cuda`) compute bfloat16 natively.

    An x86 CPU without AVX-512 BF16 or AMX emulates it: an attack then takes 2 to 7 times as long as in float32, a
    training pass 2 to 16 times (measured on resnet_micro, one thread, AVX2 and AVX-512).
    """
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu" or not one_pass(torch.bfloat16):
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


def computed_type(name: str, device: torch.device | str) -> str:
    """The type of a network's computations if `name` is requested; prints one line if the two differ.

    Parameters
    ----------
    name : {'float32', 'bfloat16'}
        Type in the settings.
    device : torch.device or str
        Device of the network.
    """
    kind = torch.device(device).type
    if name != "bfloat16" or has_bfloat16(kind):
        return name
    _explain(kind)
    return PLAIN


@cache
def _explain(kind: str) -> None:
    """Print, once per process, that float32 replaces bfloat16."""
    what = "this CPU" if kind == "cpu" else "this device"
    print(
        f"bfloat16 is asked for, but {what} only emulates it: float32 is used, which is faster here "
        "(a device with bfloat16 takes about half that time); tables record float32",
        flush=True,
    )
