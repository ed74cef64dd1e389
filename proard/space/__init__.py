"""Search spaces: archs, genotypes, features and exact costs. NumPy only."""

from proard.space.arch import Arch
from proard.space.cost import Budget, parse_budget
from proard.space.resnet import SearchSpace
from proard.space.spec import BlockSpec, ConvSpec, NetSpec

__all__ = ["Arch", "BlockSpec", "Budget", "ConvSpec", "NetSpec", "SearchSpace", "parse_budget"]
