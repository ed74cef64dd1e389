"""A switch that leaves kernels of our own to their plain twins: for comparisons, and where a kernel fails its proof."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

KINDS = ("fused", "maps", "depthwise")  # Triton's on a GPU; batch norm and depthwise gradients in C
_left_out: set[str] = set()  # of the whole process: backward passes run in threads of their own


@contextmanager
def plain_twins(*kinds: str) -> Iterator[None]:
    """Context in which the plain twins run instead of these kinds of kernels, or of all."""
    added = set(kinds or KINDS) - _left_out
    _left_out.update(added)
    try:
        yield
    finally:
        _left_out.difference_update(added)


def in_use(kind: str) -> bool:
    """Whether kernels of this kind may run."""
    return kind not in _left_out
