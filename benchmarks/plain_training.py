"""The training stages in plain form: the same recipe, with none of the execution layer underneath.

Inside `plain_form()` a training slices its weights in every forward, in NCHW memory, attacks by autograd through the
unfolded network with chained clamps, and asks an unfolded teacher. Outputs are those of the package up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.attacks import start_point
from proard.kernels import convolution
from proard.losses import InnerObjective
from proard.nets import StaticNet, Supernet, run_network
from proard.nets.elastic import BN_EPS, BN_MOMENTUM, key_of
from proard.nets.view import Statistics
from proard.space import Arch, ConvSpec
from proard.stages import training as stage
from proard.training import Run

LAYOUT = torch.contiguous_format


class PlainView:
    """`SubnetView` in plain form: nothing is materialised, gradients reach the supernet by themselves.

    One process alone: `total`, which adds statistics up over several, must be left out.
    """

    def __init__(self, supernet: Supernet, arch: Arch, *, total: None = None) -> None:
        assert total is None
        self.supernet, self.spec = supernet, supernet.space.spec(arch)

    def __call__(
        self, images: Tensor, *, record: Statistics | None = None, update_running: bool = False, frozen: bool = False
    ) -> Tensor:
        """Logits with batch statistics, as `SubnetView` gives them."""

        def norm(layer: ConvSpec, x: Tensor) -> Tensor:
            bn, out = self.supernet.layers[key_of(layer)].bn, layer.out_channels
            mean, var = torch.zeros_like(bn.weight[:out]), torch.zeros_like(bn.weight[:out])
            values = x.numel() / out
            x = F.batch_norm(x, mean, var, bn.weight[:out], bn.bias[:out], training=True, momentum=1.0, eps=BN_EPS)
            if record is not None:
                record[layer.name] = (mean.detach(), var.detach() * ((values - 1) / values))
            if update_running:
                bn.running_mean[:out].lerp_(mean.detach(), BN_MOMENTUM)
                bn.running_var[:out].lerp_(var.detach(), BN_MOMENTUM)
            return x

        return self._run(images, norm)

    def running_statistics(self) -> Statistics:
        """The supernet's stored statistics of the leading channels."""
        norms = {conv: self.supernet.layers[key_of(conv)].bn for conv in self.spec.convs}
        return {
            conv.name: (bn.running_mean[: conv.out_channels], bn.running_var[: conv.out_channels])
            for conv, bn in norms.items()
        }

    def folded(self, statistics: Statistics, *, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
        """Evaluation mode at fixed statistics, not folded at all; only float32."""
        if dtype is not torch.float32:
            raise ValueError(f"the plain form attacks in float32; the recipe asks for {dtype}")

        def norm(layer: ConvSpec, x: Tensor) -> Tensor:
            bn, out = self.supernet.layers[key_of(layer)].bn, layer.out_channels
            return F.batch_norm(x, *statistics[layer.name], bn.weight[:out], bn.bias[:out], eps=BN_EPS)

        return lambda images: self._run(images, norm)

    def scatter_gradients(self) -> None:
        """Nothing is left to do."""

    def _run(self, images: Tensor, norm: Callable[[ConvSpec, Tensor], Tensor]) -> Tensor:
        """Slice, convolve, normalise."""
        net = self.supernet

        def conv(layer: ConvSpec, x: Tensor) -> Tensor:
            weight = net.layers[key_of(layer)].weight[: layer.out_channels, : layer.in_channels]
            return norm(layer, convolution(x, weight.contiguous(), stride=layer.stride))

        x = net.normalise(images).contiguous(memory_format=LAYOUT)
        return run_network(self.spec, x, conv, net.head)


def plain_pgd(
    predict: Callable[[Tensor], Tensor],
    objective: InnerObjective,
    images: Tensor,
    *,
    eps: float,
    step_size: float,
    num_steps: int,
    start: str = "uniform",
    generator: torch.Generator | None = None,
    **options: object,
) -> Tensor:
    """`attacks.pgd` as in a textbook: autograd through the objective, one clamp after the other; linf only."""
    known = {"norm": "linf", "start_scale": 1.0, "clip_to_ball": True}
    if any(options.get(name, value) != value for name, value in known.items()) or "initial" in options:
        raise ValueError(f"the plain form attacks in the linf ball from the start noise; the recipe asks for {options}")
    adv = start_point(images, eps=eps, start=start, generator=generator)
    for _ in range(num_steps):
        adv.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(predict(adv)).sum(), adv)
        adv = adv.detach() + step_size * gradient.sign()
        adv = torch.minimum(torch.maximum(adv, images - eps), images + eps).clamp(0, 1)
    return adv


def unfolded_teacher(net: StaticNet) -> Callable[[Tensor], Tensor]:
    """A teacher's logits without a graph, norms as they are."""
    net = net.eval().to(memory_format=LAYOUT)

    def predict(images: Tensor) -> Tensor:
        with torch.no_grad():
            return net(images.contiguous(memory_format=LAYOUT))

    return predict


@contextmanager
def plain_form() -> Iterator[None]:
    """Inside, the training stages run in plain form."""
    from proard.stages import train_phase

    def plain_run(net: Supernet, **options: Any) -> Run:
        return Run(net.to(memory_format=LAYOUT), **{**options, "search": plain_pgd})

    places = [
        (Supernet, "view", lambda net, arch, **options: PlainView(net, arch, **options)),
        (stage, "Run", plain_run),
        (stage, "frozen_network", unfolded_teacher),
        (train_phase, "frozen_network", unfolded_teacher),
    ]
    with ExitStack() as stack:
        for module, name, value in places:
            stack.enter_context(mock.patch.object(module, name, value))
        yield
