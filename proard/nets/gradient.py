"""The input gradient of a folded network without autograd: most of the work of an attack.

The forward pass keeps the activations, the backward pass uses them in reverse order. Compared with autograd this saves
the graph, the allocation of every masked gradient and the slow strided backward convolutions, and the elementwise work
between two convolutions becomes part of their passes; the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from proard.kernels import Winograd, convolve_activate, depthwise_convolution, every, gradient_slope, slope_
from proard.kernels.depthwise import depthwise_input_gradient
from proard.kernels.epilogues import FROM_OUTPUT
from proard.kernels.winograd import ACTIVATIONS
from proard.nets.forward import activate, pool, widened
from proard.nets.modules import present
from proard.space import BlockSpec, ConvSpec, GateSpec, NetSpec, PoolSpec, Step

LAYOUT = torch.channels_last
FEW = 8  # input channels up to which the library's strided backward convolution leaves most vector lanes idle


@dataclass(frozen=True)
class Kept:
    """A map of the forward pass.

    Attributes
    ----------
    value : Tensor of shape (batch, channels, height, width)
    before : Tensor, optional
        Where the slope of its activation is taken: the activation's input, or `value` for those in `FROM_OUTPUT`.
    activation : str
        The activation that gave it; `none` if nothing is multiplied on the way back.
    inner : list
        What its step needs on the way back besides its input.
    """

    value: Tensor
    before: Tensor | None = None
    activation: str = "none"
    inner: list[Any] = field(default_factory=list)

    @property
    def bare(self) -> Kept:
        """The same map, with nothing to multiply on the way back."""
        return Kept(self.value)

    def slope_(self, gradient: Tensor, side: Tensor | None = None) -> Tensor:
        """Add `side` to the map's gradient and multiply it by the slope of the activation, in place."""
        return slope_(gradient, self.before, side, activation=self.activation)


class Layer(Protocol):
    """A step of a block in both directions."""

    def forward(self, x: Kept) -> Kept:
        """The step's output."""

    def backward(self, gradient: Tensor, x: Kept, out: Kept) -> Tensor:
        """Gradient with respect to `x.value`, times the slope of its activation.

        `gradient`, with respect to the step's output before its activation, may be overwritten.
        """


class Convolution:
    """A biased convolution with its activation.

    On a CPU a strided 1x1 convolution reads a sliced copy, as in `kernels.convolution`. Where input channels are few,
    the input gradient of a 3x3 convolution of stride 2 on an even map is there one 2x2 convolution with four times the
    channels, one group for each parity of row and column: input row 2i contributes to output row i only (tap 1), row
    2i + 1 to output rows i (tap 2) and i + 1 (tap 0). Where `by_winograd`, both passes are `kernels.Winograd`'s.
    """

    def __init__(self, layer: ConvSpec, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias, self.stride, self.activation = weight, bias, layer.stride, layer.activation
        self.depthwise = layer.depthwise and layer.kernel > 1
        self.groups = len(weight) if layer.depthwise else 1
        self.sliced = layer.kernel == 1 and layer.stride > 1 and self.groups == 1
        self.transposed, self.parities = None, None
        self.winograd = Winograd(weight) if by_winograd(layer, weight) else None
        if weight.device.type != "cpu":
            return
        self.transposed = weight.transpose(0, 1).contiguous(memory_format=LAYOUT) if self.sliced else None
        if layer.kernel == 3 and layer.stride == 2 and weight.shape[1] <= FEW and not layer.depthwise:
            taps = torch.tensor([[1, 3], [2, 0]])  # (parity, output row); tap 3 is the padded zero
            parities = F.pad(weight, (0, 1, 0, 1))[:, :, taps][..., taps].permute(2, 4, 1, 0, 3, 5)
            self.parities = parities.reshape(-1, len(weight), 2, 2).contiguous(memory_format=LAYOUT)

    def forward(self, x: Kept, *, activation: str | None = None, side: Tensor | None = None) -> Kept:
        """Map (batch, in, h, w) to (batch, out, h', w').

        `side`, if given, is added before the activation, which is the layer's own if none is given.
        """
        activation = activation or self.activation
        stride, source = self.stride, x.value
        if self.sliced:
            source, stride = every(stride, source), 1
        at_once = activation if activation in FROM_OUTPUT else "none"
        if self.winograd is not None and at_once in ACTIVATIONS:
            out = self.winograd.convolve(source, self.bias, side=side, activation=at_once)
        elif self.depthwise and source.device.type == "cpu" and at_once == "none" and side is None:
            out = depthwise_convolution(source, self.weight, self.bias, stride)
        else:
            out = convolve_activate(
                source, self.weight, self.bias, stride=stride, groups=self.groups, activation=at_once, side=side
            )
        return activated(out, activation, done=at_once != "none")

    def backward(self, gradient: Tensor, x: Kept, out: Kept | None = None, side: Tensor | None = None) -> Tensor:
        """Gradient with respect to `x.value`, plus `side`, times the slope of its activation."""
        if self.parities is not None and x.value.shape[2] % 2 == 0 and x.value.shape[3] % 2 == 0:
            return (
                self._by_parities(gradient, x) if side is None else x.slope_(self._by_parities(gradient, x.bare), side)
            )
        if self.winograd is not None:
            return self.winograd.input_gradient(gradient, before=x.before, activation=x.activation, side=side)
        if self.depthwise:
            return x.slope_(depthwise_input_gradient(gradient, x.value, self.weight, self.stride), side)
        return gradient_slope(
            gradient,
            x.value,
            self.weight,
            stride=self.stride,
            groups=self.groups,
            before=x.before,
            activation=x.activation,
            side=side,
        )

    def _by_parities(self, gradient: Tensor, x: Kept) -> Tensor:
        """`backward` of a 3x3 convolution of stride 2 on an even map."""
        parts = F.conv2d(F.pad(gradient, (0, 1, 0, 1)), present(self.parities))  # (batch, 4 in, h / 2, w / 2)
        parts = parts.unflatten(1, (2, 2, -1)).permute(0, 4, 1, 5, 2, 3)  # (batch, h / 2, 2, w / 2, 2, in)
        if x.activation != "relu":
            return x.slope_(parts.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2))
        mask = x.value.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        out = torch.empty_like(mask)
        torch.ops.aten.threshold_backward.grad_input(parts, mask, 0, grad_input=out)
        return out.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)

    def add_backward_(self, total: Tensor, gradient: Tensor, x: Kept) -> Tensor:
        """Add the gradient with respect to `x.value` to `total`, then multiply by the slope of its activation."""
        if not self.sliced:
            return self.backward(gradient, x, side=total)
        filters = self.weight.transpose(0, 1) if self.transposed is None else self.transposed
        reached = total[:, :, :: self.stride, :: self.stride]
        reached += F.conv2d(gradient, filters)
        return x.slope_(total)


def by_winograd(layer: ConvSpec, weight: Tensor) -> bool:
    """Whether attacks compute a convolution by Winograd's method, with larger rounding errors than the library's."""
    return layer.stride == 1 and not layer.depthwise and Winograd.suits(weight, layer.out_size)


class Gate:
    """Squeeze-and-excitation: the map times a factor per image and channel, made from its means."""

    def __init__(self, convs: list[Convolution]) -> None:
        self.convs = convs

    def forward(self, x: Kept) -> Kept:
        """The map times its factors."""
        inner = [Kept(x.value.mean((2, 3), keepdim=True))]
        for conv in self.convs:
            inner.append(conv.forward(inner[-1]))
        return Kept(x.value * inner[-1].value, inner=inner)

    def backward(self, gradient: Tensor, x: Kept, out: Kept) -> Tensor:
        """Through the product, and through the factors."""
        inner, size = out.inner, x.value.shape[2] * x.value.shape[3]
        factors = (gradient * x.value).sum((2, 3), keepdim=True)
        beside = inner[-1].slope_(factors.contiguous(memory_format=LAYOUT))
        for conv, source, result in zip(reversed(self.convs), inner[-2::-1], inner[:0:-1], strict=True):
            beside = conv.backward(beside, source, result)
        return x.slope_(gradient * inner[-1].value + beside / size)


class Pool:
    """A pooling."""

    def __init__(self, step: PoolSpec) -> None:
        self.step = step

    def forward(self, x: Kept) -> Kept:
        """The pooled map; of a maximum, where it was found."""
        if self.step.kind == "mean":
            return Kept(pool(self.step, x.value))
        value, places = F.max_pool2d(x.value, 3, self.step.stride, padding=1, return_indices=True)
        return Kept(value, inner=[places])

    def backward(self, gradient: Tensor, x: Kept, out: Kept) -> Tensor:
        """Gradients go to the pixels that were read."""
        stride = [self.step.stride] * 2
        if self.step.kind == "mean":
            ceil = x.value.shape[-1] % self.step.stride > 0
            found = torch.ops.aten.avg_pool2d_backward(gradient, x.value, stride, stride, [0, 0], ceil, True, None)
        else:
            options = ([3, 3], stride, [1, 1], [1, 1], False)
            found = torch.ops.aten.max_pool2d_with_indices_backward(gradient, x.value, *options, *out.inner)
        return x.slope_(found)


def activated(before: Tensor, activation: str, *, done: bool = False) -> Kept:
    """A map after its activation, which may be `done` in `before`."""
    if activation in FROM_OUTPUT:
        value = before if done else activate(activation, before)  # type: ignore[arg-type]
        return Kept(value, value, activation)
    return Kept(activate(activation, before), before, activation)  # type: ignore[arg-type]


class BlockGradient:
    """Both passes of a block: steps in sequence beside a shortcut, an activation."""

    def __init__(self, block: BlockSpec, convs: Mapping[str, Convolution]) -> None:
        self.steps = [made(step, convs) for step in block.steps]
        self.shortcut = None if block.shortcut is None else [made(step, convs) for step in block.shortcut]
        self.activation = block.activation

    @property
    def joining(self) -> Convolution | None:
        """The last convolution, where it can also add the shortcut, since nothing comes between."""
        last = self.steps[-1]
        joins = self.shortcut is not None and isinstance(last, Convolution) and last.activation == "none"
        return last if joins and self.activation in FROM_OUTPUT else None  # type: ignore[return-value]

    def forward(self, x: Kept) -> list[Kept]:
        """The block's input, the output of every step, the shortcut's outputs; the block's output comes last."""
        kept, joining = [x], self.joining
        for step in self.steps[: -1 if joining else None]:
            kept.append(step.forward(kept[-1]))
        if self.shortcut is None:
            return kept if self.activation == "none" else [*kept, activated(kept[-1].value.clone(), self.activation)]
        beside = [x]
        for step in self.shortcut:
            beside.append(step.forward(beside[-1]))
        if joining:
            out = joining.forward(kept[-1], activation=self.activation, side=beside[-1].value)
            return [*kept, out, *beside[1:], out]
        out = activated(kept[-1].value + beside[-1].value, self.activation)
        return [*kept, *beside[1:], out]

    def backward(self, gradient: Tensor, kept: list[Kept]) -> Tensor:
        """Gradient with respect to the block's input, times the slope of the activation that gave it.

        `gradient`, which may be overwritten, is with respect to the block's output, times its activation's slope.
        """
        count, x = len(self.steps), kept[0]
        beside = gradient
        if self.shortcut is None and self.activation != "none":
            gradient = kept[count].slope_(gradient)
        elif self.shortcut is not None and self.joining is None and kept[count].activation != "none":
            gradient = kept[count].slope_(gradient.clone(memory_format=torch.preserve_format))
        for index in range(count - 1, -1, -1):
            source = kept[index].bare if index == 0 and self.shortcut is not None else kept[index]
            gradient = self.steps[index].backward(gradient, source, kept[index + 1])
        if self.shortcut is None:
            return gradient
        if not self.shortcut:
            return x.slope_(gradient, beside)
        maps = [x, *kept[count + 1 :]]
        for index in range(len(self.shortcut) - 1, 0, -1):
            beside = self.shortcut[index].backward(beside, maps[index], maps[index + 1])
        first = self.shortcut[0]
        if isinstance(first, Convolution):
            return first.add_backward_(gradient, beside, x)
        return x.slope_(gradient, first.backward(beside, x.bare, maps[1]))


def made(step: Step, convs: Mapping[str, Convolution]) -> Layer:
    """A step in both directions."""
    if isinstance(step, ConvSpec):
        return convs[step.name]
    return Gate([convs[conv.name] for conv in step.convs]) if isinstance(step, GateSpec) else Pool(step)


class InputGradient:
    """Logits and the gradient of an objective with respect to the images, for a folded network's weights.

    Parameters
    ----------
    spec : NetSpec
        Its channel counts are not read: the weights may be padded with zeros (see `FoldedNet`).
    layers : mapping of name to (weight, bias)
        For every convolution, all in one dtype.
    head : (weight, bias)
        The linear layer.
    scale, shift : Tensor of shape (channels, 1, 1)
        Pixel normalisation.
    """

    def __init__(
        self,
        spec: NetSpec,
        layers: Mapping[str, tuple[Tensor, Tensor]],
        head: tuple[Tensor, Tensor],
        *,
        scale: Tensor,
        shift: Tensor,
    ) -> None:
        convs = {conv.name: Convolution(conv, *layers[conv.name]) for conv in spec.convs}
        self.blocks = [BlockGradient(block, convs) for block in spec.blocks]
        self.mixer = [convs[conv.name] for conv in spec.mixer]
        self.head, self.scale, self.shift = head, scale, shift
        first = layers[spec.convs[0].name][0]
        self.dtype, self.channels = first.dtype, first.shape[1]

    @torch.no_grad()
    def __call__(self, images: Tensor, logit_gradient: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of shape (batch, classes) and the gradient of the shape of `images`.

        Parameters
        ----------
        images : Tensor of shape (batch, channels, height, width)
            In [0, 1].
        logit_gradient : callable
            Gradient of the objective with respect to the logits, both of shape (batch, classes).
        """
        logits, pull_back = self.linearised(images)
        return logits, pull_back(logit_gradient(logits))

    @torch.no_grad()
    def linearised(self, images: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Logits, and a function for one call: from the gradient of the logits to that of the images."""
        tape: list[list[Kept]] = []
        logits, ends = self._forward(images, tape)

        @torch.no_grad()
        def pull_back(logit_gradient: Tensor) -> Tensor:
            gradient = self._backward(logit_gradient, tape, ends)
            return gradient[:, : images.shape[1]].to(images.dtype) * self.scale

        return logits, pull_back

    def differentiable(self, images: Tensor) -> Tensor:
        """Logits of images in standard layout, for callers that use autograd; their gradient can be taken once."""
        return _Differentiable.apply(images, self)

    def _backward(self, logit_gradient: Tensor, tape: list[list[Kept]], ends: list[Kept]) -> Tensor:
        """Gradient with respect to the normalised images; empties the tape."""
        x, gradient = tape[-1][-1], logit_gradient @ self.head[0]
        if self.mixer:
            gradient = ends[-1].slope_(gradient.to(self.dtype)[:, :, None, None].contiguous(memory_format=LAYOUT))
            for conv, source, out in zip(reversed(self.mixer), ends[-2::-1], ends[:0:-1], strict=True):
                gradient = conv.backward(gradient, source, out)
            gradient = gradient.flatten(1)
        pooled = gradient.to(self.dtype) / (x.value.shape[2] * x.value.shape[3])  # (batch, features)
        gradient = x.slope_(torch.empty_like(x.value).copy_(pooled[:, :, None, None]))
        for block in reversed(self.blocks):
            gradient = block.backward(gradient, tape.pop())
        return gradient

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes) alone."""
        return self._forward(images, None)[0]

    def _forward(self, images: Tensor, tape: list[list[Kept]] | None) -> tuple[Tensor, list[Kept]]:
        """Logits and the maps of the mixer; every block's maps go to the tape."""
        weight, bias = self.head
        x = Kept(widened((images * self.scale + self.shift).to(self.dtype), self.channels))
        for block in self.blocks:
            kept = block.forward(x)
            x = kept[-1]
            if tape is not None:
                tape.append(kept)
        features = x.value.mean((2, 3))
        ends = [Kept(features[:, :, None, None])] if self.mixer else []
        for conv in self.mixer:
            ends.append(conv.forward(ends[-1]))
        features = ends[-1].value.flatten(1) if ends else features
        return F.linear(features.to(weight.dtype), weight, bias), ends


class _Differentiable(torch.autograd.Function):
    """Logits by `InputGradient.linearised`."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, own: InputGradient) -> Tensor:
        logits, ctx.pull_back = own.linearised(images)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logit_gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.pull_back(logit_gradient).contiguous(), None
