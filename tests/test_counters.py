"""Costs without a clock: kernels and convolution FLOPs of a training step and of an attack step."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers import TINY_DEEP, random_images, random_supernet, tiny_space
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from training_runs import step_of, take

from proard.attacks import differentiate, pgd
from proard.config import Phase, TrainingAttack
from proard.kernels import one_pass, plain_twins
from proard.losses import CrossEntropy
from proard.nets import SubnetView, extract, fold
from proard.space import Arch, SearchSpace
from proard.training import Drawn, Plan, TrainingStep
from proard.training.plan import bind

BATCH, STEPS = 4, 3
FREE = ("view", "t", "transpose", "permute", "slice", "detach", "alias", "expand", "as_strided", "unsqueeze", "select")
SPACE = tiny_space(TINY_DEEP)


@pytest.fixture(autouse=True)
def by_the_library() -> Iterator[None]:
    """On a CPU without AVX-512, too, all convolutions are the library's: no counter sees Winograd's."""
    with plain_twins("winograd"):
        yield


class Kernels(TorchDispatchMode):
    """Counts what is dispatched, views left out: every call reads or writes memory."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def middle(space: SearchSpace) -> Arch:
    return space.arch(space.sample(1, np.random.default_rng(4))[0])


def folded(space: SearchSpace, dtype: torch.dtype = torch.float32):
    view = SubnetView(random_supernet(space, dtype=torch.float32), middle(space))
    return view.folded(view.running_statistics(), dtype=dtype)


def labels(space: SearchSpace) -> torch.Tensor:
    return torch.arange(BATCH) % space.settings.classes


def one_pass_flops(x, *others, out_shape, **_) -> int:
    """FLOPs of a convolution with fused activation, which can add a map of its output's shape."""
    weight = others[1] if others[0] == out_shape else others[0]
    return 2 * out_shape[0] * out_shape[2] * out_shape[3] * weight.numel()


def attack_flops(call) -> int:
    one_pass(torch.float32)  # tried once per process, and not counted here
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.mkldnn._convolution_pointwise: one_pass_flops}
    ) as counter:
        call()
    return counter.get_total_flops()


def conv_macs(space: SearchSpace) -> int:
    """Multiply-accumulates of one image in the convolutions of the middle arch."""
    return sum(conv.macs for conv in space.spec(middle(space)).convs)


def head_macs(space: SearchSpace) -> int:
    spec = space.spec(middle(space))
    return spec.features * spec.classes


def made_step(space: SearchSpace, *, num_steps: int = STEPS) -> TrainingStep:
    net = random_supernet(space, dtype=torch.float32)
    attack = TrainingAttack(num_steps=num_steps, step_size=0.03, bn_mode="clean_batch")
    phase = Phase(name="all", loss="rslad", sampling="uniform", archs_per_step=1, attack=attack)
    objective = bind(phase.loss, phase)
    plan = Plan(lambda seed, step, data_pass: [Drawn(middle(space), *objective)])
    teacher = fold(extract(random_supernet(space, seed=1, dtype=torch.float32), space.largest).eval())
    return step_of(net, phase, plan, teacher=teacher)


def training_step(space: SearchSpace, *, num_steps: int = STEPS) -> None:
    images = random_images(space, BATCH, dtype=torch.float32)
    take(made_step(space, num_steps=num_steps), images, labels(space))


@pytest.mark.parametrize("form", ["written out", "autograd"])
def test_an_attack_gradient_is_a_forward_and_an_input_gradient_and_nothing_of_the_weights(form):
    net, objective, images = folded(SPACE), CrossEntropy(labels(SPACE)), random_images(SPACE, BATCH).float()
    gradient = differentiate(net if form == "written out" else net.forward)
    flops = attack_flops(lambda: gradient(objective, images))
    assert flops == 2 * BATCH * 2 * (conv_macs(SPACE) + head_macs(SPACE))


def test_an_attack_costs_its_steps_and_nothing_more():
    net, objective, images = folded(SPACE), CrossEntropy(labels(SPACE)), random_images(SPACE, BATCH).float()
    options = {"eps": 0.1, "step_size": 0.03, "generator": torch.Generator().manual_seed(0)}
    for steps in (0, 1, 4):
        flops = attack_flops(lambda steps=steps: pgd(net, objective, images, num_steps=steps, **options))
        assert flops == steps * 2 * BATCH * 2 * (conv_macs(SPACE) + head_macs(SPACE))


def test_a_training_step_makes_one_teacher_pass_two_training_passes_and_the_attack():
    student = conv_macs(SPACE) + head_macs(SPACE)
    first = SPACE.spec(middle(SPACE)).convs[0].macs  # images of the training passes need no gradient
    teacher = SPACE.spec(SPACE.largest).macs
    passes = 2 * (3 * student - first)
    flops = attack_flops(lambda: training_step(SPACE))
    assert flops == 2 * BATCH * (teacher + passes + STEPS * 2 * student)


def test_kernels_of_an_attack_step():
    net, objective, images = folded(SPACE), CrossEntropy(labels(SPACE)), random_images(SPACE, BATCH).float()
    spec = SPACE.spec(middle(SPACE))
    options = {"eps": 0.1, "step_size": 0.03}
    counts = []
    for steps in (1, 2):
        with Kernels() as kernels:
            pgd(net, objective, images, num_steps=steps, generator=torch.Generator().manual_seed(0), **options)
        counts.append(kernels.counts)
    step = counts[1] - counts[0]
    convs, relus = len(spec.convs), sum(x.activation == "relu" for x in (*spec.convs, *spec.blocks))
    sliced = sum(c.kernel == 1 and c.stride > 1 for c in spec.convs)
    forward = step["convolution"] + step["_convolution_pointwise"]
    assert forward == convs + sliced  # the input gradient of a sliced one is a convolution, too
    assert step["_convolution_pointwise"] >= relus  # fused into the convolution, as sums are
    assert step["convolution_backward"] == convs - sliced
    assert step["relu_"] == step["threshold_backward"] == 0
    assert step["add_"] <= sliced + 1
    assert step["sign_"] == step["clamp"] == 1
    assert sum(step.values()) - 2 * convs <= 2 * sum(block.shortcut is not None for block in spec.blocks) + 20


def test_kernels_of_a_training_step_grow_by_those_of_an_attack_step():
    counts = []
    for steps in (1, 2, 3):
        made, images = made_step(SPACE, num_steps=steps), random_images(SPACE, BATCH, dtype=torch.float32)
        with Kernels() as kernels:
            take(made, images, labels(SPACE))
        counts.append(sum(kernels.counts.values()))
    assert counts[1] - counts[0] == counts[2] - counts[1]
    convs = len(SPACE.spec(middle(SPACE)).convs)
    assert counts[1] - counts[0] <= 5 * convs + 30
    norms = ("native_batch_norm", "native_batch_norm_backward")
    assert [kernels.counts[name] for name in norms] == [0, 0]  # all of them are the C kernel's
    with Kernels() as kernels, plain_twins("maps"):
        take(made, images, labels(SPACE), number=1)
    assert [kernels.counts[name] for name in norms] == [2 * convs] * 2  # clean and adversarial images


def test_counters_see_a_redundant_forward():
    net, images = folded(SPACE), random_images(SPACE, BATCH).float()
    once = attack_flops(lambda: net(images))
    assert once == 2 * BATCH * (conv_macs(SPACE) + head_macs(SPACE))
    assert attack_flops(lambda: (net(images), net(images))) == 2 * once


ATTACKS = """
import resource, sys
import torch
from proard.attacks import pgd
from proard.config import PRESETS
from proard.losses import CrossEntropy
from proard.nets import Supernet, SubnetView
from proard.space import SearchSpace
from proard.stages.common import keep_heap

if sys.argv[1] == "kept":
    assert keep_heap()
torch.set_num_threads(1)
space = SearchSpace(PRESETS["resnet_micro"])
net = Supernet(space, mean=[0.5] * 3, std=[0.2] * 3, generator=torch.Generator().manual_seed(0))
view = SubnetView(net, space.largest)
folded = view.folded(view.running_statistics())
images, objective = torch.rand(64, 3, 32, 32), CrossEntropy(torch.arange(64) % 10)
attack = lambda steps: pgd(folded.forward, objective, images, eps=0.03, step_size=0.01, num_steps=steps,
                           generator=torch.Generator().manual_seed(0))
attack(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
attack(20)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the page faults of Linux")
def test_an_attack_on_a_kept_heap_faults_in_few_pages():
    faults = {}
    for heap in ("kept", "as it is"):
        command = [sys.executable, "-c", ATTACKS, heap]
        faults[heap] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert faults["kept"] < 0.2 * faults["as it is"]
