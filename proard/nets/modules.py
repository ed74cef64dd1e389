"""What torch's types leave open: the type of modules by name, and that what may be None is there."""

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
    """A bias, a gradient or a batch norm that is there."""
    assert value is not None
    return value


def statistics_of(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Running mean and variance, which every batch norm of the package keeps."""
    return present(norm.running_mean), present(norm.running_var)
