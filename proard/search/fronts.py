"""Non-dominated rows and their hypervolume on a fixed scale. All objectives are minimised."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pymoo.indicators.hv import HV
from pymoo.util.nds.non_dominated_sorting import find_non_dominated


@dataclass(frozen=True)
class Scale:
    """The values of each objective that are normalised to 0 and to 1, and the reference point on that scale.

    Attributes
    ----------
    best, worst : tuple of float
        Smallest and largest value of each objective.
    reference : float
        Every objective of the reference point, after normalisation: 1.1 is 10 % of the span beyond the largest value,
        so that the ends of a front count.
    """

    best: tuple[float, ...]
    worst: tuple[float, ...]
    reference: float = 1.1

    @classmethod
    def of(cls, objectives: np.ndarray) -> Scale:
        """The scale from the smallest to the largest values of rows of shape (n, objectives)."""
        return cls(tuple(objectives.min(axis=0).tolist()), tuple(objectives.max(axis=0).tolist()))

    def normalise(self, objectives: np.ndarray) -> np.ndarray:
        """Objectives with best at 0 and worst at 1; an objective without spread is 0."""
        span = np.subtract(self.worst, self.best)
        return (objectives - np.asarray(self.best)) / np.where(span > 0, span, 1.0)


def non_dominated(objectives: np.ndarray) -> np.ndarray:
    """Indices of rows that no other row dominates: is as small in every objective, and smaller in one."""
    return find_non_dominated(np.asarray(objectives, dtype=np.float64))


def hypervolume(objectives: np.ndarray, scale: Scale) -> float:
    """Volume that rows of shape (n, objectives) dominate, as a share of a box.

    The box reaches, in every objective, from the scale's smallest value to the reference point, which lies 10 % of the
    span beyond its largest value. The share thus depends on the rows that span the scale; only shares of one scale
    compare.
    """
    if not len(objectives):
        return 0.0
    volume = HV(ref_point=np.full(objectives.shape[1], scale.reference))(scale.normalise(objectives))
    return float(volume / scale.reference ** objectives.shape[1])
