"""Several processes train one supernet: gradients of the active slices are summed in one all-reduce per step.

Every process holds the whole supernet, draws the same archs (the plan depends on seed and step alone) and computes the
gradients of its own part of the batch. What no arch of the step uses has a gradient of zero everywhere, so only the
bounding slices travel: no wrapper, no search for unused parameters, no bucket of zeros.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from proard.nets import Supernet
from proard.nets.modules import present
from proard.nets.trainee import Trainee
from proard.space import FixedSpec, NetSpec, key_of
from proard.training.ranks import Ranks


def active_gradients(net: Trainee, specs: Iterable[NetSpec | FixedSpec]) -> list[Tensor]:
    """Views of the gradients, which must exist, that hold all non-zero gradients of these subnets' passes.

    Of a layer that several subnets share, the slice that holds all of theirs; tensors that are neither filters nor
    per channel go whole.
    """
    if not isinstance(net, Supernet):
        return [present(weight.grad) for weight in dict(net.named_parameters()).values()]
    widest: dict[str, tuple[int, int]] = {}
    features = 0
    for spec in specs:
        assert isinstance(spec, NetSpec)
        features = max(features, spec.features)
        for conv in spec.convs:
            out, width = widest.get(key_of(conv), (0, 0))
            widest[key_of(conv)] = max(out, conv.out_channels), max(width, conv.in_channels)
    views = []
    for key, (out, width) in widest.items():
        for parameter in net.layers[key].parameters():
            gradient = present(parameter.grad)
            if parameter.ndim == 4:
                views.append(gradient[:out, :width])
            else:
                views.append(gradient[:out] if parameter.ndim == 1 else gradient)
    return [*views, present(net.head.weight.grad)[:, :features], present(net.head.bias.grad)]


class GradientSync:
    """Sum over processes of a step's gradients and measures, in one collective.

    Parameters
    ----------
    net : Supernet
        Equal on all processes.
    ranks : Ranks
        The processes.
    """

    def __init__(self, net: Trainee, ranks: Ranks) -> None:
        self.net, self.ranks = net, ranks
        self.bytes_reduced = 0

    @torch.no_grad()
    def __call__(self, specs: Iterable[NetSpec | FixedSpec], measures: Tensor) -> Tensor:
        """Add up the gradients in place; `measures`, of shape (n,), come back added up.

        A loss among them that is not finite anywhere is so everywhere: all processes stop at the same step.
        """
        views = active_gradients(self.net, specs)
        parts = [view.reshape(-1) for view in views]
        buffer = torch.cat([*parts, measures.to(parts[0].dtype)])
        self.ranks.add_(buffer)
        self.bytes_reduced += buffer.nbytes
        *summed, last = buffer.split([*(part.numel() for part in parts), len(measures)])
        torch._foreach_copy_(views, [part.view(view.shape) for part, view in zip(summed, views, strict=True)])
        return last.to(measures.dtype)
