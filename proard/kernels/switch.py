"""Switch from own kernels to reference implementations: for comparisons, and for kernels that fail their check."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# On a GPU: all Triton kernels; of them the input gradient without autograd, batch norm, and products for 1x1
# convolutions; padded channels. On a CPU, in C: batch norm, depthwise gradients, 3x3 convolutions of attacks.
KINDS = ("fused", "gradients", "norms", "products", "padding", "maps", "depthwise", "winograd")
_left_out: set[str] = set()  # for the whole process, because backward passes run in other threads
_on_cpu: list[Any] = []


@contextmanager
def plain_twins(*kinds: str) -> Iterator[None]:
    """Context in which the reference implementations run instead of kernels of these kinds, or of all kinds."""
    added = set(kinds or KINDS) - _left_out
    _left_out.update(added)
    try:
        yield
    finally:
        _left_out.difference_update(added)


@contextmanager
def fused_on_cpu(kernels: Any) -> Iterator[None]:
    """Context in which these fused kernels run on the CPU: through Triton's interpreter, in tests."""
    _on_cpu.append(kernels)
    try:
        yield
    finally:
        _on_cpu.pop()


def cpu_kernels() -> Any:
    """The fused kernels that `fused_on_cpu` names; None outside of it."""
    return _on_cpu[-1] if _on_cpu else None


def in_use(kind: str) -> bool:
    """Whether kernels of this kind may run."""
    return kind not in _left_out
