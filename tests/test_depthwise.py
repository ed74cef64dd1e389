"""Depthwise convolutions: the package's gradients against torch's."""

import pytest
import torch
import torch.nn.functional as F

from proard.kernels import plain_twins
from proard.kernels.depthwise import depthwise_convolution, pays


def problem(channels: int, side: int, kernel: int, stride: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(channels + kernel)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((3, channels, side, side), (channels, 1, kernel, kernel), (channels,))
    )
    x = x.contiguous(memory_format=torch.channels_last)
    out = F.conv2d(x, weight, bias, stride, kernel // 2, 1, channels)
    seed = torch.randn(out.shape, generator=generator).to(dtype)
    return [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), seed]


SHAPES = [(c, side, kernel, stride) for c in (1, 20) for side in (8, 7) for kernel in (3, 5, 7) for stride in (1, 2)]


@pytest.mark.parametrize(("channels", "side", "kernel", "stride"), SHAPES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
def test_result_and_gradients_are_those_of_float64(channels, side, kernel, stride, dtype, close):
    *leaves, seed = problem(channels, side, kernel, stride, dtype)
    assert pays(leaves[0], leaves[1], stride) == (kernel > 3 or (dtype is torch.bfloat16 and stride > 1))
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = F.conv2d(*exact, stride, kernel // 2, 1, channels)
    wanted = [expected.detach(), *torch.autograd.grad(expected, exact, seed.double())]
    out = depthwise_convolution(*leaves, stride)
    found = [out.detach(), *torch.autograd.grad(out, leaves, seed)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype is dtype
        assert float((ours - theirs).abs().max()) <= close * float(theirs.abs().max())


def test_the_gradient_of_a_gradient_is_the_librarys():
    x, weight, _, seed = problem(4, 6, 5, 2, torch.float32)

    def penalty(convolve) -> tuple[torch.Tensor, ...]:
        (gradient,) = torch.autograd.grad(convolve(x, weight), x, seed, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), weight)

    ours = penalty(lambda x, weight: depthwise_convolution(x, weight, None, 2))
    theirs = penalty(lambda x, weight: F.conv2d(x, weight, None, 2, 2, 1, 4))
    assert float(theirs[0].abs().max()) > 0
    torch.testing.assert_close(ours, theirs)


def test_autocast_computes_in_bfloat16_and_gives_gradients_in_the_leaves_type():
    x, weight, _, _ = problem(8, 6, 5, 1, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = depthwise_convolution(x, weight, None, 1)
    assert out.dtype is torch.bfloat16
    out.float().square().sum().backward()
    assert x.grad.dtype is weight.grad.dtype is torch.float32
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    F.conv2d(*exact, None, 1, 2, 1, 8).square().sum().backward()
    for leaf, reference in zip((x, weight), exact, strict=True):
        cosine = F.cosine_similarity(leaf.grad.double().flatten(), reference.grad.flatten(), dim=0)
        assert float(cosine) > 0.999


def test_without_a_gradient_or_the_c_kernel_the_library_does_all():
    x, weight, *_ = problem(4, 6, 5, 1, torch.float32)
    with torch.no_grad():
        assert not pays(x, weight, 1)
    assert not pays(x.detach().double().requires_grad_(), weight.detach().double(), 1)
    assert pays(x, weight, 1)
    with plain_twins("depthwise"):
        assert not pays(x, weight, 1)
