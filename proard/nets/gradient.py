"""The input gradient of a folded network without autograd: most of the work of an attack.

The forward pass keeps the activations, the backward pass uses them in reverse order. Compared with autograd this saves
the graph, the allocation of every masked gradient and the slow strided backward convolutions; the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from proard.kernels import every, mask_gradient_, one_pass
from proard.nets.modules import present
from proard.space import BlockSpec, ConvSpec, NetSpec

LAYOUT = torch.channels_last
FEW = 8  # input channels up to which the library's strided backward convolution leaves most vector lanes idle


def is_plain(spec: NetSpec) -> bool:
    """Whether a network has only layers that are differentiated here: dense convolutions, ReLU, shortcuts."""
    dense = all(not conv.depthwise and conv.activation in ("none", "relu") for conv in spec.convs)
    return dense and not spec.mixer and all(_is_plain_block(block) for block in spec.blocks)


def _is_plain_block(block: BlockSpec) -> bool:
    """Whether a block is convolutions in sequence; its shortcut is absent, the identity or one bare convolution."""
    side = block.shortcut or ()
    bare = all(isinstance(step, ConvSpec) and step.activation == "none" for step in side)
    steps = all(isinstance(step, ConvSpec) for step in block.steps)
    return steps and bare and len(side) <= 1 and block.activation in ("none", "relu")


class Convolution:
    """A biased convolution and the gradient with respect to its input.

    A strided 1x1 convolution reads a sliced copy, as in `kernels.convolution`. Where input channels are few, the input
    gradient of a 3x3 convolution of stride 2 on an even map is one 2x2 convolution with four times the channels, one
    group for each parity of row and column: input row 2i contributes to output row i only (tap 1), row 2i + 1 to output
    rows i (tap 2) and i + 1 (tap 0).
    """

    def __init__(self, layer: ConvSpec, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias, self.stride, self.padding = weight, bias, layer.stride, layer.kernel // 2
        self.sliced = layer.kernel == 1 and layer.stride > 1
        self.transposed = weight.transpose(0, 1).contiguous(memory_format=LAYOUT) if self.sliced else None
        self.parities = None
        if layer.kernel == 3 and layer.stride == 2 and layer.in_channels <= FEW:
            taps = torch.tensor([[1, 3], [2, 0]])  # (parity, output row); tap 3 is the padded zero
            parities = F.pad(weight, (0, 1, 0, 1))[:, :, taps][..., taps].permute(2, 4, 1, 0, 3, 5)
            self.parities = parities.reshape(-1, layer.out_channels, 2, 2).contiguous(memory_format=LAYOUT)

    def forward(self, x: Tensor, *, relu: bool = False, side: Tensor | None = None) -> Tensor:
        """Map (batch, in, h, w) to (batch, out, h', w'); `side`, if given, is added before the ReLU."""
        stride = self.stride
        if self.sliced:
            x, stride = every(stride, x), 1
        return convolve_activate(x, self.weight, self.bias, stride, self.padding, relu=relu, side=side)

    def backward(self, gradient: Tensor, x: Tensor, *, masked: bool) -> Tensor:
        """Gradient with respect to `x`, zero where `x` is not positive if `masked`."""
        if self.parities is not None and x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0:
            parts = F.conv2d(F.pad(gradient, (0, 1, 0, 1)), self.parities)  # (batch, 4 in, h / 2, w / 2)
            parts = parts.unflatten(1, (2, 2, -1)).permute(0, 4, 1, 5, 2, 3)  # (batch, h / 2, 2, w / 2, 2, in)
            if not masked:
                return parts.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
            mask = x.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
            out = torch.empty_like(mask)
            torch.ops.aten.threshold_backward.grad_input(parts, mask, 0, grad_input=out)
            return out.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        options = ([self.stride] * 2, [self.padding] * 2, [1, 1], False, [0, 0], 1, [True, False, False])
        out, _, _ = torch.ops.aten.convolution_backward(gradient, x, self.weight, None, *options)
        return mask_gradient_(out, x) if masked else out

    def add_backward_(self, total: Tensor, gradient: Tensor, x: Tensor, *, masked: bool) -> Tensor:
        """Add the gradient with respect to `x` to `total`; zero it where `x` is not positive if `masked`."""
        if not self.sliced:
            return mask_gradient_(total, x if masked else None, self.backward(gradient, x, masked=False))
        reached = total[:, :, :: self.stride, :: self.stride]
        reached += F.conv2d(gradient, present(self.transposed))
        return mask_gradient_(total, x) if masked else total


def convolve_activate(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, *, relu: bool, side: Tensor | None
) -> Tensor:
    """Convolution, sum and ReLU; oneDNN does all three in one pass where it supports the type."""
    if (relu or side is not None) and x.dtype in (torch.float32, torch.bfloat16) and one_pass(x.dtype):
        shape = ([padding] * 2, [stride] * 2, [1, 1], 1)
        if side is None:
            after = "relu" if relu else "none"
            return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *shape, after, [], "")
        last: tuple[str | None, list[float], str | None] = ("relu", [], "") if relu else (None, [], None)
        return torch.ops.mkldnn._convolution_pointwise.binary(x, side, weight, bias, *shape, "add", 1.0, *last)
    out = F.conv2d(x, weight, bias, stride, padding)
    out = out if side is None else out.add_(side)
    return out.relu_() if relu else out


class BlockGradient:
    """Forward and backward pass of a block: convolutions with ReLU in sequence, and a shortcut."""

    def __init__(self, block: BlockSpec, layers: Mapping[str, Convolution]) -> None:
        steps = cast(tuple[ConvSpec, ...], block.steps)
        self.convs = [layers[step.name] for step in steps]
        self.relus = [step.activation == "relu" for step in steps]
        self.final_relu, self.residual = block.activation == "relu", block.shortcut is not None
        self.shortcut = layers[cast(ConvSpec, block.shortcut[0]).name] if block.shortcut else None

    def forward(self, x: Tensor) -> list[Tensor]:
        """The block's input, the output of every convolution after its ReLU, and the block's output."""
        kept = [x]
        joins = self.residual and not self.relus[-1]  # the last convolution also adds the shortcut
        for index, (relu, conv) in enumerate(zip(self.relus, self.convs, strict=True)):
            if index == len(self.convs) - 1 and joins:
                break
            kept.append(conv.forward(kept[-1], relu=relu))
        side = x if self.shortcut is None or not self.residual else self.shortcut.forward(x)
        if joins:
            out = self.convs[-1].forward(kept[-1], relu=self.final_relu, side=side)
            return [*kept, out, out]
        out = kept[-1] + side if self.residual else kept[-1]  # not in place: the ReLU's output is still a mask
        kept.append(out.relu_() if self.final_relu and self.residual else out)
        return kept

    def backward(self, gradient: Tensor, kept: list[Tensor], *, masked: bool) -> Tensor:
        """Gradient with respect to the block's input, zero where that is not positive if `masked`.

        `gradient` may be overwritten; after a final ReLU it must already be zero where the block's output is.
        """
        x = kept[0]
        beside = gradient
        if self.relus[-1] and self.residual:
            own = gradient.clone(memory_format=torch.preserve_format)
            gradient = mask_gradient_(own, kept[-2])
        for index in range(len(self.convs) - 1, -1, -1):
            inner = index > 0 and self.relus[index - 1]
            alone = index == 0 and masked and not self.residual
            gradient = self.convs[index].backward(gradient, kept[index], masked=inner or alone)
        if self.shortcut is not None:
            return self.shortcut.add_backward_(gradient, beside, x, masked=masked)
        return mask_gradient_(gradient, x if masked else None, beside) if self.residual else gradient

    @property
    def ends_in_relu(self) -> bool:
        """Whether the block's last operation is a ReLU."""
        return self.final_relu or (self.relus[-1] and not self.residual)


class InputGradient:
    """Logits and the gradient of an objective with respect to the images, for a folded network's weights.

    Parameters
    ----------
    spec : NetSpec
        A network for which `is_plain` holds.
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
        self.head, self.scale, self.shift = head, scale, shift
        self.dtype = layers[spec.convs[0].name][0].dtype

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
        weight, bias = self.head
        x, tape = (images * self.scale + self.shift).to(self.dtype), []
        for block in self.blocks:
            tape.append(block.forward(x))
            x = tape[-1][-1]
        logits = F.linear(x.mean((2, 3)).to(weight.dtype), weight, bias)
        pooled = (logit_gradient(logits) @ weight).to(self.dtype) / (x.shape[2] * x.shape[3])  # (batch, features)
        gradient = torch.empty_like(x).copy_(pooled[:, :, None, None])
        if self.blocks[-1].ends_in_relu:
            gradient = mask_gradient_(gradient, x)
        for block, before in zip(reversed(self.blocks), [*reversed(self.blocks[:-1]), None], strict=True):
            gradient = block.backward(gradient, tape.pop(), masked=before is not None and before.ends_in_relu)
        return logits, gradient.to(images.dtype) * self.scale
