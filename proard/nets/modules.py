"""Helpers for static types: module dictionaries of one type, and values that are not None."""

from __future__ import annotations

from collections.abc import ItemsView, ValuesView
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import Tensor, nn

Kind = TypeVar("Kind", bound=nn.Module)
Value = TypeVar("Value")


class ModulesOf(nn.ModuleDict, Generic[Kind]):
    """A `ModuleDict` whose entries are of one type."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> Kind:
            """The module of that name."""

        def values(self) -> ValuesView[Kind]:
            """All modules."""

        def items(self) -> ItemsView[str, Kind]:
            """All names with their modules."""


def present(value: Value | None) -> Value:
    """The value (a bias, a gradient, a batch norm), which must not be None."""
    assert value is not None
    return value


def statistics_of(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Running mean and variance, which every batch norm of the package keeps."""
    return present(norm.running_mean), present(norm.running_var)
