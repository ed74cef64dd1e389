"""The written-out input gradient of a folded network against autograd's."""

import platform

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, TINY_DEEP, TINY_MOBILE, TINY_POOL, TINY_SILU, random_images, random_supernet, tiny_space

from proard.attacks import differentiate, input_gradient, pgd
from proard.config import PRESETS
from proard.losses import CrossEntropy
from proard.nets import FoldedNet, SubnetView
from proard.nets.gradient import BlockGradient, Convolution, Kept
from proard.space import BlockSpec, ConvSpec, SearchSpace
from proard.stages import common

SPACES = {
    "basic": tiny_space(TINY),
    "deep_stem": tiny_space(TINY_DEEP),
    "strided_stem": tiny_space(TINY, stem={"channels": 8, "stride": 2}, image_size=16),
    "odd_maps": tiny_space(TINY_DEEP, image_size=9),
    "pooled": tiny_space(TINY_POOL, image_size=16),
    "odd_pooled": tiny_space(TINY_POOL, image_size=21),
    "mobile": tiny_space(TINY_MOBILE),
    "mobile_odd": tiny_space(TINY_MOBILE, image_size=11),
    "silu": tiny_space(TINY_SILU),
}


def folded(space: SearchSpace, genotype: list[int], dtype: torch.dtype = torch.float64) -> FoldedNet:
    view = SubnetView(random_supernet(space, dtype=torch.float64), space.arch(genotype))
    return view.folded(view.running_statistics(), dtype=dtype)


def problem(space: SearchSpace, count: int = 5) -> tuple[CrossEntropy, torch.Tensor]:
    labels = torch.arange(count) % space.settings.classes
    return CrossEntropy(labels), random_images(space, count)


@pytest.mark.parametrize("name", SPACES)
def test_it_is_autograds_in_float64_for_every_kind_of_block(name):
    space = SPACES[name]
    rng = np.random.default_rng(3)
    objective, images = problem(space)
    for genotype in [[count - 1 for count in space.choices], *space.sample(3, rng)]:
        net = folded(space, genotype)
        logits, gradient = net.input_gradient()(images, objective.logit_gradient)
        expected_logits, expected = input_gradient(net, objective, images)
        torch.testing.assert_close(logits, expected_logits, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12 * float(expected.abs().max()))
        assert float(expected.abs().max()) > 0
        leaf = images.contiguous().requires_grad_()
        again = net.input_gradient().differentiable(leaf)
        torch.testing.assert_close(again.detach(), logits)
        (taken,) = torch.autograd.grad(again, leaf, objective.logit_gradient(again.detach()))
        assert taken.is_contiguous()
        torch.testing.assert_close(taken, gradient)


def test_images_in_another_memory_layout_give_the_same():
    space = SPACES["strided_stem"]
    objective, images = problem(space)
    own = folded(space, space.sample(1, np.random.default_rng(0))[0]).input_gradient()
    for count in (1, 5):
        some = CrossEntropy(objective.labels[:count])
        first, again = (
            own(images[:count].contiguous(memory_format=layout), some.logit_gradient)[1]
            for layout in (torch.channels_last, torch.contiguous_format)
        )
        torch.testing.assert_close(first, again)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "side"), [(1, 1, 6), (1, 2, 6), (1, 2, 5), (3, 1, 6), (3, 2, 6), (3, 2, 5)]
)
def test_every_convolution_has_the_librarys_gradient(kernel, stride, side, masked):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    before = draw(2, 3, side, side).requires_grad_()
    x = F.relu(before) if masked else before
    weight, bias = draw(4, 3, kernel, kernel), draw(4)
    out = F.conv2d(x, weight, bias, stride, kernel // 2)
    seed = draw(*out.shape)
    (expected,) = torch.autograd.grad(out, before, seed)
    spec = ConvSpec("c", 3, 4, kernel, stride, out.shape[-1])
    conv, value = Convolution(spec, weight, bias), x.detach().contiguous(memory_format=torch.channels_last)
    kept = Kept(value, value, "relu" if masked else "none")
    torch.testing.assert_close(conv.forward(kept).value, out.detach())
    torch.testing.assert_close(conv.backward(seed, kept), expected)
    total = torch.ones_like(value)
    joined = (expected + 1) * (value > 0) if masked else expected + 1
    torch.testing.assert_close(conv.add_backward_(total, seed, kept), joined)


def test_a_relu_before_the_sum_masks_the_branch_and_not_the_shortcut():
    weight = torch.tensor([[[[1.0]], [[0.0]]], [[[0.0]], [[-1.0]]]])
    layer = ConvSpec("c", 2, 2, 1, 1, 1, "relu")
    block = BlockGradient(BlockSpec((layer,), ()), {"c": Convolution(layer, weight, torch.zeros(2))})
    kept = block.forward(Kept(torch.ones(1, 2, 1, 1)))
    assert kept[-1].value.flatten().tolist() == [2.0, 1.0]
    assert block.backward(torch.ones(1, 2, 1, 1), kept).flatten().tolist() == [2.0, 1.0]


@pytest.mark.parametrize("name", ["resnet_digits", "mobilenet_digits"])
def test_attacks_of_a_preset_agree_with_autograds(name):
    space = SearchSpace(PRESETS[name])
    net = folded(space, space.sample(1, np.random.default_rng(1))[0])
    objective, images = problem(space, 16)
    options = {"eps": 0.1, "step_size": 0.03, "num_steps": 4}
    fast, plain = (
        pgd(predict, objective, images, generator=torch.Generator().manual_seed(5), **options)
        for predict in (net, lambda x: net(x))
    )
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)
    assert net.input_gradient() is not None


def test_a_callable_without_a_method_of_its_own_is_differentiated_by_autograd():
    weight = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
    objective = CrossEntropy(torch.tensor([0]))
    logits, gradient = differentiate(lambda x: x @ weight)(objective, torch.tensor([[1.0, 1.0]]))
    expected = objective.logit_gradient(logits) @ weight.T
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_smaller_types_come_as_near_as_their_digits_allow(name, dtype, close):
    space = SPACES[name]
    objective, images = problem(space, 16)
    genotype = space.sample(1, np.random.default_rng(0))[0]
    exact_logits, exact = folded(space, genotype).input_gradient()(images, objective.logit_gradient)
    net = folded(space, genotype, dtype)
    logits, gradient = net.input_gradient()(images.float(), objective.logit_gradient)
    _, autograd = input_gradient(net, objective, images.float())
    assert float((logits - exact_logits).norm() / exact_logits.norm()) < close
    cosine = float(F.cosine_similarity(gradient.double().flatten(), exact.flatten(), dim=0))
    beside = float(F.cosine_similarity(autograd.double().flatten(), exact.flatten(), dim=0))
    assert 1 - cosine < 2 * (1 - beside) + 1e-6
    assert 1 - beside < close


def test_the_heap_is_kept_where_the_c_library_can_be_asked():
    assert common.keep_heap() is (platform.libc_ver()[0] == "glibc")
