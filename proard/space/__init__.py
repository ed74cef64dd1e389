"""Search spaces: archs, genotypes, features and exact costs. NumPy only."""

from proard.config.budgets import Budget, human_cost, parse_budget
from proard.space.arch import DIMS, Arch
from proard.space.fixed import FixedArch, FixedSpace, read_space, space_of
from proard.space.latency import LatencyTable, read_device
from proard.space.parts import Part
from proard.space.protocols import NetArch, NetSpace
from proard.space.search_space import SearchSpace
from proard.space.spec import Activation, BlockSpec, ConvSpec, FixedSpec, GateSpec, NetSpec, PoolSpec, Step, key_of
from proard.space.work import Tally, Work, one_pass

__all__ = [
    "DIMS",
    "Activation",
    "Arch",
    "BlockSpec",
    "Budget",
    "ConvSpec",
    "FixedArch",
    "FixedSpace",
    "FixedSpec",
    "GateSpec",
    "LatencyTable",
    "NetArch",
    "NetSpace",
    "NetSpec",
    "Part",
    "PoolSpec",
    "SearchSpace",
    "Step",
    "Tally",
    "Work",
    "human_cost",
    "key_of",
    "one_pass",
    "parse_budget",
    "read_device",
    "read_space",
    "space_of",
]
