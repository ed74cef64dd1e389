"""Work of a computation: passes of images through networks, weighted by their multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Counted passes of images through networks; sums and multiples are also `Work`.

    Attributes
    ----------
    forwards : float
        Image forward-equivalents: a forward pass is 1, a gradient with respect to the image 1 more, the backward pass
        of training 2 more.
    macs : float
        The same passes, each times the multiply-accumulates of its network.
    weight_gradients : float
        Gradient evaluations with respect to weights: for each network, the number of images of its loss.
    """

    forwards: float = 0.0
    macs: float = 0.0
    weight_gradients: float = 0.0

    def __add__(self, other: Work) -> Work:
        gradients = self.weight_gradients + other.weight_gradients
        return Work(self.forwards + other.forwards, self.macs + other.macs, gradients)

    def __mul__(self, times: float) -> Work:
        return Work(self.forwards * times, self.macs * times, self.weight_gradients * times)

    __rmul__ = __mul__


def one_pass(macs: float) -> Work:
    """A forward pass of one image through a network with that many multiply-accumulates."""
    return Work(1.0, macs)


@dataclass
class Tally:
    """Work of measurements: `spent` was computed here; `cached` was saved by results found in the cache."""

    spent: Work = Work()
    cached: Work = Work()
    cached_seconds: float = 0.0
