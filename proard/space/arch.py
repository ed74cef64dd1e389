"""One choice for every elastic dim."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """A subnet's choices, in canonical form: blocks that depth leaves out have `expand` 0.

    Attributes
    ----------
    depth : tuple of int
        Blocks beyond each unit's least number; in a space with a deep stem, the stem's entry comes first.
    width : tuple of float
        Width multipliers: stem (middle and out of a deep stem), then one per unit.
    expand : tuple of float
        Inner width over output width of every block, unit by unit; 0 where the block is left out.
    """

    depth: tuple[int, ...]
    width: tuple[float, ...]
    expand: tuple[float, ...]

    def to_json(self) -> str:
        """Canonical JSON; equal archs give equal text."""
        return json.dumps(
            {"depth": self.depth, "width": self.width, "expand": self.expand}, sort_keys=True, separators=(",", ":")
        )

    @classmethod
    def from_json(cls, text: str) -> Arch:
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        return cls(
            tuple(int(value) for value in fields["depth"]),
            tuple(float(value) for value in fields["width"]),
            tuple(float(value) for value in fields["expand"]),
        )

    @property
    def arch_id(self) -> str:
        """Twelve hexadecimal digits that name this arch in tables, caches and file names."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]
