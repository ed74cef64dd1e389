"""An arch: one choice for every elastic dim."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DIMS = {"depth": int, "width": float, "expand": float, "kernel": int}


@dataclass(frozen=True)
class Arch:
    """The choices of a subnet, in canonical form: blocks removed by `depth` have `expand` and `kernel` 0.

    Attributes
    ----------
    depth : tuple of int
        Blocks beyond each unit's minimum number; in a space with a deep stem, the stem's entry comes first.
    width : tuple of float
        Width multipliers: stem (middle and out of a deep stem), then one per unit.
    expand : tuple of float
        Inner width of every block divided by its output width (MobileNets: input width), unit by unit; 0 for removed
        blocks.
    kernel : tuple of int
        Side of every block's depthwise convolution, unit by unit; empty in spaces without elastic kernels.
    """

    depth: tuple[int, ...]
    width: tuple[float, ...]
    expand: tuple[float, ...]
    kernel: tuple[int, ...] = ()

    def to_json(self) -> str:
        """Canonical JSON; equal archs give equal text."""
        dims = {dim: getattr(self, dim) for dim in DIMS if dim != "kernel" or self.kernel}
        return json.dumps(dims, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Arch:
        """Read the result of `to_json`."""
        return cls.from_dims(json.loads(text))

    @classmethod
    def from_dims(cls, dims: Mapping[str, Sequence[float]]) -> Arch:
        """The arch with these dims; `kernel` is optional."""
        return cls(**{dim: tuple(DIMS[dim](value) for value in values) for dim, values in dims.items()})

    @property
    def arch_id(self) -> str:
        """Twelve hexadecimal digits that identify this arch in tables, caches and file names."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]
