"""Student networks outside elastic spaces: layers and costs, training, recalibration, files, foreign checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from proard.artifacts import ArtifactError, Provenance
from proard.config import NETS, ConfigError, Space, VisionTransformer, WideResNet, job_settings, load
from proard.losses import CrossEntropy, kdiga_term, loss_gradient
from proard.nets import FixedNet, FixedView, bare_network, fold, load_static, load_trades, recalibrate, save_static
from proard.nets.wide import WideNet
from proard.space import FixedSpace, read_space, space_of
from proard.stages import train_teacher
from proard.stages.train_teacher import fitted_space, named_arch

WIDE = WideResNet(name="wide", depth=10, widen=1, image_channels=1, image_size=8, classes=3)
VIT = VisionTransformer(
    name="vit", patch=4, layers=2, heads=2, hidden=8, mlp=12, image_channels=1, image_size=8, classes=3
)
FIXED = pytest.mark.parametrize("settings", [WIDE, VIT], ids=["wide", "vit"])


def random_fixed(settings, *, seed=0):
    """A network whose every number is random, the head and the running statistics too."""
    channels = settings.image_channels
    net = FixedNet(FixedSpace(settings), mean=[0.4] * channels, std=[0.3] * channels)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*net.module.parameters(), *net.module.buffers()):
        if tensor.is_floating_point():
            tensor.data += torch.rand(tensor.shape, generator=generator) / 4
    return net.eval()


def images_of(settings, count=6, *, seed=1):
    shape = (count, settings.image_channels, settings.image_size, settings.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def parameters(net):
    return sum(weight.numel() for weight in net.parameters())


# --- layers and costs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(NETS) - {"vit_b_16", "wide_resnet_34_10"}))
def test_macs_and_params_are_what_a_counter_counts(name):
    space = space_of(NETS[name])
    spec, net = space.spec(space.largest), bare_network(space, space.largest).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(images_of(NETS[name], 2))
    assert counter.get_total_flops() == 2 * 2 * spec.macs
    assert parameters(net) == spec.params


@FIXED
def test_costs_follow_channels_size_and_classes(settings):
    spec, net = FixedSpace(settings).spec(FixedSpace(settings).largest), random_fixed(settings)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(images_of(settings, 1))
    assert (counter.get_total_flops(), parameters(net)) == (2 * spec.macs, spec.params)


def test_published_networks_have_their_published_size():
    cost = {
        name: (spec.params, spec.macs)
        for name in NETS
        for spec in [space_of(NETS[name]).spec(space_of(NETS[name]).largest)]
    }
    resnet18 = torchvision.models.resnet18(num_classes=10)
    resnet18.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    assert cost["resnet18"][0] == parameters(resnet18) == 11_173_962
    assert cost["mobilenet_v2"][0] == parameters(torchvision.models.mobilenet_v2(num_classes=10)) == 2_236_682
    with torch.device("meta"):
        assert cost["vit_b_16"][0] == parameters(torchvision.models.vit_b_16()) == 86_567_656
        assert cost["wide_resnet_34_10"][0] == parameters(WideNet(WideResNet())) == 46_160_474
    assert round(cost["wide_resnet_34_10"][1] / 1e9, 2) == 6.66
    assert [round(cost[f"resnet{depth}"][1] / 1e6) for depth in (18, 20, 32, 56)] == [555, 41, 69, 126]


def test_a_shortcut_where_needed_is_the_identity_elsewhere():
    space = space_of(NETS["resnet20"])
    blocks = [block for block in space.spec(space.largest).blocks if block.shortcut is not None]
    assert [len(block.shortcut) for block in blocks] == [0, 0, 0, 1, 0, 0, 1, 0, 0]
    with pytest.raises(ValueError, match="where_needed allows a single width"):
        Space.model_validate({**NETS["resnet20"].model_dump(), "width": (0.5, 1.0)})


def test_a_wide_block_is_preactivated():
    torch.manual_seed(0)
    block = copy.deepcopy(WideNet(WIDE).block2.layer[0]).eval()
    x = torch.randn(2, 16, 8, 8)
    active = torch.relu(block.bn1(x))
    inner = torch.relu(block.bn2(block.conv1(active)))
    torch.testing.assert_close(block(x), block.conv2(inner) + block.convShortcut(active))


def test_the_vision_transformer_is_torchvisions():
    settings = VisionTransformer(patch=8, layers=1, heads=2, hidden=8, mlp=16)
    own = random_fixed(settings)
    theirs = torchvision.models.VisionTransformer(32, 8, 1, 2, 8, 16, num_classes=10).eval()
    theirs.load_state_dict(own.module.state_dict())
    images = images_of(settings)
    with torch.no_grad():
        torch.testing.assert_close(own(images), theirs((images - 0.4) / 0.3))


@pytest.mark.parametrize(
    ("net", "words"),
    [
        ({"family": "wide_resnet", "depth": 35}, ["depth is 35", "6n + 4"]),
        ({"family": "vit", "heads": 3, "hidden": 64}, ["hidden is 64", "heads, 3"]),
        ({"family": "vit", "layer": 3}, ["layer", "did you mean layers"]),
        ({"family": "vitt"}, ["experiment.s.net", "vitt", "wide_resnet"]),
        ("resnet19", ["resnet19", "resnet18", "mobilenet_v3_cifar"]),
    ],
    ids=str,
)
def test_a_wrong_network_is_one_clear_line(net, words):
    with pytest.raises(ConfigError) as caught:
        load({"run": "r", "experiment": {"trainings": [{"name": "s", "net": net}]}})
    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_a_network_takes_the_runs_images_or_says_why_not():
    own = load({"run": "r", "space": "resnet_digits"}).space
    space = fitted_space(NETS["vit_micro"], own, where="here")
    assert (space.settings.image_channels, space.settings.image_size) == (1, 8)
    with pytest.raises(ConfigError, match=r"here: patch is 16; expected: a divisor of image_size, 8"):
        fitted_space(NETS["vit_b_16"], own, where="here")
    with pytest.raises(ConfigError, match=r"there\.arch: network vit_micro has one arch"):
        named_arch({"depth": (1,)}, space, where="there")


# --- a step's view of it ------------------------------------------------------------------------------------------


@FIXED
def test_a_view_gives_the_training_mode_logits_and_the_gradients_of_the_weights(settings):
    net = random_fixed(settings)
    twin, images, labels = copy.deepcopy(net).train(), images_of(settings), torch.arange(6) % 3
    for weight in net.parameters():
        weight.grad = torch.zeros_like(weight)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    view = FixedView(net)
    logits = view(images)
    torch.testing.assert_close(logits, twin(images))
    nn.functional.cross_entropy(logits, labels).backward()
    assert all(weight.grad.eq(0).all() for weight in net.parameters())
    view.scatter_gradients()
    nn.functional.cross_entropy(twin(images), labels).backward()
    for (name, weight), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, other.grad, msg=name)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    view(images, update_running=True)
    assert ("module.bn1.running_mean" in before) == any(
        not torch.equal(buffer, before[name]) for name, buffer in net.named_buffers()
    )


@FIXED
def test_a_network_folded_at_a_batchs_statistics_gives_the_batchs_logits(settings):
    net, images, record = random_fixed(settings), images_of(settings), {}
    view = FixedView(net)
    logits = view(images, record=record, frozen=True)
    assert not logits.requires_grad
    torch.testing.assert_close(view.folded(record)(images), logits)
    torch.testing.assert_close(view.folded(view.running_statistics())(images), net(images))
    rounded = view.folded(record, dtype=torch.bfloat16)(images)
    assert rounded.dtype is torch.float32
    assert 0 < (rounded - logits).abs().max() < 0.1 * logits.abs().max()


@FIXED
def test_the_gradient_term_differentiates_twice_through_it(settings):
    net = random_fixed(settings).double()
    view, labels = FixedView(net), torch.arange(4) % 3
    images = images_of(settings, 4).double().requires_grad_()
    teacher = torch.randn(images.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def term():
        return kdiga_term(view(images), images, labels, teacher)

    name, leaf = next((name, leaf) for name, leaf in view.leaves.items() if leaf.ndim > 1)
    (found,) = torch.autograd.grad(term(), leaf)
    step, place = 1e-6, (0,) * leaf.ndim
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            leaf[place] += sign * step
        values.append(float(term().detach()))
        with torch.no_grad():
            leaf[place] -= sign * step
    assert abs(float(found[place]) - (values[0] - values[1]) / (2 * step)) < 1e-6 * max(1, abs(float(found[place]))), (
        name
    )
    assert float(found.abs().max()) > 0
    detached = loss_gradient(view(images), images, labels).detach()
    assert not (detached - teacher).norm().requires_grad


@FIXED
def test_recalibration_sets_the_statistics_of_the_images(settings):
    net, images = random_fixed(settings), images_of(settings, 40)
    recalibrate(net, images, batch_size=20)
    assert not net.training
    if settings is WIDE:
        with torch.no_grad():
            entering = net.module.conv1(net.normalise(images))
        torch.testing.assert_close(net.module.block1.layer[0].bn1.running_mean, entering.mean((0, 2, 3)))
        halves = torch.stack([half.var((0, 2, 3), correction=0) for half in entering.split(20)]).mean(0)
        torch.testing.assert_close(net.module.block1.layer[0].bn1.running_var, halves)


@FIXED
def test_it_comes_back_from_its_file(settings, tmp_path):
    net, space, images = random_fixed(settings), FixedSpace(settings), images_of(settings)
    path = tmp_path / "net.safetensors"
    save_static(path, net, space=space, arch=space.largest, kind="teacher", provenance=Provenance("r", "s"))
    again, found, arch, _ = load_static(path, kind="teacher")
    assert (found.settings, arch) == (settings, space.largest)
    with torch.no_grad():
        assert torch.equal(again(images), net(images))
        assert torch.equal(fold(again)(images), net(images))
    assert read_space(settings.model_dump()).read_arch(arch.to_json()) == arch
    assert len(arch.arch_id) == 12
    with pytest.raises(ValueError, match="is not network"):
        space.spec(FixedSpace(settings.model_copy(update={"classes": 4})).largest)


def test_weights_are_drawn_by_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    nets = [FixedNet(FixedSpace(VIT), mean=[0], std=[1], generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    first, same, other = (net.module.conv_proj.weight for net in nets)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


# --- checkpoints of others ----------------------------------------------------------------------------------------


def published(path, settings, *, change=None, wrap=False):
    """A checkpoint as TRADES saves it: DataParallel's prefix, and a block that is not used."""
    torch.manual_seed(3)
    net = WideNet(settings)
    tensors = {f"module.{name}": value for name, value in net.state_dict().items()}
    tensors |= {f"module.sub_block1.{name}": value for name, value in net.block1.state_dict().items()}
    if change:
        change(tensors)
    torch.save({"state_dict": tensors} if wrap else tensors, path)
    return net.eval()


@pytest.mark.parametrize("wrap", [False, True])
def test_a_published_checkpoint_gives_the_published_logits(tmp_path, wrap):
    settings = WideResNet(depth=16, widen=2, classes=7)
    net = published(tmp_path / "model.pt", settings, wrap=wrap)
    found, space, arch = load_trades(tmp_path / "model.pt", image_size=32)
    assert (space.settings.depth, space.settings.widen, space.settings.classes) == (16, 2, 7)
    assert space.spec(arch).params == parameters(net)
    images = images_of(settings, 3)
    with torch.no_grad():
        torch.testing.assert_close(found(images), net(images))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("module.block2.layer.0.conv2.weight"),
            ["lacks block2.layer.0.conv2.weight", "WideResNet-10-1"],
        ),
        (lambda t: t.update({"module.block4.x": torch.zeros(1)}), ["holds block4.x"]),
        (lambda t: t.update({"module.fc.bias": torch.zeros(4)}), ["fc.bias has shape (4,), expected (3,)"]),
        (lambda t: t.pop("module.conv1.weight"), ["no WideResNet as TRADES saves it", "conv1.weight"]),
        (lambda t: t.update(epoch=3), ["has no state dict"]),
        (lambda t: t.update(run=CrossEntropy(torch.zeros(1))), ["no checkpoint of tensors alone"]),
    ],
    ids=["missing", "strange", "shape", "other", "number", "object"],
)
def test_a_checkpoint_that_is_not_what_it_should_be_is_refused(tmp_path, change, words):
    published(tmp_path / "model.pt", WIDE, change=change)
    with pytest.raises(ArtifactError) as caught:
        load_trades(tmp_path / "model.pt", image_size=8)
    assert [word for word in [*words, "model.pt"] if word not in str(caught.value)] == []


def test_a_damaged_or_absent_checkpoint_is_refused(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ArtifactError, match=r"no checkpoint of torch\.save with only tensors"):
        load_trades(tmp_path / "model.pt", image_size=32)
    with pytest.raises(ArtifactError, match="does not exist"):
        load_trades(tmp_path / "absent.pt", image_size=32)


def teach(folder, source, file, images):
    """Take a teacher from a file through the stage; its logits and its space."""
    config = load({"run": "r", "space": "resnet_digits", "train_teacher": {"source": source, "file": str(file)}})
    written = {"teacher": folder / "teacher.safetensors", "history": folder / "history.parquet"}
    unread = {name: folder / "none" for name in ("train", "val")}
    argv = ["--settings", job_settings(config, "train_teacher"), "--threads", "1", "--device", "cpu"]
    flags = {**written, **unread}
    train_teacher.main([*argv, *(word for name, path in flags.items() for word in (f"--{name}", str(path)))])
    net, space, *_ = load_static(written["teacher"], kind="teacher")
    with torch.no_grad():
        return fold(net)(images), space


def test_the_teacher_of_a_run_may_be_a_published_checkpoint(tmp_path):
    settings = WIDE.model_copy(update={"classes": 10})
    net, images = published(tmp_path / "model.pt", settings), images_of(settings)
    logits, space = teach(tmp_path, "trades", tmp_path / "model.pt", images)
    with torch.no_grad():
        torch.testing.assert_close(logits, net(images))
    assert (space.settings.depth, space.settings.widen) == (10, 1)
    published(tmp_path / "other.pt", WIDE)
    with pytest.raises(ConfigError, match=r"other\.pt is for 1x8x8 images of 3 classes; this run has 1x8x8 of 10"):
        teach(tmp_path, "trades", tmp_path / "other.pt", images)
    with pytest.raises(ConfigError, match=r"source trades needs `file`"):
        load({"run": "r", "train_teacher": {"source": "trades"}})
