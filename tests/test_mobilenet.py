"""MobileNet spaces: published sizes, the layers of a public implementation, learned kernel transforms, settings."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import (
    SMALL_SPACES,
    TINY,
    TINY_MOBILE,
    random_archs,
    random_images,
    random_supernet,
    tiny_config,
    tiny_space,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import MobileNetV2
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

from proard.config import PRESETS, ConfigError, Space, load
from proard.nets import FoldedNet, StaticNet, SubnetView, Supernet, extract, fold, implant
from proard.nets.elastic import BN_EPS
from proard.nets.subnet import folded_layer
from proard.space import Arch, SearchSpace
from proard.space.sampling import identity_columns, stratified_sample
from proard.stages.train_teacher import teacher_arch
from proard.training import phase_plan

closely = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def preset(name, **changes):
    return SearchSpace(PRESETS[name].model_copy(update=changes))


# Sizes.


@pytest.mark.parametrize(
    ("name", "classes", "end", "params", "macs"),
    [
        ("mobilenet_v3_cifar", 10, "largest", 6.40, 179.7),
        ("mobilenet_v3_cifar", 10, "smallest", 2.14, 35.3),
        ("mobilenet_v3_cifar", 100, "largest", 6.51, 179.8),
        ("mobilenet_v3_cifar", 100, "smallest", 2.26, 35.4),
        ("proxyless_cifar", 10, "largest", 3.84, 187.8),
        ("proxyless_cifar", 10, "smallest", 1.23, 42.5),
        ("mobilenet_v2_cifar", 10, "largest", 3.07, 161.5),
        ("mobilenet_v2_cifar", 10, "smallest", 1.05, 36.7),
        ("resnet_cifar", 100, "largest", 46.26, 2358.2),
        ("resnet_cifar", 100, "smallest", 5.34, 285.4),
        ("resnet_imagenet", 1000, "largest", 48.11, 7491.6),
        ("resnet_imagenet", 1000, "smallest", 6.54, 962.2),
    ],
)
def test_published_sizes(name, classes, end, params, macs):
    space = preset(name, classes=classes)
    spec = space.spec(getattr(space, end))
    assert (round(spec.params / 1e6, 2), round(spec.macs / 1e6, 1)) == (params, macs)


@pytest.mark.parametrize(
    ("name", "size"), [("mobilenet_v3", 2.176e19), ("proxyless", 1.958e20), ("mobilenet_v2", 1.958e20)]
)
@pytest.mark.parametrize("images", ["cifar", "imagenet"])
def test_published_numbers_of_archs(name, images, size):
    assert float(f"{preset(f'{name}_{images}').size:.3e}") == size


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_macs_and_params_of_every_preset_equal_a_library_counter(name):
    space = preset(name)
    for arch in (space.smallest, space.largest, *random_archs(space, 2)):
        spec = space.spec(arch)
        with torch.device("meta"):  # shapes alone
            net, images = StaticNet(spec), torch.empty(1, spec.image_channels, spec.image_size, spec.image_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(images)
        assert counter.get_total_flops() == 2 * spec.macs
        assert sum(parameter.numel() for parameter in net.parameters()) == spec.params


@pytest.mark.parametrize(("images", "side"), [("cifar", 4), ("imagenet", 7)])
@pytest.mark.parametrize("name", ["mobilenet_v3", "proxyless", "mobilenet_v2", "resnet"])
def test_strides_leave_the_published_last_map(name, images, side):
    space = preset(f"{name}_{images}")
    assert space.spec(space.largest).blocks[-1].out_size == side


# Layers, beside a public implementation of the same networks.


def copied(reference, spec, *, head):
    """The layers of a torchvision network as a `FoldedNet` of `spec`; both list them in the order of the forward."""
    modules = list(reference.features.modules())
    convs = [module for module in modules if isinstance(module, nn.Conv2d)]
    norms = iter([module for module in modules if isinstance(module, nn.BatchNorm2d)])
    layers = {}
    for conv, own in zip(convs, spec.convs, strict=False):
        assert (conv.in_channels, conv.out_channels, conv.stride[0]) == (own.in_channels, own.out_channels, own.stride)
        assert (conv.kernel_size[0], conv.groups) == (own.kernel, own.groups)
        norm = next(norms) if own.norm else None
        layers[own.name] = (
            (conv.weight, conv.bias)
            if norm is None
            else folded_layer(conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
    for own, linear in zip(spec.mixer, reference.classifier, strict=False):
        layers[own.name] = (linear.weight[:, :, None, None], linear.bias)
    channels = torch.ones(3, dtype=torch.float64)
    linear = (head.weight, head.bias)
    return FoldedNet(spec, layers, linear, mean=torch.zeros_like(channels), std=channels, dtype=torch.float64)


def randomised(net):
    """Different statistics and scales everywhere, in float64 and evaluation mode."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.normal_(module.bias, std=0.2)
    return net.double().eval()


@torch.no_grad()
def test_largest_mobilenet_v3_is_torchvisions_of_the_same_layout():
    space = preset("mobilenet_v3_imagenet", image_size=64, classes=5)
    units, blocks, channels = PRESETS["mobilenet_v3_imagenet"].units, [], 16
    for index, unit in enumerate(units):
        count, kernel, expand = (4, 7, 6) if index else (1, 3, 1)
        activation = "HS" if unit.activation == "h_swish" else "RE"
        for stride in [unit.stride] + [1] * (count - 1):
            widths = (channels, kernel, channels * expand, unit.channels)
            blocks.append(InvertedResidualConfig(*widths, unit.se, activation, stride, 1, 1.0))
            channels = unit.channels
    norm = partial(nn.BatchNorm2d, eps=BN_EPS)
    reference = randomised(MobileNetV3(blocks, 1280, num_classes=5, norm_layer=norm))
    net = copied(reference, space.spec(space.largest), head=reference.classifier[3])
    images = random_images(space, 2)
    closely(net(images), reference(images))


@torch.no_grad()
def test_mobilenet_v2_is_torchvisions_at_kernel_3_and_expand_6():
    space = preset("mobilenet_v2_imagenet", image_size=64, classes=5)
    counts, strides = (1, 2, 3, 4, 3, 3, 1), (1, 2, 2, 2, 1, 2, 1)  # MobileNetV2 itself
    widths = [unit.channels for unit in space.settings.units]
    setting = [[6 if n else 1, channels, counts[n], strides[n]] for n, channels in enumerate(widths)]
    largest, depth = space.largest, (0, 0, 1, 2, 1, 1, 0)
    kept = [index < count for count in counts for index in range(count if count == 1 else 4)]
    arch = Arch(
        depth,
        largest.width,
        tuple(expand * on for expand, on in zip(largest.expand, kept, strict=True)),
        tuple(3 * on for on in kept),
    )
    reference = randomised(MobileNetV2(num_classes=5, inverted_residual_setting=setting))
    net = copied(reference, space.spec(arch), head=reference.classifier[1])
    images = random_images(space, 2)
    closely(net(images), reference(images))


# Kernel transforms.


def all_kernels(space, kernel):
    """The largest subnet but for its elastic kernels."""
    arch = space.largest
    return Arch(arch.depth, arch.width, arch.expand, tuple(min(side, kernel) for side in arch.kernel))


def test_fresh_small_kernels_are_the_centre_of_the_large_one():
    space = tiny_space(TINY_MOBILE)
    net = Supernet(space, mean=[0.5], std=[0.2], generator=torch.Generator().manual_seed(0))
    layer = net.layers["unit2_block1_depthwise"]
    for kernel, cut in ((7, 0), (5, 1), (3, 2)):
        torch.testing.assert_close(
            layer.filters(6, 6, kernel), layer.weight[:6, :, cut : 7 - cut, cut : 7 - cut], rtol=0, atol=0
        )
    assert not net.layers["unit1_block1_depthwise"].transforms
    assert not net.layers["unit2_block1_expand"].transforms


def test_kernel_3_goes_through_both_matrices_entry_by_entry():
    net = random_supernet(tiny_space(TINY_MOBILE))
    layer = net.layers["unit2_block1_depthwise"].requires_grad_(False)
    to5, to3 = layer.transforms["to5"], layer.transforms["to3"]
    expected = torch.zeros(2, 3, 3, dtype=torch.float64)
    for channel in range(2):
        middle = [float(layer.weight[channel, 0, 1 + i // 5, 1 + i % 5]) for i in range(25)]
        five = [sum(float(to5[row, i]) * middle[i] for i in range(25)) for row in range(25)]
        centre = [five[5 * (1 + i // 3) + 1 + i % 3] for i in range(9)]
        for row in range(9):
            expected[channel, row // 3, row % 3] = sum(float(to3[row, i]) * centre[i] for i in range(9))
    closely(layer.filters(2, 2, 3)[:, 0], expected)


def test_view_gives_transforms_the_gradients_of_the_plain_form_when_used_twice():
    net, space = random_supernet(tiny_space(TINY_MOBILE)), tiny_space(TINY_MOBILE)
    images, labels = random_images(space, 6), torch.arange(6) % 3
    archs = [all_kernels(space, kernel) for kernel in (3, 5, 7)]
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for arch in archs * 2:
        F.cross_entropy(net(images, arch), labels).backward()
    expected = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad.zero_()
    for arch in archs:
        view = SubnetView(net, arch)
        for _ in range(2):
            F.cross_entropy(view(images), labels).backward()
            view.scatter_gradients()
    closely({name: parameter.grad for name, parameter in net.named_parameters()}, expected)
    for name, gradient in expected.items():
        assert "transforms" not in name or gradient.abs().sum() > 0, name


def test_extracted_small_kernels_stand_alone():
    space = tiny_space(TINY_MOBILE)
    net = random_supernet(space).eval()
    for kernel in (3, 5, 7):
        arch = all_kernels(space, kernel)
        static = extract(net, arch)
        assert static.convs["unit2_block1_depthwise"].kernel_size == (kernel, kernel)
        assert sum(parameter.numel() for parameter in static.parameters()) == space.spec(arch).params
        closely(fold(static, dtype=torch.float64)(random_images(space, 3)), net(random_images(space, 3), arch))


@pytest.mark.parametrize("settings", SMALL_SPACES, ids=lambda entry: entry["name"])
def test_implanted_network_is_the_largest_subnet(settings):
    space = tiny_space(settings)
    static = extract(random_supernet(space, seed=1).eval(), space.largest)
    net = random_supernet(space, seed=2).eval()
    implant(net, static)
    images = random_images(space, 3)
    torch.testing.assert_close(net(images, space.largest), static(images), rtol=0, atol=0)


# Archs.


def test_arch_text_names_kernels_in_mobilenets_alone():
    resnet, mobile = tiny_space(TINY), tiny_space(TINY_MOBILE)
    assert resnet.largest.to_json() == '{"depth":[1,1],"expand":[1.0,1.0,1.0,1.0],"width":[1.0,1.0,1.0]}'
    assert resnet.largest.arch_id == "aa456973e97b"
    assert mobile.smallest.kernel == (3, 3, 0)  # the second unit's second block is left out
    assert Arch.from_json(mobile.smallest.to_json()) == mobile.smallest
    with pytest.raises(ValueError, match="is not of space tiny"):
        resnet.genotype(Arch(*(getattr(resnet.largest, dim) for dim in ("depth", "width", "expand")), (3, 3, 3, 3)))
    with pytest.raises(ValueError, match="is not of space tiny_mobile"):
        mobile.genotype(Arch(mobile.largest.depth, mobile.largest.width, mobile.largest.expand))


def test_units_keep_their_own_choices():
    space = preset("mobilenet_v3_cifar")
    for row in space.sample(20, np.random.default_rng(0)):
        arch = space.arch(row)
        assert (arch.depth[0], arch.expand[0], arch.kernel[0]) == (0, 1.0, 3)
        assert {side for side in arch.kernel[1:] if side} <= {3, 5, 7}
        assert [side > 0 for side in arch.kernel] == [value > 0 for value in arch.expand]


def test_phases_open_kernels():
    space = tiny_space(TINY_MOBILE)
    (phase,) = tiny_config(space=TINY_MOBILE, phase__kernel=[7], phase__depth=[1]).train_phase.phases
    drawn = [student.arch for step in range(10) for student in phase_plan(space, phase).draw(0, step, 0)]
    assert {arch.kernel for arch in drawn} == {(3, 7, 7)}
    with pytest.raises(ValueError, match=r"kernel \[9\].*choices are \[3, 5, 7\]"):
        space.open_choices(kernel=[9])
    with pytest.raises(ValueError, match=r"kernel \[3\] is not in space tiny; choices are \[\]"):
        tiny_space(TINY).open_choices(kernel=[3])


def test_a_teachers_arch_is_written_with_its_kernels():
    space = tiny_space(TINY_MOBILE)
    dims = {dim: list(getattr(all_kernels(space, 5), dim)) for dim in ("depth", "width", "expand", "kernel")}
    config = tiny_config(space=TINY_MOBILE, train_teacher__arch=dims)
    assert teacher_arch(config.train_teacher, space) == all_kernels(space, 5)
    without = tiny_config(space=TINY_MOBILE, train_teacher__arch={k: v for k, v in dims.items() if k != "kernel"})
    with pytest.raises(ConfigError, match="depth, width, expand and kernel; check kernel"):
        teacher_arch(without.train_teacher, space)


def test_mobilenets_are_sampled_over_their_whole_range():
    space = preset("mobilenet_micro")
    genotypes, stratum = stratified_sample(space, 40, strata=5, seed=0)
    assert np.bincount(stratum).tolist() == [8] * 5
    columns = identity_columns(space, genotypes)
    assert len(set(columns["arch_id"])) == 40
    assert space.spec(space.largest).macs >= 8 * space.spec(space.smallest).macs


# Settings.


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_space_survives_its_file(name):
    written = PRESETS[name].model_dump(mode="json")
    assert Space.model_validate(yaml.safe_load(yaml.safe_dump(written))) == PRESETS[name]


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (TINY_MOBILE, {"kernel": [3, 4]}, "kernel must list odd sides"),
        (TINY_MOBILE, {"kernel": [5, 3]}, "kernel must list different choices, smallest first"),
        (TINY_MOBILE, {"expand": [1, 2]}, "expand 1 .without 1x1 convolution. must be"),
        (TINY_MOBILE, {"block": "basic"}, "block is basic; blocks of family mobilenet are mbconv"),
        (TINY_MOBILE, {"shortcut": "pool_conv"}, "shortcut is a setting of family resnet"),
        (TINY_MOBILE, {"units": [{"channels": 8, "depth": [1, 0]}]}, "units.0.depth must list different choices"),
        (TINY, {"kernel": [3, 5]}, "kernel and se are settings of family mobilenet"),
        (TINY, {"units": [{"channels": 8, "se": True}]}, "kernel and se are settings of family mobilenet"),
    ],
)
def test_what_does_not_fit_a_family_is_refused(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        load({"run": "a", "space": {**settings, **changes}})
