"""Winograd's convolutions against float64, and when attacks use them."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, random_images, random_supernet, tiny_space

from proard.attacks import input_gradient
from proard.config import Attack
from proard.evaluation import attack_images
from proard.kernels import Winograd, plain_twins, slope_, winograd
from proard.kernels.winograd import plain_convolve
from proard.losses import CrossEntropy
from proard.nets import FoldedNet, SubnetView
from proard.nets.gradient import Convolution, Kept
from proard.space import ConvSpec, SearchSpace

CLOSE = 1e-4  # for values of about unit variance
SPACE = tiny_space(TINY, units=[{"channels": 16}, {"channels": 32, "stride": 2}])
Problem = dict[str, torch.Tensor]


@pytest.fixture
def without_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


def problem(ins: int, outs: int, height: int, width: int, count: int = 3) -> Problem:
    generator = torch.Generator().manual_seed(ins + outs + height)

    def draw(*size: int) -> torch.Tensor:
        made = torch.randn(size, generator=generator)
        return made.contiguous(memory_format=torch.channels_last) if len(size) == 4 else made

    return {
        "x": draw(count, ins, height, width),
        "weight": draw(outs, ins, 3, 3) / (3 * ins**0.5),
        "bias": draw(outs),
        "side": draw(count, outs, height, width),
        "seed": draw(count, outs, height, width),
        "total": draw(count, ins, height, width),
    }


@pytest.mark.parametrize("side", [1, 2, 3, 5, 7, 8, 13])
@pytest.mark.parametrize(("ins", "outs"), [(16, 16), (16, 24), (24, 40), (40, 16)])
def test_both_passes_are_those_of_float64(ins, outs, side):
    given = problem(ins, outs, side, side + side % 3)
    exact = {name: each.double() for name, each in given.items()}
    conv = Winograd(given["weight"])
    for adds in (None, "side"):
        for activation in ("none", "relu"):
            sides = [None if adds is None else each[adds] for each in (given, exact)]
            found = conv.convolve(given["x"], given["bias"], side=sides[0], activation=activation)
            wanted = plain_convolve(exact["x"], exact["weight"], exact["bias"], side=sides[1], activation=activation)
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=CLOSE)
            assert found.is_contiguous(memory_format=torch.channels_last)
    back = F.conv_transpose2d(exact["seed"], exact["weight"], padding=1)
    for adds in (None, "total"):
        for activation in ("none", "relu", "relu6"):
            sides = [None if adds is None else each[adds] for each in (given, exact)]
            how = {"before": given["x"], "activation": activation}
            found = conv.input_gradient(given["seed"], side=sides[0], **how)
            wanted = slope_(back.clone(), exact["x"], sides[1], activation=activation)
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=CLOSE * (outs / ins) ** 0.5)


def test_the_layout_of_filters_and_maps_does_not_matter():
    given = problem(16, 24, 8, 8)
    first = Winograd(given["weight"].contiguous()).convolve(given["x"].contiguous(), given["bias"])
    again = Winograd(given["weight"].contiguous(memory_format=torch.channels_last)).convolve(given["x"], given["bias"])
    assert torch.equal(first, again)


def test_bits_depend_neither_on_threads_nor_on_the_batch():
    given, threads = problem(24, 40, 13, 13, count=40), torch.get_num_threads()
    conv, found = Winograd(given["weight"]), []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            out = conv.convolve(given["x"], given["bias"], side=given["side"], activation="relu")
            found.append((out, conv.input_gradient(given["seed"], before=given["x"], activation="relu")))
    finally:
        torch.set_num_threads(threads)
    for out, gradient in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(gradient, found[0][1])
    assert torch.equal(conv.convolve(given["x"][5:6], given["bias"]), conv.convolve(given["x"], given["bias"])[5:6])
    assert conv.convolve(given["x"][:0], given["bias"]).shape == (0, 40, 13, 13)


def test_what_is_not_a_number_is_passed_on():
    given = problem(16, 16, 8, 8)
    given["x"][0, 3, 0, 0] = float("nan")
    out = Winograd(given["weight"]).convolve(given["x"], given["bias"], activation="relu")
    assert out[0, :, :2, :2].isnan().all()
    assert not out[1:].isnan().any()


@pytest.mark.usefixtures("without_avx512")
def test_it_is_used_where_it_pays_and_can_be_switched_off(monkeypatch):
    weight = torch.ones(16, 24, 3, 3)
    assert Winograd.suits(weight, 8)
    assert [size for size in range(1, 14) if Winograd.suits(weight, size)] == [3, 4, 6, 7, 8, 9, 10, 11, 12, 13]
    for unfit in (weight.double(), weight[:8], weight[:, :20], weight[..., :1, :1]):
        assert not Winograd.suits(unfit, 8)
    with plain_twins("winograd"):
        assert not Winograd.suits(weight, 8)
    layer = ConvSpec("c", 24, 16, 3, 1, 8)
    assert Convolution(layer, weight, torch.zeros(16)).winograd is not None
    assert Convolution(ConvSpec("c", 24, 16, 3, 2, 8), weight, torch.zeros(16)).winograd is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for halved in (True, False):
        monkeypatch.setattr(winograd, "zen4", lambda halved=halved: halved)
        assert (Convolution(layer, weight, torch.zeros(16)).winograd is not None) is halved


@pytest.mark.parametrize(
    ("vendor", "family", "halved"),
    [("AuthenticAMD", 25, True), ("AuthenticAMD", 26, False), ("GenuineIntel", 6, False)],
)
def test_zen4_is_known_by_vendor_and_family(monkeypatch, vendor, family, halved):
    described = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel name\t: A: B\nflags\t\t: fpu avx2"
    monkeypatch.setattr(winograd, "processor", described.encode)
    assert winograd.zen4.__wrapped__() is halved


@pytest.mark.usefixtures("without_avx512")
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "h_swish", "silu"])
def test_a_layer_gives_the_plain_twins_maps_and_gradients(activation):
    given, found = problem(16, 24, 8, 8), []
    for context in (nullcontext(), plain_twins("winograd")):
        with context:
            conv = Convolution(ConvSpec("c", 16, 24, 3, 1, 8, activation), given["weight"], given["bias"])
            x = Kept(given["x"], given["x"], activation)
            out = conv.forward(x, side=given["side"])
            total = conv.add_backward_(given["total"].clone(memory_format=torch.preserve_format), given["seed"], x)
            found.append((conv.winograd is None, out.value, conv.backward(given["seed"], x, out), total))
    assert [used for used, *_ in found] == [False, True]
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=CLOSE)


def folded(space: SearchSpace = SPACE) -> FoldedNet:
    view = SubnetView(random_supernet(space), space.largest)
    return view.folded(view.running_statistics(), dtype=torch.float32)


@pytest.mark.usefixtures("without_avx512")
def test_a_networks_gradient_is_autograds():
    net, images = folded(), random_images(SPACE, 6).float()
    objective = CrossEntropy(torch.arange(6) % SPACE.settings.classes)
    assert net.approximate
    assert not net.rounded(torch.bfloat16).approximate
    logits, gradient = net.input_gradient()(images, objective.logit_gradient)
    expected_logits, expected = input_gradient(net, objective, images)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=CLOSE)
    assert float(F.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0)) > 1 - 1e-6
    with plain_twins("winograd"):
        assert not net.approximate
        plain = net.input_gradient()(images, objective.logit_gradient)[1]
    assert not torch.equal(plain, gradient)


@pytest.mark.usefixtures("without_avx512")
def test_channels_are_padded_where_winograds_method_then_suits_more_layers():
    space = tiny_space(TINY, units=[{"channels": 20}, {"channels": 36, "stride": 2}])
    net, images = folded(space), random_images(space, 6).float()
    objective = CrossEntropy(torch.arange(6) % space.settings.classes)
    assert net.winograd_layers == 0
    assert net.approximate
    logits, gradient = net.input_gradient()(images, objective.logit_gradient)
    expected_logits, expected = input_gradient(net, objective, images)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=CLOSE)
    assert gradient.shape == images.shape
    assert float(F.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0)) > 1 - 1e-6
    with plain_twins("winograd"):
        assert not net.approximate
        assert torch.equal(net.input_gradient().logits(images), net(images))


class Approximate:
    """A network whose own gradient comes with wrong logits."""

    def __init__(self, approximate: bool) -> None:
        self.approximate = approximate

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0]]).expand(len(images), 2)

    def input_gradient(self):
        return lambda images, _: (torch.tensor([[0.0, 1.0]]).expand(len(images), 2), torch.zeros_like(images))


def test_the_network_itself_confirms_mistakes_of_an_approximate_gradient():
    images, labels, correct = torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool)
    attack = Attack(name="a", num_steps=2, step_size=0.1)
    how = {"attack": attack, "eps": 0.1, "accounting": "any_iterate", "seed": 0, "batch_size": 3}
    assert attack_images(Approximate(True), images, labels, correct, **how).robust.all()
    assert not attack_images(Approximate(False), images, labels, correct, **how).robust.any()
