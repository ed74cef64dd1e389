"""A subnet's weights, materialised once for a training step: sliced before the attack, gradients scattered after it.

Every pass of the step (clean, attack, adversarial) reads the same packed leaves, so that slicing costs one copy instead
of one per forward, and the backward pass fills small tensors instead of allocating full-size zeros for every slice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proard.kernels import norm_activation
from proard.nets.elastic import BN_EPS, BN_MOMENTUM, ElasticConvNorm, Supernet, key_of
from proard.nets.forward import activate, convolve, run_network
from proard.nets.modules import present, statistics_of
from proard.nets.norm import Total, batch_norm_of_all
from proard.nets.subnet import FoldedNet, folded_layer, unfolded_layer
from proard.space import Arch, ConvSpec

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
    """

    def __init__(self, supernet: Supernet, arch: Arch, *, total: Total | None = None) -> None:
        self.supernet, self.total = supernet, total
        self.spec = supernet.space.spec(arch)
        self.leaves: dict[str, tuple[Tensor, ...]] = {}  # filters, then batch norm's scale and shift or the bias
        for conv in self.spec.convs:
            layer, out = supernet.layers[key_of(conv)], conv.out_channels
            weight = layer.filters(out, conv.in_channels, conv.kernel).detach()
            self.leaves[conv.name] = (
                weight.contiguous(memory_format=torch.channels_last).requires_grad_(),
                *(values[:out].detach().requires_grad_() for values in _per_channel(layer)),
            )
        self.head_weight = supernet.head.weight[:, : self.spec.features].detach().contiguous().requires_grad_()
        self.head_bias = supernet.head.bias.detach().requires_grad_()

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

        def conv(layer: ConvSpec, x: Tensor) -> Tensor:
            weight, *others = (leaf.detach() if frozen else leaf for leaf in self.leaves[layer.name])
            if not layer.norm:
                return activate(layer.activation, convolve(layer, x, weight, *others))
            out, (scale, shift) = convolve(layer, x, weight), others
            if self.total is None:
                out, mean, var = norm_activation(out, scale, shift, eps=BN_EPS, activation=layer.activation)
                values: Tensor | float = out.numel() / out.shape[1]  # per channel
            else:
                out, mean, var, values = batch_norm_of_all(out, scale, shift, self.total, eps=BN_EPS, twice=twice)
                out, var = activate(layer.activation, out), (var * ((values - 1) / values)).to(var)
            if record is not None:
                record[layer.name] = (mean, var)
            if update_running:
                running_mean, running_var = self._running(layer)
                running_mean.lerp_(mean, BN_MOMENTUM)
                running_var.lerp_((var * (values / (values - 1))).to(var), BN_MOMENTUM)
            return out

        head = (self.head_weight.detach(), self.head_bias.detach()) if frozen else (self.head_weight, self.head_bias)
        images = self.supernet.normalise(images)
        return run_network(self.spec, images, conv, lambda features: F.linear(features, *head), activated=True)

    @torch.no_grad()
    def running_statistics(self) -> Statistics:
        """The supernet's stored statistics of the leading channels."""
        return {conv.name: self._running(conv) for conv in self.spec.convs if conv.norm}

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
            if conv.kernel < layer.kernel:  # through the transforms, which have gradients of their own
                with torch.enable_grad():
                    layer.filters(out, conv.in_channels, conv.kernel).backward(weight.grad)
            else:
                present(layer.weight.grad)[:out, : weight.shape[1]] += present(weight.grad)
            for leaf, values in zip(others, _per_channel(layer), strict=True):
                present(values.grad)[:out] += present(leaf.grad)
            for leaf in (weight, *others):
                leaf.grad = None
        present(self.supernet.head.weight.grad)[:, : self.spec.features] += present(self.head_weight.grad)
        present(self.supernet.head.bias.grad).add_(present(self.head_bias.grad))
        self.head_weight.grad = self.head_bias.grad = None


def _per_channel(layer: ElasticConvNorm) -> tuple[nn.Parameter, ...]:
    """Batch norm's scale and shift, or the bias, or nothing."""
    if layer.bn is not None:
        return layer.bn.weight, layer.bn.bias
    return () if layer.bias is None else (layer.bias,)
