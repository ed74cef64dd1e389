"""Interface of spaces and networks for training, measurement and export, with one network or many."""

from __future__ import annotations

from typing import Any, Protocol

from proard.space.spec import FixedSpec, NetSpec


class NetArch(Protocol):
    """One network of a space."""

    @property
    def arch_id(self) -> str:
        """Identifier of the network in tables."""

    def to_json(self) -> str:
        """Canonical JSON; equal networks give equal text."""


class NetSpace(Protocol):
    """A set of networks that share weights: a `SearchSpace`, or a `FixedSpace` of one network."""

    @property
    def settings(self) -> Any:
        """The settings of the space in a config."""

    @property
    def largest(self) -> Any:
        """The arch with the most multiply-accumulates."""

    @property
    def smallest(self) -> Any:
        """The arch of fewest multiply-accumulates."""

    def spec(self, arch: Any) -> NetSpec | FixedSpec:
        """Costs and shape of an arch; an arch of another space is a ValueError."""

    def genotype(self, arch: Any) -> Any:
        """The arch as integers, one index per choice."""

    def read_arch(self, text: str) -> NetArch:
        """The arch described by this JSON."""
