"""NSGA-II and random search over genotypes, exact enumeration, and the hypervolume by which they are compared."""

from proard.search.evaluations import Archive, Cost
from proard.search.exhaustive import Exhaustive, exhaustive
from proard.search.fronts import Scale, hypervolume, non_dominated
from proard.search.history import HISTORY, history
from proard.search.nsga2 import nsga2
from proard.search.uniform import random

__all__ = [
    "HISTORY",
    "Archive",
    "Cost",
    "Exhaustive",
    "Scale",
    "exhaustive",
    "history",
    "hypervolume",
    "non_dominated",
    "nsga2",
    "random",
]
