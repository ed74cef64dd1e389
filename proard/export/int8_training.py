"""Quantisation-aware training of an int8 file's weights: the float weights behind its integers, trained under attack.

The network that is trained is the file's twin. Its integers are computed from float weights in every step, as the
quantiser computes them, and rounding passes the gradient on. Scales of activations stay those of the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from proard.attacks import pgd
from proard.config import Augmentation, Int8Training, Threat, UserError
from proard.data import Augmenter, ImageSet, epoch_order, keyed_generator
from proard.export.int8 import Recipe
from proard.export.twin import Scaled, Twin, Value, round_through
from proard.losses import KLToTarget, rslad_loss
from proard.progress import Progress
from proard.space import Work

MOMENTUM = 0.9
LONGEST = 2.5  # lengths of all attack steps together, in units of eps


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of the file: names of its constants there, and of the float model's initializers.

    Attributes
    ----------
    axis : int
        Of the weight's output channels.
    scale : str, optional
        Constant with the scale of the input; None where the layer computes in float32.
    """

    weight: str
    bias: str | None
    float_weight: str
    float_bias: str | None
    axis: int
    scale: str | None


class FakeQuantised:
    """The twin of an int8 file as a function of float weights.

    Parameters
    ----------
    path : path
        The file.
    model : ModelProto
        The folded float model that it was made of.
    recipe : Recipe
        How it was made.
    device : str
        Where the twin runs.

    Attributes
    ----------
    weights : dict of str to Tensor
        Float weights and biases, leaves that require gradients, by the name of the float model's initializer.
    """

    def __init__(self, path: str | Path, model: onnx.ModelProto, recipe: Recipe, *, device: str = "cpu") -> None:
        self.twin, self.largest = Twin(path).to(device), recipe.largest_weight
        nodes = {node.name: node for node in model.graph.node}
        made_by = {node.output[0]: node for node in self.twin.nodes}
        self.layers = [
            _layer(node, nodes[node.name], self.twin, made_by)
            for node in self.twin.nodes
            if node.op_type in ("Conv", "Gemm")
        ]
        trained = {name for layer in self.layers for name in (layer.float_weight, layer.float_bias) if name}
        values = {
            entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer if entry.name in trained
        }
        self.weights = {name: torch.tensor(value, device=device).requires_grad_() for name, value in values.items()}

    def rounded(self) -> dict[str, Value]:
        """The file's constants that follow from the float weights; differentiable."""
        constants: dict[str, Value] = {}
        for layer in self.layers:
            weight = self.weights[layer.float_weight]
            bias = None if layer.float_bias is None else self.weights[layer.float_bias]
            if layer.scale is None:
                constants[layer.weight] = weight
                if layer.bias and bias is not None:
                    constants[layer.bias] = bias
                continue
            scale = self._scale(weight.detach(), layer.axis)
            along = [-1 if dim == layer.axis else 1 for dim in range(weight.dim())]
            constants[layer.weight] = Scaled(round_through(weight / scale.view(along), self.largest), scale)
            if layer.bias and bias is not None:
                of_input = self.twin.constants[layer.scale]
                assert isinstance(of_input, Tensor)
                of_bias = scale * of_input
                constants[layer.bias] = Scaled(round_through(bias / of_bias), of_bias)
        return constants

    def _scale(self, weight: Tensor, axis: int) -> Tensor:
        """Scale of each output channel: its largest weight is the largest integer."""
        largest = weight.abs().amax([dim for dim in range(weight.dim()) if dim != axis])
        scale = (largest.double() / self.largest).float()
        return torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits with the weights as they are now."""
        return self.twin(images, self.rounded())

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The float weights for `with_weights`."""
        return {name: weight.detach().cpu().numpy().copy() for name, weight in self.weights.items()}


def _layer(node: onnx.NodeProto, of_float: onnx.NodeProto, twin: Twin, made_by: Mapping[str, onnx.NodeProto]) -> Layer:
    """Names of a layer's constants, in the file and in the float model."""
    options = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    source = made_by.get(node.input[0])
    in_int8 = isinstance(twin.constants[node.input[1]], Scaled) and source is not None
    biased = len(node.input) > 2 and bool(node.input[2])
    return Layer(
        weight=node.input[1],
        bias=node.input[2] if biased else None,
        float_weight=of_float.input[1],
        float_bias=of_float.input[2] if biased else None,
        axis=0 if node.op_type == "Conv" or options.get("transB") else 1,
        scale=source.input[1] if in_int8 and source is not None else None,
    )


def train_int8(
    net: FakeQuantised,
    teacher: Callable[[Tensor], Tensor],
    train: ImageSet,
    *,
    settings: Int8Training,
    threat: Threat,
    augment: Augmentation,
    macs: float,
    seed: int,
    label: str = "int8",
) -> tuple[list[float], Work]:
    """Train the float weights in place: RSLAD with the float student as the teacher of its own int8 file.

    Parameters
    ----------
    net : FakeQuantised
        Attacked and trained.
    teacher : callable
        The float student; its logits on the clean images are the target of clean and adversarial ones.
    train : ImageSet
        Images, augmented by `augment`.
    macs : float
        Multiply-accumulates of one image.
    seed : int
        Of order, augmentation and attacks.
    label : str
        Of the progress lines.

    Returns
    -------
    losses : list of float
        Of every step, in nats.
    work : Work
        Of the training.

    Raises
    ------
    UserError
        A loss is not finite.

    Notes
    -----
    SGD with Nesterov momentum, without weight decay; the learning rate is a cosine from `lr` to zero.
    """
    size = min(settings.batch_size, len(train))
    per_epoch = len(train) // size
    augmenter = Augmenter.of(train.images, augment)
    optimizer = torch.optim.SGD(net.weights.values(), lr=settings.lr, momentum=MOMENTUM, nesterov=True)
    attack = partial(
        pgd,
        eps=threat.eps,
        norm=threat.norm,
        step_size=LONGEST * threat.eps / settings.num_steps,
        num_steps=settings.num_steps,
    )
    progress, losses = Progress(label, settings.steps, "steps"), list[float]()
    for step in range(settings.steps):
        epoch, batch = divmod(step, per_epoch)
        if batch == 0:
            order, generator = epoch_order(len(train), seed=seed, epoch=epoch), keyed_generator(seed, epoch, 1)
        images = augmenter(order[batch * size : (batch + 1) * size], generator).contiguous()
        with torch.no_grad():
            target = teacher(images)
            fixed = net.rounded()
        adv = attack(partial(net.twin, weights=fixed), KLToTarget(target), images, generator=generator)
        trained = net.rounded()
        loss = rslad_loss(net.twin(images, trained), net.twin(adv, trained), target)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise UserError(
                f"quantize_student.training: the loss of step {step} is {losses[-1]}; lower lr, now {settings.lr:g}"
            )
        optimizer.param_groups[0]["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.advance(note=f"loss {losses[-1]:.4f}")
    progress.close()
    passes = 1 + 2 * settings.num_steps + 3 + 3  # teacher, attack, clean and adversarial images
    return losses, (settings.steps * size) * Work(passes, passes * macs, 1.0)
