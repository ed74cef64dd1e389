"""Networks: elastic layers, supernet, views, extraction, folding, recalibration, files."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CLASSES,
    SMALL_SPACES,
    TINY,
    random_archs,
    random_images,
    random_supernet,
    tiny_space,
)
from torch import nn

from proard.artifacts import ArtifactError, Provenance, save_tensors
from proard.nets import (
    ElasticConvNorm,
    SubnetView,
    Supernet,
    extract,
    fold,
    load_static,
    load_supernet,
    recalibrate,
    save_static,
    save_supernet,
)
from proard.nets.elastic import BN_MOMENTUM

exactly = partial(torch.testing.assert_close, rtol=0, atol=0)
closely = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
spaces = pytest.mark.parametrize("settings", SMALL_SPACES, ids=lambda entry: entry["name"])


def problem(settings, *, images=6, seed=0):
    """A random supernet in float64, images, and archs from end to end."""
    space = tiny_space(settings)
    archs = [space.smallest, space.largest, *random_archs(space, 4, seed=seed)]
    return random_supernet(space, seed=seed), random_images(space, images, seed=seed), archs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_full_width_layer_equals_conv_and_batch_norm(training, kernel, stride):
    layer = ElasticConvNorm(4, 6, kernel=kernel, stride=stride).double().train(training)
    nn.init.normal_(layer.weight)
    plain = nn.Sequential(nn.Conv2d(4, 6, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(6)).double()
    plain[0].load_state_dict({"weight": layer.weight})
    plain[1].load_state_dict(layer.bn.state_dict())
    plain.train(training)
    x = torch.randn(5, 4, 8, 8, dtype=torch.float64)
    closely(layer(x, 6), plain(x))
    closely(layer.bn.running_mean, plain[1].running_mean)
    closely(layer.bn.running_var, plain[1].running_var)


def test_narrow_layer_is_the_leading_part_of_the_full_one():
    layer = ElasticConvNorm(4, 6, kernel=3, stride=1).double()
    nn.init.normal_(layer.weight)
    x = torch.randn(5, 4, 8, 8, dtype=torch.float64)
    closely(layer(x, 3), layer(x, 6)[:, :3])


@spaces
def test_supernet_view_and_extracted_network_agree_in_training_mode(settings):
    net, images, archs = problem(settings)
    for arch in archs:
        static, view = extract(net.train(), arch), SubnetView(net, arch)
        before = {name: value.clone() for name, value in net.named_buffers()}
        logits = view(images)
        exactly(dict(net.named_buffers()), before)  # a plain call of a view moves nothing
        closely(net(images, arch), logits)
        closely(static(images), logits)


@spaces
def test_supernet_view_and_extracted_network_agree_in_evaluation_mode(settings):
    net, images, archs = problem(settings)
    for arch in archs:
        static, view = extract(net.eval(), arch), SubnetView(net, arch)
        exactly(static(images), net(images, arch))
        closely(fold(static, dtype=torch.float64)(images), static(images))
        closely(view.folded(view.running_statistics(), dtype=torch.float64)(images), static(images))


def test_extracted_network_shares_no_memory_with_the_supernet():
    net, images, _ = problem(TINY)
    static = extract(net.eval(), net.space.largest)
    folded = fold(static, dtype=torch.float64)
    before = static(images), folded(images)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.zero_()
    exactly((static(images), folded(images)), before)


@spaces
def test_gradients_of_views_equal_those_of_the_plain_supernet(settings):
    net, images, archs = problem(settings)
    labels = torch.arange(len(images)) % CLASSES
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for arch in archs:  # several archs accumulate
        F.cross_entropy(net(images, arch), labels).backward()
    expected = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad.zero_()
    for arch in archs:
        view = SubnetView(net, arch)
        F.cross_entropy(view(images), labels).backward()
        view.scatter_gradients()
    closely({name: parameter.grad for name, parameter in net.named_parameters()}, expected)


def test_view_adds_the_gradients_of_its_clean_and_its_adversarial_pass():
    net, images, archs = problem(TINY)
    other = images.flip(0) * 0.9
    (net(images, archs[1]).square().sum() + net(other, archs[1]).sin().sum()).backward()
    expected = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad.zero_()
    view = SubnetView(net, archs[1])
    (view(images).square().sum() + view(other).sin().sum()).backward()
    view.scatter_gradients()
    closely({name: parameter.grad for name, parameter in net.named_parameters()}, expected)


def test_frozen_view_gives_gradients_to_images_only():
    net, images, archs = problem(TINY)
    view = SubnetView(net, archs[2])
    images.requires_grad_()
    view(images, frozen=True).square().sum().backward()
    assert images.grad.abs().sum() > 0
    leaves = [leaf for layer in view.leaves.values() for leaf in layer] + [view.head_weight, view.head_bias]
    assert all(leaf.grad is None for leaf in leaves)
    assert all(parameter.grad is None for parameter in net.parameters())


@spaces
def test_running_statistics_move_as_in_the_plain_supernet(settings):
    plain, images, archs = problem(settings)
    viewed, _, _ = problem(settings)
    for arch in archs:
        plain(images, arch)
        SubnetView(viewed, arch)(images, update_running=True)
    closely(dict(viewed.named_buffers()), dict(plain.named_buffers()))


def test_running_statistics_move_by_the_momentum_of_an_ordinary_batch_norm():
    assert nn.BatchNorm2d(1).momentum == BN_MOMENTUM


@spaces
def test_statistics_recorded_on_the_clean_batch_fold_to_its_training_logits(settings):
    net, images, archs = problem(settings)
    for arch in archs:
        view, record = SubnetView(net, arch), {}
        logits = view(images, record=record)
        closely(view.folded(record, dtype=torch.float64)(images), logits.detach())


def test_recording_does_not_change_what_moves_the_running_statistics():
    net, images, archs = problem(TINY)
    other, _, _ = problem(TINY)
    SubnetView(net, archs[2])(images, record={}, update_running=True)
    SubnetView(other, archs[2])(images, update_running=True)
    exactly(dict(net.named_buffers()), dict(other.named_buffers()))


def test_folded_float32_network_is_close_to_the_unfolded_one():
    net, images, archs = problem(TINY)
    for arch in archs:
        static = extract(net.eval(), arch).float()
        torch.testing.assert_close(fold(static)(images.float()), static(images.float()), rtol=1e-4, atol=1e-4)


def test_bfloat16_network_returns_float32_logits():
    net, images, archs = problem(TINY)
    static = extract(net.eval(), archs[0]).float()
    logits = fold(static, dtype=torch.bfloat16)(images.float())
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits, static(images.float()), rtol=0.1, atol=0.1)


def slow_statistics(net, images, batch_size):
    """Mean over whole batches of every norm's batch statistics, by hooks on an ordinary training-mode forward."""
    sums, batches = {}, [batch for batch in images.split(batch_size) if len(batch) == batch_size]
    handles = []
    for name, norm in net.norms.items():

        def add(_module, inputs, _output, name=name):
            var, mean = torch.var_mean(inputs[0], (0, 2, 3))
            old = sums.get(name, (0, 0))
            sums[name] = (old[0] + mean / len(batches), old[1] + var / len(batches))

        handles.append(norm.register_forward_hook(add))
    net.train()
    with torch.no_grad():
        for batch in batches:
            net(batch)
    for handle in handles:
        handle.remove()
    return sums


@spaces
def test_recalibration_equals_a_slow_reference(settings):
    net, images, archs = problem(settings, images=14)
    for arch in archs:
        static = extract(net, arch)
        expected = slow_statistics(extract(net, arch), images, 4)  # the last two images are left out
        assert recalibrate(static, images, batch_size=4) is static
        assert not static.training
        for name, (mean, var) in expected.items():
            closely(static.norms[name].running_mean, mean)
            closely(static.norms[name].running_var, var)


def test_recalibration_depends_on_images_alone_and_keeps_the_weights():
    net, images, archs = problem(TINY)
    static = extract(net, archs[1])
    weights = {name: parameter.clone() for name, parameter in static.named_parameters()}
    once = recalibrate(static, images, batch_size=100)(images)
    twice = recalibrate(static, images, batch_size=100)(images)
    exactly(once, twice)
    exactly(dict(static.named_parameters()), weights)


def test_same_generator_same_weights():
    space = tiny_space(TINY)
    nets = [Supernet(space, mean=[0.5], std=[0.2], generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    exactly(nets[0].state_dict(), nets[1].state_dict())
    assert not torch.equal(nets[0].head.weight, nets[2].head.weight)


@spaces
def test_supernet_survives_a_round_trip(settings, tmp_path):
    space = tiny_space(settings)
    net = random_supernet(space, dtype=torch.float32)
    save_supernet(tmp_path / "net.safetensors", net, Provenance("run", "train_phase"), phase="all")
    loaded, checksum = load_supernet(tmp_path / "net.safetensors", tiny_space(settings))
    exactly(loaded.state_dict(), net.state_dict())
    assert len(checksum) == 64


@spaces
def test_static_network_survives_a_round_trip(settings, tmp_path):
    space = tiny_space(settings)
    arch = random_archs(space, 1)[0]
    net = extract(random_supernet(space, dtype=torch.float32).eval(), arch)
    save_static(tmp_path / "net.safetensors", net, space=space, arch=arch, kind="teacher")
    loaded, found_space, found_arch, _ = load_static(tmp_path / "net.safetensors", kind=("control", "teacher"))
    images = random_images(space, 3, dtype=torch.float32)
    exactly(loaded(images), net(images))
    assert (found_space.settings, found_arch) == (space.settings, arch)
    assert not loaded.training


def test_supernet_of_another_space_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    save_supernet(path, random_supernet(tiny_space(), dtype=torch.float32), Provenance("run", "train_phase"))
    with pytest.raises(
        ArtifactError, match=r"net.safetensors is a supernet of space tiny, not of .* rerun train_phase"
    ):
        load_supernet(path, tiny_space(depth=[0, 2]))


def test_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    save_supernet(path, random_supernet(tiny_space(), dtype=torch.float32), Provenance("run", "train_phase"))
    with pytest.raises(ArtifactError, match="contains 'supernet', expected teacher"):
        load_static(path, kind="teacher")
    save_tensors(path, {"x": torch.zeros(2)}, kind="images")
    with pytest.raises(ArtifactError, match="contains 'images', expected supernet"):
        load_supernet(path, tiny_space())
