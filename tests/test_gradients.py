"""Gradients of a training step are those of the backend without oneDNN, on whatever CPU this is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from proard.config import PRESETS
from proard.doctor.arithmetic import ALIKE, lowest_cosine, middle
from proard.kernels import Conv2d, convolution
from proard.nets.forward import convolve, run_network
from proard.space import Arch, ConvSpec, SearchSpace

SHALLOW = ("mobilenet_digits", "mobilenet_micro", "resnet_digits", "resnet_micro")
SIDE = 64  # pixels that images of 224 shrink to: channels stay


def of_size(name: str, size: str) -> tuple[SearchSpace, Arch]:
    settings = PRESETS[name]
    space = SearchSpace(settings.model_copy(update={"image_size": min(settings.image_size, SIDE)}))
    return space, middle(space) if size == "middle" else getattr(space, size)


@pytest.mark.parametrize("size", ["smallest", "middle", "largest"])
@pytest.mark.parametrize("name", SHALLOW)
def test_every_gradient_of_a_step_is_right(name, size):
    space, arch = of_size(name, size)
    cosine, parameter = lowest_cosine(space, arch, batch=32)
    assert cosine >= ALIKE, f"{parameter} of {name}, {size}: cosine {cosine}"


@pytest.mark.parametrize("size", ["smallest", "middle", "largest"])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_convolution_of_a_preset_has_right_gradients(name, size):
    """Layer by layer: through fifty layers at random weights, rounding alone lowers the cosine to 0.999."""
    space, arch = of_size(name, size)
    met: dict[tuple, tuple[ConvSpec, torch.Size]] = {}

    def conv(layer: ConvSpec, x: torch.Tensor) -> torch.Tensor:
        met.setdefault((layer.in_channels, layer.out_channels, layer.kernel, layer.stride, x.shape), (layer, x.shape))
        return convolve(layer, x, torch.empty(weight_shape(layer), device="meta"))

    spec = space.spec(arch)
    images = torch.empty(2, spec.image_channels, space.settings.image_size, space.settings.image_size, device="meta")
    run_network(spec, images, conv, lambda features: features)
    generator = torch.Generator().manual_seed(0)
    for layer, shape in met.values():
        x, weight = (torch.randn(each, generator=generator) for each in (shape, weight_shape(layer)))
        given = [each.contiguous(memory_format=torch.channels_last).requires_grad_() for each in (x, weight)]
        exact = [each.detach().double().requires_grad_() for each in (x, weight)]
        out = convolve(layer, *given)
        seed = torch.randn(out.shape, generator=generator)
        out.backward(seed.contiguous(memory_format=torch.channels_last))
        F.conv2d(*exact, None, layer.stride, layer.kernel // 2, 1, layer.groups).backward(seed.double())
        for own, other in zip(given, exact, strict=True):
            cosine = F.cosine_similarity(own.grad.double().flatten(), other.grad.flatten(), 0)
            assert cosine >= ALIKE, f"{layer} at {tuple(shape)}: cosine {cosine}"


def weight_shape(layer: ConvSpec) -> tuple[int, int, int, int]:
    return layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("channels", [1, 3, 4, 7, 8, 17])
@pytest.mark.parametrize("side", [7, 8, 32])
def test_a_strided_pointwise_convolution_equals_the_librarys(channels, side, layout):
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, channels, side, side), (5, channels, 1, 1), (5,))
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    x = x.contiguous(memory_format=layout)
    wanted = [each.clone().requires_grad_() for each in (x, weight, bias)]
    expected = F.conv2d(*wanted, stride=2)
    seed = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    expected.backward(seed)
    given = [each.float().requires_grad_() for each in (x, weight, bias)]
    found = convolution(*given, stride=2)
    found.backward(seed.float())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    for own, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(own.grad.double(), other.grad, rtol=1e-4, atol=1e-4)


class Strided(torch.nn.Module):
    """One strided 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.conv = Conv2d(4, 8, 1, 2)

    def forward(self, x):
        return self.conv(x)


def test_exported_files_keep_one_strided_convolution():
    net, x = Strided(), torch.rand(2, 4, 8, 8)
    program = torch.export.export(net, (x,))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert [target for target in called if "conv2d" in str(target)] == called
    torch.testing.assert_close(program.module()(x), net(x))
