"""The C kernels of maps against their plain twins, and what happens without a compiler."""

import ctypes
import subprocess

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, random_images, random_supernet, tiny_space

from proard.kernels import compiled, maps, native, plain_twins
from proard.kernels.maps import slope_
from proard.kernels.norm import norm_activation, plain_norm_activation, suits
from proard.nets import SubnetView

EPS = 1e-5
SHAPES = [(4, 3, 5, 5), (2, 11, 8, 8), (8, 16, 4, 4), (3, 70, 1, 2), (64, 33, 1, 1), (2, 1, 3, 3)]


def problem(shape: tuple[int, ...], dtype: torch.dtype, offset: float = 3.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    x = (2 * draw(*shape) + offset).to(dtype).contiguous(memory_format=torch.channels_last)
    seed = draw(*shape).to(dtype).contiguous(memory_format=torch.channels_last)
    return [x, draw(shape[1]).abs() + 0.5, draw(shape[1]), seed]


def with_gradients(function, x, scale, shift, seed, activation):
    leaves = [each.detach().clone().requires_grad_() for each in (x, scale, shift)]
    out, mean, var = function(*leaves, eps=EPS, activation=activation)
    return [out.detach(), mean, var, *torch.autograd.grad(out, leaves, seed)]


def test_this_machine_has_a_compiler_so_that_the_kernel_is_what_these_tests_see():
    assert isinstance(maps.maps_library(), ctypes.CDLL)


@pytest.mark.parametrize("activation", native.KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_activation_are_those_of_float64(shape, activation):
    x, scale, shift, seed = problem(shape, torch.float32)
    assert suits(x, scale, shift)
    exact = with_gradients(plain_norm_activation, *(each.double() for each in (x, scale, shift, seed)), activation)
    found = with_gradients(norm_activation, x, scale, shift, seed, activation)
    for ours, theirs in zip(found, exact, strict=True):
        assert float((ours - theirs).abs().max()) < 2e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("activation", native.KINDS)
def test_bfloat16_maps_are_rounded_once(activation):
    x, scale, shift, seed = problem((8, 11, 8, 8), torch.bfloat16)
    exact = with_gradients(plain_norm_activation, *(each.double() for each in (x, scale, shift, seed)), activation)
    found = with_gradients(norm_activation, x, scale, shift, seed, activation)
    assert found[0].dtype is found[3].dtype is torch.bfloat16
    for ours, theirs in zip(found, exact, strict=True):
        assert float((ours - theirs).abs().max()) < 2**-8 * max(1.0, float(theirs.abs().max()))


def test_a_large_mean_does_not_eat_the_variance():
    x, scale, shift, _ = problem((16, 5, 8, 8), torch.float32, offset=3000.0)
    _, mean, var = norm_activation(x, scale, shift, eps=EPS, activation="none")
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), unbiased=False), rtol=1e-4, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation", native.KINDS)
def test_what_is_not_a_number_is_passed_on(activation):
    x, scale, shift, seed = problem((4, 3, 5, 5), torch.float32)
    x[0, 1, 2, 2] = float("nan")
    out, dx = (with_gradients(norm_activation, x, scale, shift, seed, activation)[index] for index in (0, 3))
    for each in (out, dx):
        assert each[:, 1].isnan().all()
        assert not each[:, [0, 2]].isnan().any()


def test_silu_is_exact_far_from_zero():
    x, scale, _, seed = problem((4, 6, 5, 5), torch.float32)
    shift = torch.tensor([-300.0, -87.0, -20.0, 20.0, 87.0, 300.0])
    exact = with_gradients(plain_norm_activation, *(each.double() for each in (x, scale, shift, seed)), "silu")
    for ours, theirs in zip(with_gradients(norm_activation, x, scale, shift, seed, "silu"), exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_the_result_is_the_same_to_the_last_bit_in_every_run_at_equal_threads():
    x, scale, shift, seed = problem((32, 11, 16, 16), torch.float32)
    first = with_gradients(norm_activation, x, scale, shift, seed, "relu")
    for _ in range(5):
        for ours, again in zip(first, with_gradients(norm_activation, x, scale, shift, seed, "relu"), strict=True):
            assert torch.equal(ours, again)


def test_the_gradient_of_a_gradient_is_the_plain_twins():
    x, scale, shift, seed = problem((4, 3, 5, 5), torch.float32)

    def penalty(function) -> list[torch.Tensor]:
        leaves = [each.detach().clone().requires_grad_() for each in (x, scale, shift)]
        out, *_ = function(*leaves, eps=EPS, activation="h_swish")
        (gradient,) = torch.autograd.grad(out, leaves[0], seed, create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), leaves[:2]))

    for ours, theirs in zip(penalty(norm_activation), penalty(plain_norm_activation), strict=True):
        assert float(theirs.abs().max()) > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("adds", "masks"), [(True, True), (True, False), (False, True), (False, False)])
def test_gradients_join_and_are_masked(dtype, adds, masks):
    generator = torch.Generator().manual_seed(0)
    gradient, side, out = (torch.randn(2, 5, 7, 7, generator=generator).to(dtype) for _ in range(3))
    out = out.relu()
    expected = gradient + side if adds else gradient.clone()
    expected = torch.where(out > 0, expected, 0) if masks else expected
    found = slope_(gradient, out if masks else None, side if adds else None)
    assert found is gradient
    assert torch.equal(found, expected)


def test_maps_in_another_layout_go_the_plain_way():
    gradient, out = torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    out[0, 1] = 0
    assert torch.equal(slope_(gradient.clone(), out), gradient * (out > 0))
    x = torch.randn(2, 3, 4, 4)
    assert not suits(x, torch.ones(3), torch.ones(3))
    assert not suits(x.contiguous(memory_format=torch.channels_last).double(), torch.ones(3), torch.ones(3))


def test_a_subnets_training_pass_agrees_with_the_plain_one():
    net = random_supernet(tiny_space(TINY))
    images = random_images(net.space, 6).float()

    def loss_and_gradients() -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:
        view, record = SubnetView(net, net.space.largest), {}
        loss = F.cross_entropy(view(images, record=record), torch.arange(6) % 3)
        loss.backward()
        return loss.detach(), record, [leaf.grad for leaves in view.leaves.values() for leaf in leaves]

    with plain_twins():
        plain_loss, plain_record, plain = loss_and_gradients()
    loss, record, gradients = loss_and_gradients()
    torch.testing.assert_close(loss, plain_loss)
    assert record.keys() == plain_record.keys()
    for name in record:
        torch.testing.assert_close(record[name], plain_record[name])
    for ours, theirs in zip(gradients, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_without_a_compiler_the_plain_twin_runs_and_one_warning_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.warns(UserWarning, match="C kernels are not used.*no C compiler"):
        assert compiled.maps_library.__wrapped__() is None


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    broken = tmp_path / "broken.c"
    broken.write_text("int norm_forward(void) { return missing; }")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(subprocess.CalledProcessError) as error:
        compiled.build(broken)
    assert "missing" in error.value.stderr
    assert not list(tmp_path.glob("proard/*.so"))


def test_a_library_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }")
    made = compiled.build(source)
    assert ctypes.CDLL(str(made)).one() == 1
    written = made.stat()
    assert compiled.build(source) == made
    assert (made.stat().st_ino, made.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
