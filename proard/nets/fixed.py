"""Networks outside the search spaces, with the methods of a subnet that training, measurement and export need."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from proard.config import VisionTransformer, WideResNet
from proard.nets import deepmind
from proard.nets.modules import present, statistics_of
from proard.nets.norm import Total
from proard.nets.wide import WideNet
from proard.space import FixedArch, FixedSpace, FixedSpec
from proard.space.fixed import FixedSettings

Statistics = dict[str, tuple[Tensor, Tensor]]


class FixedNet(nn.Module):
    """A network that is not elastic: pixels are normalised here, `module` does the rest.

    Parameters
    ----------
    space : FixedSpace
        The network's settings.
    mean, std : sequence of float
        Per channel, of pixels in [0, 1].
    generator : torch.Generator, optional
        Its initial seed is the seed of the initial weights; without it the seed is 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        space: FixedSpace,
        *,
        mean: Tensor | list[float],
        std: Tensor | list[float],
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.space = space
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).reshape(-1))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).reshape(-1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0 if generator is None else generator.initial_seed())
            self.module = _module(space.settings)
        self.to(memory_format=torch.channels_last)

    @property
    def spec(self) -> FixedSpec:
        """Costs and shape."""
        return self.space.spec(self.space.largest)

    def normalise(self, images: Tensor) -> Tensor:
        """Images in [0, 1], minus the mean and divided by the standard deviation of their channel."""
        return (images - self.mean[:, None, None]) / self.std[:, None, None]

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes) for images in [0, 1] of shape (batch, channels, height, width)."""
        with plain_attention():
            return self.module(self.normalise(images))

    def view(self, arch: FixedArch, *, total: Total | None = None) -> FixedView:
        """The network with leaf weights of its own, for one training step; `total` is ignored."""
        return FixedView(self)

    def norms(self) -> dict[str, nn.BatchNorm2d]:
        """Batch norms by their name inside `module`."""
        return norms_of(self.module)

    def frozen(self) -> FixedNet:
        """A copy in evaluation mode whose weights need no gradient, to be attacked, measured and exported."""
        net = copy.deepcopy(self).eval().requires_grad_(False)
        net.zero_grad(set_to_none=True)
        return net

    def rounded(self, dtype: torch.dtype) -> Rounded:
        """A frozen copy that computes in another type."""
        return Rounded(self.frozen(), dtype)


def _module(settings: FixedSettings) -> nn.Module:
    """The network of these settings, for normalised images."""
    if isinstance(settings, VisionTransformer):
        return _vit(settings)
    return WideNet(settings) if isinstance(settings, WideResNet) else deepmind.build(settings)


def _vit(settings: VisionTransformer) -> nn.Module:
    """Torchvision's vision transformer for images of any number of channels."""
    from torchvision.models import VisionTransformer as Torchvision  # a slow import that few runs need

    net = Torchvision(
        image_size=settings.image_size,
        patch_size=settings.patch,
        num_layers=settings.layers,
        num_heads=settings.heads,
        hidden_dim=settings.hidden,
        mlp_dim=settings.mlp,
        num_classes=settings.classes,
    )
    if settings.image_channels != 3:
        fan_in = settings.image_channels * settings.patch**2
        net.conv_proj = nn.Conv2d(settings.image_channels, settings.hidden, settings.patch, settings.patch)
        nn.init.trunc_normal_(net.conv_proj.weight, std=fan_in**-0.5)
        nn.init.zeros_(net.conv_proj.bias)
    return net


@contextmanager
def plain_attention() -> Iterator[None]:
    """Context with attention by plain products: fused kernels have no second derivative and cannot be exported."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def norms_of(module: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """Batch norms by name."""
    return {name: norm for name, norm in module.named_modules() if isinstance(norm, nn.BatchNorm2d)}


@contextmanager
def recorded(module: nn.Module, record: Statistics | None) -> Iterator[None]:
    """Context in which every batch norm writes the mean and the (biased) variance of its input to `record`."""
    hooks = []
    if record is not None:
        for name, norm in norms_of(module).items():

            def keep(_norm: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                var, mean = torch.var_mean(inputs[0].detach(), (0, 2, 3), correction=0)
                record[name] = (mean, var)

            hooks.append(norm.register_forward_pre_hook(keep))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def training_mode(module: nn.Module) -> Iterator[None]:
    """Context in which a module is in training mode."""
    before = module.training
    module.train()
    try:
        yield
    finally:
        module.train(before)


class FixedView:
    """A fixed network in a training step, with the calls of a `SubnetView`.

    Parameters
    ----------
    net : FixedNet
        Its weights are read; gradients are added to its gradients, which must exist.
    """

    def __init__(self, net: FixedNet) -> None:
        self.net, self.spec = net, net.spec
        self.leaves = {name: weight.detach().requires_grad_() for name, weight in net.module.named_parameters()}

    @property
    def weights(self) -> list[Tensor]:
        """Leaves with more than one dim."""
        return [leaf for leaf in self.leaves.values() if leaf.ndim > 1]

    def __call__(
        self, images: Tensor, *, record: Statistics | None = None, update_running: bool = False, frozen: bool = False
    ) -> Tensor:
        """Logits with batch statistics (training mode); arguments as in `SubnetView`."""
        module = self.net.module
        buffers = dict(module.named_buffers())
        if not update_running:
            buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        leaves = {name: leaf.detach() if frozen else leaf for name, leaf in self.leaves.items()}
        with plain_attention(), recorded(module, record), training_mode(module):
            return functional_call(module, {**leaves, **buffers}, (self.net.normalise(images),))

    @torch.no_grad()
    def running_statistics(self) -> Statistics:
        """The stored statistics of every batch norm."""
        return {name: statistics_of(norm) for name, norm in self.net.norms().items()}

    @torch.no_grad()
    def folded(self, statistics: Statistics, *, dtype: torch.dtype = torch.float32) -> FixedNet | Rounded:
        """A frozen copy of the network with batch norm fixed at `statistics`."""
        net = self.net.frozen()
        for name, norm in net.norms().items():
            norm.running_mean, norm.running_var = (values.clone() for values in statistics[name])
        return net if dtype is torch.float32 else Rounded(net, dtype)

    @torch.no_grad()
    def scatter_gradients(self) -> None:
        """Add the leaves' gradients to the network's and clear them."""
        for name, weight in self.net.module.named_parameters():
            leaf = self.leaves[name]
            if leaf.grad is not None:
                present(weight.grad).add_(leaf.grad)
            leaf.grad = None


class Rounded(nn.Module):
    """A frozen network that computes in another type; images and logits keep float32."""

    def __init__(self, net: FixedNet, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net, dtype
        self.net.module.to(dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32."""
        with plain_attention():
            return self.net.module(self.net.normalise(images).to(self.dtype)).float()


@torch.no_grad()
def recalibrate_fixed(net: FixedNet, images: Tensor, *, batch_size: int) -> FixedNet:
    """Set running statistics to the mean over batches of the batch statistics; arguments as in `recalibrate`."""
    batches = [batch for batch in images.split(batch_size) if len(batch) == min(batch_size, len(images))]
    totals: dict[str, list[Tensor]] = {}
    view = FixedView(net)
    for batch in batches if net.norms() else []:
        record: Statistics = {}
        view(batch, record=record, frozen=True)
        for name, values in record.items():
            before = totals.get(name, [torch.zeros_like(value) for value in values])
            totals[name] = [total + value for total, value in zip(before, values, strict=True)]
    for name, norm in net.norms().items():
        for buffer, total in zip(statistics_of(norm), totals[name], strict=True):
            buffer.copy_(total / len(batches))
    return net.eval()
