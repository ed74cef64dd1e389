"""What training, measurement and export want of a space and of its networks, be there one network or many."""

from __future__ import annotations

from typing import Any, Protocol

from proard.space.spec import FixedSpec, NetSpec


class NetArch(Protocol):
    """One network of a space."""

    @property
    def arch_id(self) -> str:
        """Its name in tables."""

    def to_json(self) -> str:
        """Canonical JSON; equal networks give equal text."""


class NetSpace(Protocol):
    """A set of networks in one set of weights: a `SearchSpace`, or a `FixedSpace` of one network."""

    @property
    def settings(self) -> Any:
        """Its section of a config."""

    @property
    def largest(self) -> Any:
        """The arch of most multiply-accumulates."""

    @property
    def smallest(self) -> Any:
        """The arch of fewest multiply-accumulates."""

    def spec(self, arch: Any) -> NetSpec | FixedSpec:
        """Costs and shape of an arch; an arch of another space is a ValueError."""

    def genotype(self, arch: Any) -> Any:
        """The arch as integers, one index per choice."""

    def read_arch(self, text: str) -> NetArch:
        """The arch whose JSON this is."""
