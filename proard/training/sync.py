"""Several processes train one supernet: gradients of the active slices are averaged in one all-reduce per step.

Every process holds the whole supernet, draws the same archs (the plan depends on seed and step alone) and is given its
own images. What no arch of the step uses has a gradient of zero everywhere, so only the bounding slices travel:
no wrapper, no search for unused parameters, no bucket of zeros.

Batch norm looks at the images of its own process, in training passes and inside the attack; N processes therefore equal
one process that passes its batch through the network in N parts, not one that passes it whole. Running statistics
stay local and differ between processes; nothing that is measured uses them, as subnets are recalibrated first.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from proard.nets import FixedNet, Supernet
from proard.nets.elastic import key_of
from proard.space import NetSpec


def active_gradients(net: Supernet | FixedNet, specs: Iterable[NetSpec]) -> list[Tensor]:
    """Views of the gradients, which must exist, that hold all that these subnets' passes have left.

    Of a layer that several subnets share, the slice that holds all of theirs; tensors that are neither filters nor
    per channel go whole.
    """
    if isinstance(net, FixedNet):
        return [weight.grad for weight in net.parameters()]
    widest: dict[str, tuple[int, int]] = {}
    features = 0
    for spec in specs:
        features = max(features, spec.features)
        for conv in spec.convs:
            out, width = widest.get(key_of(conv), (0, 0))
            widest[key_of(conv)] = max(out, conv.out_channels), max(width, conv.in_channels)
    views = []
    for key, (out, width) in widest.items():
        for parameter in net.layers[key].parameters():
            if parameter.ndim == 4:
                views.append(parameter.grad[:out, :width])
            else:
                views.append(parameter.grad[:out] if parameter.ndim == 1 else parameter.grad)
    return [*views, net.head.weight.grad[:, :features], net.head.bias.grad]


class GradientSync:
    """Mean over processes of a step's gradients and measures, in one collective.

    Parameters
    ----------
    net : Supernet
        Equal on all processes.
    group : torch.distributed.ProcessGroup, optional
        The default group without one.
    """

    def __init__(self, net: Supernet, *, group: dist.ProcessGroup | None = None) -> None:
        self.net, self.group, self.world = net, group, dist.get_world_size(group)
        self.bytes_reduced = 0

    @torch.no_grad()
    def __call__(self, specs: Iterable[NetSpec], measures: Tensor) -> Tensor:
        """Average the gradients in place; `measures`, of shape (n,), come back averaged.

        A loss among them that is not finite anywhere is so everywhere: all processes stop at the same step.
        """
        views = active_gradients(self.net, specs)
        parts = [view.reshape(-1) for view in views]
        buffer = torch.cat([*parts, measures.to(parts[0].dtype)])
        dist.all_reduce(buffer, group=self.group)
        self.bytes_reduced += buffer.nbytes
        buffer /= self.world
        *averaged, last = buffer.split([*(part.numel() for part in parts), len(measures)])
        torch._foreach_copy_(views, [part.view(view.shape) for part, view in zip(averaged, views, strict=True)])
        return last.to(measures.dtype)


def gradient_sync(net: Supernet) -> GradientSync | None:
    """A sync where this process is one of several, else None."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return GradientSync(net)
