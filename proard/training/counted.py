"""Networks that count their own passes, and the tally of a training step that they count into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

from proard.space import Work

Forward = Callable[..., Tensor]  # a network as a function: images to logits
Net = TypeVar("Net", bound=Forward)


class StepTally:
    """Work of the newest step, per image of its batch.

    Attributes
    ----------
    work : Work
        Passes of all networks of the step.
    gradients : int
        Backward passes of one image: one per attack step, per loss, and per input gradient inside a loss.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Start a step: nothing is counted yet."""
        self.work, self.gradients = Work(), 0


class Counted(Generic[Net]):
    """A network whose passes are counted where they are made.

    Parameters
    ----------
    net : callable
        Images to logits: a frozen network, or a view of a network that is trained.
    tally : StepTally
        Receives every pass.
    macs : float
        Multiply-accumulates of one image through the network.
    trained : bool
        Whether its weights get gradients, unless a call says `frozen=True`.

    Notes
    -----
    A forward pass counts 1, a gradient with respect to the images 1 more, a backward pass to the weights 2 more. A
    training pass on images that require a gradient counts 6: its loss contains the input gradient (1 pass), which is
    differentiated again (2 passes).
    """

    def __init__(self, net: Net, tally: StepTally, *, macs: float, trained: bool = False) -> None:
        self.net, self.tally, self.macs, self.trained = net, tally, macs, trained

    def __call__(self, images: Tensor, **how: Any) -> Tensor:
        """Logits of shape (batch, classes); keyword arguments are the network's own."""
        logits = self.net(images, **how)
        if not logits.requires_grad:
            self.count(1)
        elif self.trained and not how.get("frozen", False):
            self.count(6 if images.requires_grad else 3)
            self.tally.gradients += int(images.requires_grad)
        else:
            self.count(2)
        return logits

    def count(self, passes: float) -> None:
        """Count passes of every image of the batch that were made without a call."""
        self.tally.work += passes * Work(1.0, self.macs)


def counted(net: Forward | None, tally: StepTally) -> Counted[Forward] | None:
    """A frozen network with its passes counted; one without a `spec` has no known size and costs no MACs."""
    return None if net is None else Counted(net, tally, macs=getattr(getattr(net, "spec", None), "macs", 0))
