"""A subnet's weights, materialised once for a training step: sliced before the attack, gradients scattered after it.

Every pass of the step (clean, attack, adversarial) reads the same packed leaves, so that slicing costs one copy instead
of one per forward, and the backward pass fills small tensors instead of allocating full-size zeros for every slice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proard.kernels import norm_activation
from proard.kernels.switch import in_use
from proard.nets.elastic import BN_EPS, BN_MOMENTUM, ElasticConvNorm, Supernet
from proard.nets.forward import activate, convolve, run_network, widened
from proard.nets.modules import present, statistics_of
from proard.nets.norm import Total, batch_norm_of_all
from proard.nets.subnet import FoldedNet, folded_layer, unfolded_layer
from proard.space import Activation, Arch, ConvSpec, key_of

Statistics = dict[str, tuple[Tensor, Tensor]]


class SubnetView:
    """One subnet of a supernet with leaf weights of its own.

    Parameters
    ----------
    supernet : Supernet
        Source of the weights; receives the gradients.
    arch : Arch
        The subnet.
    total : callable, optional
        Sum over the processes that share the batch: batch norm then uses the statistics of all their images.
    multiple : int, optional
        The leaves have a multiple of so many channels, with zeros for those that the subnet lacks, which stay zero and
        get no gradient. By default 8 on a GPU, as its matrix units need them, and 1 elsewhere.
    """

    def __init__(
        self, supernet: Supernet, arch: Arch, *, total: Total | None = None, multiple: int | None = None
    ) -> None:
        self.supernet, self.total = supernet, total
        self.multiple = multiple or (8 if supernet.mean.is_cuda and in_use("padding") else 1)
        self.spec = supernet.space.spec(arch)
        self.leaves: dict[str, tuple[Tensor, ...]] = {}  # filters, then batch norm's scale and shift or the bias
        for conv in self.spec.convs:
            layer, out = supernet.layers[key_of(conv)], conv.out_channels
            weight = self._wide(layer.filters(out, conv.in_channels, conv.kernel).detach(), inputs=not conv.depthwise)
            self.leaves[conv.name] = (
                weight.contiguous(memory_format=torch.channels_last).requires_grad_(),
                *(self._wide(values[:out].detach()).requires_grad_() for values in _per_channel(layer)),
            )
        head = supernet.head.weight[:, : self.spec.features].detach()
        self.head_weight = self._wide(head.t()).t().contiguous().requires_grad_()
        self.head_bias = supernet.head.bias.detach().requires_grad_()

    def _wide(self, values: Tensor, *, inputs: bool = False, fill: float = 0.0) -> Tensor:
        """Values per channel, filters among them, followed by `fill` up to a multiple; of `inputs` of filters, too."""
        more = [-values.shape[dim] % self.multiple for dim in range(2 if inputs else 1)]
        if not any(more):
            return values
        before = (0, 0) * (values.ndim - len(more))
        return F.pad(values, (*before, *(pair for count in reversed(more) for pair in (0, count))), value=fill)

    @property
    def weights(self) -> list[Tensor]:
        """Leaves with more than one dim, the head's among them."""
        return [leaf for leaves in self.leaves.values() for leaf in leaves if leaf.ndim > 1] + [self.head_weight]

    def __call__(
        self, images: Tensor, *, record: Statistics | None = None, update_running: bool = False, frozen: bool = False
    ) -> Tensor:
        """Logits with batch statistics (training mode).

        Parameters
        ----------
        images : Tensor of shape (batch, channels, height, width)
            In [0, 1].
        record : dict, optional
            Receives every layer's batch mean and the (biased) variance that it divides by, by layer name.
        update_running : bool
            Move the supernet's running statistics by one step of their momentum.
        frozen : bool
            No gradient to the weights (inside an attack).
        """
        twice = images.requires_grad and not frozen  # a loss depends on the input gradient
        running: list[tuple[Tensor, Tensor]] = []  # statistics to move, and what they move to

        def conv(layer: ConvSpec, x: Tensor) -> Tensor:
            weight, *others = (leaf.detach() if frozen else leaf for leaf in self.leaves[layer.name])
            if not layer.norm:
                return activate(layer.activation, convolve(layer, x, weight, *others))
            scale, shift = others
            return normalised(layer, convolve(layer, x, weight), scale, shift, layer.activation)

        def join(layer: ConvSpec, x: Tensor, side: Tensor, activation: Activation) -> Tensor:
            weight, *others = (leaf.detach() if frozen else leaf for leaf in self.leaves[layer.name])
            if not layer.norm:
                return activate(activation, convolve(layer, x, weight, *others) + side)
            scale, shift = others
            return normalised(layer, convolve(layer, x, weight), scale, shift, activation, side)

        def normalised(
            layer: ConvSpec,
            out: Tensor,
            scale: Tensor,
            shift: Tensor,
            activation: Activation,
            side: Tensor | None = None,
        ) -> Tensor:
            if self.total is None:
                out, mean, var = norm_activation(out, scale, shift, eps=BN_EPS, activation=activation, side=side)
                values: Tensor | float = out.numel() / out.shape[1]  # per channel
            else:
                out, mean, var, values = batch_norm_of_all(out, scale, shift, self.total, eps=BN_EPS, twice=twice)
                out = activate(activation, out if side is None else out + side)
                var = (var * ((values - 1) / values)).to(var)
            if record is not None:
                record[layer.name] = (mean, var)
            if update_running:
                unbiased = (var * (values / (values - 1))).to(var)
                found = (each[: layer.out_channels] for each in (mean, unbiased))
                running.extend(zip(self._running(layer), found, strict=True))
            return out

        head = (self.head_weight.detach(), self.head_bias.detach()) if frozen else (self.head_weight, self.head_bias)
        images = widened(self.supernet.normalise(images), self.leaves[self.spec.convs[0].name][0].shape[1])
        logits = run_network(
            self.spec, images, conv, lambda features: F.linear(features, *head), activated=True, join=join
        )
        if running:  # all in one call: on a GPU, in two launches instead of two per layer
            values, found = (list(each) for each in zip(*running, strict=True))
            torch._foreach_lerp_(values, found, BN_MOMENTUM)
        return logits

    @torch.no_grad()
    def running_statistics(self) -> Statistics:
        """The supernet's stored statistics of the channels of the leaves; 0 and 1 of those that the subnet lacks."""
        found = {conv.name: self._running(conv) for conv in self.spec.convs if conv.norm}
        return {name: (self._wide(mean), self._wide(var, fill=1.0)) for name, (mean, var) in found.items()}

    def _running(self, conv: ConvSpec) -> tuple[Tensor, Tensor]:
        """The supernet's running mean and variance of a layer's channels, to be read or changed."""
        mean, var = statistics_of(present(self.supernet.layers[key_of(conv)].bn))
        return mean[: conv.out_channels], var[: conv.out_channels]

    @torch.no_grad()
    def folded(self, statistics: Statistics, *, dtype: torch.dtype = torch.float32) -> FoldedNet:
        """The subnet with batch norm fixed at `statistics` and folded into the convolutions."""
        layers = {}
        for name, leaves in self.leaves.items():
            weight, *others = (leaf.detach() for leaf in leaves)
            if name in statistics:
                scale, shift = others
                layers[name] = folded_layer(weight, scale, shift, *statistics[name])
            else:
                layers[name] = unfolded_layer(weight, others[0] if others else None)
        net = self.supernet
        head = (self.head_weight.detach(), self.head_bias.detach())
        return FoldedNet(self.spec, layers, head, mean=net.mean, std=net.std, dtype=dtype)

    @torch.no_grad()
    def scatter_gradients(self) -> None:
        """Add the leaves' gradients to the supernet's, which must exist, and clear them."""
        for conv in self.spec.convs:
            layer, out = self.supernet.layers[key_of(conv)], conv.out_channels
            weight, *others = self.leaves[conv.name]
            inputs = 1 if conv.depthwise else conv.in_channels
            gradient = present(weight.grad)[:out, :inputs]
            if conv.kernel < layer.kernel:  # through the transforms, which have gradients of their own
                with torch.enable_grad():
                    layer.filters(out, conv.in_channels, conv.kernel).backward(gradient)
            else:
                present(layer.weight.grad)[:out, :inputs] += gradient
            for leaf, values in zip(others, _per_channel(layer), strict=True):
                present(values.grad)[:out] += present(leaf.grad)[:out]
            for leaf in (weight, *others):
                leaf.grad = None
        features = self.spec.features
        present(self.supernet.head.weight.grad)[:, :features] += present(self.head_weight.grad)[:, :features]
        present(self.supernet.head.bias.grad).add_(present(self.head_bias.grad))
        self.head_weight.grad = self.head_bias.grad = None


def _per_channel(layer: ElasticConvNorm) -> tuple[nn.Parameter, ...]:
    """Batch norm's scale and shift, or the bias, or nothing."""
    if layer.bn is not None:
        return layer.bn.weight, layer.bn.bias
    return () if layer.bias is None else (layer.bias,)
