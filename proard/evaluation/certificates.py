"""Results of CLEVER and of randomised smoothing, as the tables of a diagnosis read them; without torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ABSTAIN = -1


@dataclass(frozen=True)
class Clever:
    """CLEVER scores; arrays of shape (n,), each for the target class with the smallest radius.

    Attributes
    ----------
    radius : ndarray
        min over targets of margin / Lipschitz estimate, at most the sampled ball's radius; pixel units in the norm.
    margin : ndarray
        Logit of the predicted class minus logit of the target.
    lipschitz : ndarray
        Estimated largest dual norm of the margin's gradient in the ball, logits per pixel unit.
    fit_p : ndarray
        P value of the Kolmogorov-Smirnov test of the fit; with a small value the estimate is not reliable. NaN where
        all maxima were equal.
    """

    radius: NDArray[np.float64]
    margin: NDArray[np.float64]
    lipschitz: NDArray[np.float64]
    fit_p: NDArray[np.float64]


@dataclass(frozen=True)
class Certificate:
    """Result of randomised smoothing for one image.

    Attributes
    ----------
    label : int
        Class of the smoothed classifier, or `ABSTAIN`.
    radius : float
        l2 radius in pixel units inside which the class is the same, with probability 1 - alpha over the noise drawn;
        0 where it abstains.
    share_low : float
        Lower confidence bound of the share of the class under noise.
    """

    label: int
    radius: float
    share_low: float
