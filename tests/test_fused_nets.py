"""Whole networks with the fused kernels of a GPU, through Triton's interpreter where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL_SPACES, TINY, TINY_DEEP, TINY_MOBILE, random_images, random_supernet, tiny_space

from proard.attacks import input_gradient
from proard.kernels import dispatch, plain_twins, prove
from proard.kernels.cudnn import CudnnEpilogues, NoEpilogues
from proard.kernels.native import KINDS
from proard.kernels.switch import fused_on_cpu
from proard.losses import CrossEntropy
from proard.nets import SubnetView

pytest.importorskip("triton")
NARROW = {"channel_multiple": 1, "width": [0.4, 0.65, 1]}  # channel counts that are no multiples of 8


class FakeCudnn:
    """Counts its calls; has no engine for one shape of filters."""

    def __init__(self, without: tuple[int, ...] = ()) -> None:
        self.calls, self.without = 0, without

    def cudnn_convolution_relu(self, x, weight, bias, stride, padding, dilation, groups):
        self.calls += 1
        if tuple(weight.shape) == self.without:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))

    def cudnn_convolution_add_relu(self, x, weight, side, alpha, bias, *shape):
        assert alpha == 1
        self.calls += 1
        return F.relu(F.conv2d(x, weight, bias, *shape) + side)


def kernels(library=None) -> dispatch.Fused:
    return dispatch.all_fused(CudnnEpilogues(library) if library else NoEpilogues(), types=(torch.float32,))


def middle(space):
    return space.arch([count // 2 for count in space.choices])


@pytest.mark.parametrize("settings", SMALL_SPACES, ids=lambda settings: settings["name"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_input_gradient_of_every_kind_of_block_is_autograds(settings, padded):
    space = tiny_space(settings, **NARROW)
    view = SubnetView(random_supernet(space, dtype=torch.float32), middle(space), multiple=8 if padded else 1)
    net, images = view.folded(view.running_statistics()), random_images(space, 5, dtype=torch.float32)
    objective, library = CrossEntropy(torch.arange(5) % 3), FakeCudnn()
    logits, expected = input_gradient(lambda x: net(x), objective, images)
    with fused_on_cpu(kernels(library)):
        found, gradient = net.input_gradient()(images, objective.logit_gradient)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()) + 1e-6)
    assert gradient.shape == images.shape
    without_relu = settings["name"] in ("tiny_mobile", "tiny_silu")  # behind 3x3 layers
    assert (library.calls > 0) == (padded and not without_relu)


def test_shapes_without_an_engine_are_tried_once_and_take_the_other_way():
    space = tiny_space(TINY)
    view = SubnetView(random_supernet(space, dtype=torch.float32), space.largest, multiple=8)
    net, images = view.folded(view.running_statistics()), random_images(space, 3, dtype=torch.float32)
    library = FakeCudnn(without=(8, 8, 3, 3))
    own = kernels(library)
    expected, counts = net(images), []
    for _ in range(2):
        with fused_on_cpu(own):
            torch.testing.assert_close(net.input_gradient().logits(images), expected, rtol=1e-4, atol=1e-5)
        counts.append(library.calls)
    assert counts[1] - counts[0] < counts[0]
    assert {key[3] for key in own.library.refused} == {(8, 8, 3, 3)}


@pytest.mark.parametrize("settings", SMALL_SPACES, ids=lambda settings: settings["name"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_training_pass_has_the_plain_ones_loss_gradients_and_statistics(settings, padded):
    space = tiny_space(settings, **NARROW)
    images, labels = random_images(space, 6, dtype=torch.float32), torch.arange(6) % 3

    def trained(multiple: int) -> list[torch.Tensor]:
        net = random_supernet(space, dtype=torch.float32)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        view = SubnetView(net, middle(space), multiple=multiple)
        loss = F.cross_entropy(view(images, update_running=True), labels)
        loss.backward()
        zeros = [leaf for leaves in view.leaves.values() for leaf in leaves]
        for conv in view.spec.convs:
            assert all(float(leaf.grad[conv.out_channels :].abs().sum()) == 0 for leaf in view.leaves[conv.name])
        assert any(leaf.shape[0] % 8 for leaf in zeros) == (multiple == 1)
        view.scatter_gradients()
        buffers = [buffer for name, buffer in net.named_buffers() if "running" in name]
        return [loss.detach(), *(parameter.grad for parameter in net.parameters()), *buffers]

    with plain_twins():
        expected = trained(1)
    with fused_on_cpu(kernels()):
        found = trained(8 if padded else 1)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-5)
    assert sum(float(each.abs().sum()) > 0 for each in expected) > len(expected) / 2


@pytest.mark.parametrize("settings", [TINY_DEEP, TINY_MOBILE], ids=lambda settings: settings["name"])
def test_zero_channels_change_no_logit(settings):
    space = tiny_space(settings, **NARROW)
    view = SubnetView(random_supernet(space), middle(space))
    net, images = view.folded(view.running_statistics(), dtype=torch.float64), random_images(space, 4)
    wide = net.padded(8)
    assert all(len(weight) % 8 == 0 for weight, _ in wide.layers.values())
    torch.testing.assert_close(wide(images), net(images), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(wide.input_gradient().logits(images), net(images), rtol=1e-10, atol=1e-10)


def test_the_gradient_of_a_gradient_with_a_sum_is_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    x, side, seed = (torch.randn(3, 5, 4, 4, generator=generator) for _ in range(3))
    x, side, seed = (each.contiguous(memory_format=torch.channels_last) for each in (x, side, seed))

    def penalty() -> list[torch.Tensor]:
        from proard.kernels import norm_activation

        leaves = [each.detach().clone().requires_grad_() for each in (x, torch.ones(5), torch.zeros(5), side)]
        out, *_ = norm_activation(*leaves[:3], eps=1e-5, activation="relu", side=leaves[3])
        (gradient,) = torch.autograd.grad(out, leaves[0], seed, create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), leaves[:2]))

    expected = penalty()
    with fused_on_cpu(kernels()):
        found = penalty()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", prove.CHECKS)
def test_every_kernel_is_right_for_every_activation_and_odd_shapes(name):
    maps = {"shapes": ((2, 8, 1, 1), (3, 24, 7, 5), (1, 16, 9, 11), (2, 72, 4, 4))}
    images = {"shapes": ((1, 3, 1, 1), (2, 3, 9, 11), (3, 1, 7, 5))}
    kinds = {"kinds": KINDS, "types": (torch.float32,)}
    how = {
        "updates": images,
        "noise": images,
        "logit gradients": {"batches": ((1, 1), (3, 7)), "types": tuple(prove.ROUNDING)},
        "passes": maps | kinds,
        "batch norm": maps | kinds,
        "products": {"channels": ((8, 24), (40, 72)), "sizes": ((3, 7, 5),)},
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prove.require(prove.CHECKS[name](kernels(), device, **how[name]))


def test_without_products_a_convolution_and_a_pass_take_their_place():
    space = tiny_space(TINY)
    view = SubnetView(random_supernet(space, dtype=torch.float32), space.largest, multiple=8)
    net, images = view.folded(view.running_statistics()), random_images(space, 3, dtype=torch.float32)
    without = replace(kernels(), product=SimpleNamespace(suits=kernels().product.suits))
    with fused_on_cpu(without), plain_twins("products"):
        found = net.input_gradient().logits(images)
    torch.testing.assert_close(found, net(images), rtol=1e-4, atol=1e-5)
    with fused_on_cpu(without), pytest.raises(AttributeError, match="product"):
        net.input_gradient().logits(images)


def test_maps_whose_channels_fill_no_vector_take_the_reference():
    maps = kernels().maps
    assert maps.fits(torch.zeros(2, 16, 3, 3).contiguous(memory_format=torch.channels_last))
    assert not maps.fits(torch.zeros(2, 12, 3, 3).contiguous(memory_format=torch.channels_last))


def test_results_of_a_check_are_read_from_its_process_and_its_failure_is_quoted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (0, 0))
    device = torch.device("cuda")
    assert dispatch.checked(device, (sys.executable, "-c", "print('{\"cudnn\": false}')")) == {"cudnn": False}
    code = "import sys; print('it is wrong', file=sys.stderr); sys.exit(3)"
    with pytest.raises(RuntimeError, match="ended with code 3: it is wrong"):
        dispatch.checked(device, (sys.executable, "-c", code))
    with pytest.raises(RuntimeError, match="ended with code -9: no output"):  # as after a lost context
        dispatch.checked(device, (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))


def test_a_library_that_reads_what_it_should_not_is_found_out():
    class Reads(FakeCudnn):
        def cudnn_convolution_relu(self, *given):
            return super().cudnn_convolution_relu(*given) + torch.nan

    device = torch.device("cpu")
    assert prove.works(CudnnEpilogues(FakeCudnn()), device, torch.float32)
    assert not prove.works(CudnnEpilogues(Reads()), device, torch.float32)
    assert not prove.works(CudnnEpilogues(object()), device, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves")
def test_kernels_compile_for_gpus_that_are_not_here():
    """Triton needs no GPU to make machine code: types, layouts and the assembler's limits are checked."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "import json, compile_kernels; print(json.dumps(compile_kernels.shared_memory()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=os.path.dirname(__file__), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert len(sizes) == 14
    assert max(sizes.values()) <= 99 * 1024  # bytes that a program may use on the smallest of these GPUs
