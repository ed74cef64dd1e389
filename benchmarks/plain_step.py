"""The released code's training step, rewritten from its description, and the first levers on it (rows V0 to V6).

One step trains one subnet by RSLAD on one batch. The baseline (no lever) does, in this order:

1. teacher forward without graph, whose output is not used,
2. student forward in training mode for a metric; it also moves the running statistics,
3. teacher forward again, its graph kept,
4. PGD on the student in evaluation mode from x + 0.001 N(0, 1), ascending KL(teacher || student) summed over the
   batch, gradient by autograd with respect to the input, chained clamps to ball and box,
5. student forwards in training mode: adversarial, then clean,
6. 5/6 of the adversarial and 1/6 of the clean divergence, backward, SGD with Nesterov momentum, a loop over tensors.

Weights lie in NCHW memory, and every student forward slices and copies the active ones anew.

The first lever alone (row V1) is the second baseline, `plain`: a fair textbook step. The teacher runs under no_grad,
the attack takes the gradient of the input alone, each forward is made once; but every forward slices the weights,
memory is NCHW, norms are not folded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proard.attacks import pgd
from proard.kernels import convolution
from proard.losses import KLToTarget
from proard.nets import SubnetView, Supernet, run_network
from proard.nets.elastic import BN_EPS, BN_MOMENTUM
from proard.nets.view import Statistics
from proard.space import Arch, ConvSpec, key_of


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of the step; `eps`, `step_size` in pixel units. Values of the released code's last phases."""

    num_steps: int = 10
    eps: float = 0.031
    step_size: float = 0.0078
    adv_weight: float = 5 / 6
    lr: float = 7.5e-3
    momentum: float = 0.9
    weight_decay: float = 3e-5


@dataclass(frozen=True)
class Levers:
    """Optimisations of a row over the released step; each row has all levers of the rows above it."""

    few_forwards: bool = False
    channels_last: bool = False
    view_in_attack: bool = False
    fold_in_attack: bool = False
    closed_form: bool = False
    written_out: bool = False


@dataclass(frozen=True)
class Outcome:
    """A step's adversarial images and the training-mode logits on clean and adversarial images."""

    adv: Tensor
    clean_logits: Tensor
    adv_logits: Tensor


class PlainStep:
    """The released step with some levers; the student is changed in place, the teacher is used at its largest arch."""

    def __init__(self, student: Supernet, teacher: Supernet, recipe: Recipe, levers: Levers) -> None:
        self.layout = torch.channels_last if levers.channels_last else torch.contiguous_format
        self.net, self.teacher = student.to(memory_format=self.layout), teacher.to(memory_format=self.layout)
        self.recipe, self.levers = recipe, levers
        self.moves = ("clean", "adv") if levers.few_forwards else ("clean", "adv", "clean")
        self.optimizer = loop_sgd(self.net, recipe)

    def __call__(self, arch: Arch, images: Tensor, labels: Tensor, generator: torch.Generator) -> Outcome:
        """Train `arch` on one batch."""
        self.optimizer.zero_grad(set_to_none=False)
        with torch.no_grad():
            target = self._teach(images)
        clean = self._student(arch, images, training=True)  # serves the metric and moves the statistics
        right = int((clean.detach().argmax(1) == labels).sum())
        if not self.levers.few_forwards:
            target = self._teach(images)
        adv_images = self._attack(arch, images, target, generator)
        adv = self._student(arch, adv_images, training=True)
        if not self.levers.few_forwards:
            clean = self._student(arch, images, training=True)
        weight = self.recipe.adv_weight
        loss = weight * _divergence(adv, target) + (1 - weight) * _divergence(clean, target)
        loss.backward()
        self.optimizer.step()
        self.metrics = (float(loss.detach()), right)
        return Outcome(adv_images, clean.detach(), adv.detach())

    def _student(self, arch: Arch, images: Tensor, *, training: bool) -> Tensor:
        """Student logits from freshly sliced weights."""
        return sliced_forward(self.net, arch, images, partial(stored_norm, training=training), layout=self.layout)

    def _teach(self, images: Tensor) -> Tensor:
        """Teacher logits, in evaluation mode."""
        return sliced_forward(self.teacher, self.teacher.space.largest, images, layout=self.layout)

    def _attack(self, arch: Arch, images: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Adversarial images, from the form of the subnet that the levers select."""
        recipe, levers = self.recipe, self.levers
        attack = {"eps": recipe.eps, "step_size": recipe.step_size, "num_steps": recipe.num_steps}
        predict = partial(self._student, arch, training=False)
        if levers.view_in_attack:
            view = SubnetView(self.net, arch)
            fixed = view.running_statistics()
            predict = view.folded(fixed, dtype=images.dtype) if levers.fold_in_attack else unfolded(view, fixed)
        if levers.closed_form:
            if not levers.written_out:
                predict = partial(predict)  # hides the network's own input gradient, so that autograd is used
            return pgd(predict, KLToTarget(target), images, start="gaussian", generator=generator, **attack)
        noise = torch.empty(images.shape, dtype=images.dtype).normal_(generator=generator)
        start = images + 0.001 * noise.to(images.device, memory_format=self.layout)

        def divergence(logits: Tensor) -> Tensor:
            return F.kl_div(F.log_softmax(logits, 1), F.softmax(target, 1), reduction="sum")

        return chained_pgd(predict, divergence, images, start, **attack)


Norm = Callable[[ConvSpec, nn.BatchNorm2d, Tensor], Tensor]


def stored_norm(layer: ConvSpec, bn: nn.BatchNorm2d, x: Tensor, *, training: bool = False) -> Tensor:
    """Batch norm by the stored statistics of a layer's channels, or by the batch's, which move them."""
    stored = (values[: layer.out_channels] for values in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    return F.batch_norm(x, *stored, training=training, momentum=BN_MOMENTUM, eps=BN_EPS)


def sliced_forward(
    net: Supernet,
    arch: Arch,
    images: Tensor,
    norm: Norm = stored_norm,
    *,
    layout: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Logits of a subnet whose weights are sliced and copied in each call, as in the released layers."""

    def conv(layer: ConvSpec, x: Tensor) -> Tensor:
        elastic, out = net.layers[key_of(layer)], layer.out_channels
        weight = elastic.filters(out, layer.in_channels, layer.kernel).contiguous(memory_format=layout)
        bias = None if elastic.bias is None else elastic.bias[:out]
        x = convolution(x, weight, bias, stride=layer.stride, groups=layer.groups)
        return x if elastic.bn is None else norm(layer, elastic.bn, x)

    def head(features: Tensor) -> Tensor:
        return F.linear(features, net.head.weight[:, : features.shape[1]].contiguous(), net.head.bias)

    return run_network(net.space.spec(arch), images, conv, head)


def unfolded(view: SubnetView, statistics: Statistics) -> Callable[[Tensor], Tensor]:
    """Turn a view into a function of images, batch norm on fixed statistics but not folded."""
    leaves = {name: tuple(leaf.detach() for leaf in tensors) for name, tensors in view.leaves.items()}
    head = (view.head_weight.detach(), view.head_bias.detach())

    def conv(layer: ConvSpec, x: Tensor) -> Tensor:
        weight, *others = leaves[layer.name]
        if not layer.norm:
            return convolution(x, weight, *others, stride=layer.stride, groups=layer.groups)
        x = convolution(x, weight, stride=layer.stride, groups=layer.groups)
        return F.batch_norm(x, *statistics[layer.name], *others, training=False, eps=BN_EPS)

    def predict(images: Tensor) -> Tensor:
        return run_network(view.spec, images, conv, lambda features: F.linear(features, *head))

    return predict


def chained_pgd(
    predict: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    start: Tensor,
    *,
    eps: float,
    step_size: float,
    num_steps: int,
) -> Tensor:
    """PGD from `start` on a loss of the logits, by autograd, with one clamp after the other."""
    adv = start
    for _ in range(num_steps):
        adv.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(predict(adv)), adv)
        adv = adv.detach() + step_size * gradient.sign()
        adv = torch.minimum(torch.maximum(adv, images - eps), images + eps)
        adv = adv.clamp(0, 1)
    return adv


def nesterov(net: nn.Module, recipe: Recipe, **how: bool) -> torch.optim.SGD:
    """Nesterov SGD with weight decay; norms, biases and kernel transforms are not decayed."""
    decay: dict[float, list[nn.Parameter]] = {recipe.weight_decay: [], 0.0: []}
    for name, parameter in net.named_parameters():
        decay[0.0 if parameter.ndim == 1 or ".transforms." in name else recipe.weight_decay].append(parameter)
    groups = [{"params": members, "weight_decay": rate} for rate, members in decay.items()]
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=True, **how)


def loop_sgd(net: Supernet, recipe: Recipe) -> torch.optim.SGD:
    """Nesterov SGD that loops over tensors; gradients and momentum exist from the start, so no tensor is skipped."""
    optimizer = nesterov(net, recipe, foreach=False)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _divergence(logits: Tensor, target: Tensor) -> Tensor:
    """RSLAD's divergence, the released small constant in the teacher's logarithm included; mean over images."""
    teacher = F.softmax(target.detach(), 1)
    elements = teacher * torch.log(teacher + 1e-5) - teacher * F.log_softmax(logits, 1)
    return elements.mean() * logits.shape[1]  # the released code takes the mean over images and classes
