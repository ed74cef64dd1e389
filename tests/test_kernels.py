"""Fused kernels against their plain twins (on a GPU, or through Triton's interpreter), and captured attack steps."""

from __future__ import annotations

import ast
import importlib
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import random_images, random_supernet, tiny_space
from torch.overrides import TorchFunctionMode

from proard.attacks import pgd, take_steps
from proard.kernels import CapturedSteps, dispatch, plain, softmax_difference
from proard.losses import CrossEntropy, KLToTarget, Margin
from proard.nets import SubnetView

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def fused():
    """The Triton kernels: compiled where there is a GPU, else interpreted on the CPU (see `conftest.py`)."""
    pytest.importorskip("triton")
    return importlib.import_module("proard.kernels.fused")


# The fused update.


def update_problem(shape=(3, 3, 7, 5), *, layout=torch.channels_last):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(shape, generator=generator)
    adv = images + torch.empty(shape).uniform_(-0.03, 0.03, generator=generator)
    gradient = torch.randn(shape, generator=generator)
    gradient.view(-1)[::5] = 0  # stays
    gradient.view(-1)[1] = -0.0
    gradient.view(-1)[2:5] = torch.tensor([torch.nan, torch.inf, 1e-42])
    adv.view(-1)[7] = torch.nan  # a NaN must not disappear
    low, high = (images - 0.03).clamp(min=0), (images + 0.03).clamp(max=1)
    return [x.contiguous(memory_format=layout).to(DEVICE) for x in (adv, gradient, low, high)]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(3, 3, 7, 5), (2, 3, 19, 19)], ids=["less_than_a_block", "three_blocks"])
def test_fused_update_is_the_plain_one_bit_for_bit(fused, shape, layout):
    adv, gradient, low, high = update_problem(shape, layout=layout)
    first, second = (
        twin.pgd_update_(adv.clone(), gradient.clone(), low, high, step_size=2 / 255) for twin in (fused, plain)
    )
    assert torch.equal(first.nan_to_num(9), second.nan_to_num(9))
    assert int(first.isnan().sum()) == 1


def test_update_by_hand():
    adv, gradient = torch.tensor([0.5, 0.5, 0.5, 0.99]), torch.tensor([3.0, -1e-9, 0.0, 1.0])
    low, high = torch.tensor([0.0, 0.49, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    moved = dispatch.pgd_update_(adv, gradient, low, high, step_size=0.25)
    assert moved is adv
    torch.testing.assert_close(adv, torch.tensor([0.75, 0.49, 0.5, 1.0]))


def test_tensors_that_one_index_does_not_serve_are_left_to_the_plain_update(fused):
    adv, gradient, low, high = update_problem()
    assert fused.fits(adv, gradient, low, high)
    assert not fused.fits(adv, gradient.contiguous(), low, high)
    assert not fused.fits(adv, gradient, low.double(), high)
    assert not fused.fits(*(x[:, :, ::2] for x in (adv, gradient, low, high)))


# The fused logit gradient.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 3, 10, 100])
@pytest.mark.parametrize("kind", ["labels", "shares"])
def test_fused_softmax_difference_is_the_plain_one(fused, kind, classes, dtype):
    generator = torch.Generator().manual_seed(classes)
    logits = (30 * torch.randn(5, classes, generator=generator)).to(dtype)  # saturated rows too
    labels = torch.randint(classes, (5,), generator=generator)
    target = labels if kind == "labels" else torch.randn(5, classes, generator=generator).softmax(1)
    logits, target = logits.to(DEVICE), target.to(DEVICE)
    first, second = fused.softmax_difference(logits, target), plain.softmax_difference(logits, target)
    assert first.dtype == second.dtype == dtype
    torch.testing.assert_close(first, second, rtol=0 if dtype is torch.float32 else 1e-2, atol=1e-6)


def test_fused_softmax_difference_reads_rows_of_any_stride(fused):
    logits = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE).T
    target = logits.flip(1).softmax(1)
    torch.testing.assert_close(
        fused.softmax_difference(logits, target), plain.softmax_difference(logits, target), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_softmax_difference_is_the_gradient_of_cross_entropy_and_divergence(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 10, generator=generator, dtype=torch.float64).to(dtype).double().requires_grad_()
    labels, teacher = torch.arange(6), torch.randn(6, 10, generator=generator, dtype=torch.float64)
    entropy = F.cross_entropy(logits, labels, reduction="sum")
    divergence = F.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="sum")
    rounding = {"rtol": 1e-12, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-2, "atol": 1e-6}
    for loss, target in ((entropy, labels), (divergence, teacher.softmax(1))):
        (wanted,) = torch.autograd.grad(loss, logits)
        found = softmax_difference(logits.detach().to(dtype), target)
        assert found.dtype is dtype
        torch.testing.assert_close(found.double(), wanted, **rounding)


def test_kernels_prove_themselves_and_are_dropped_with_a_warning_where_they_fail(fused):
    assert dispatch.fused_for(torch.device("cpu")) is None
    with pytest.warns(UserWarning, match="fused kernels are not used on cuda:77"):  # there is no such GPU
        assert dispatch.fused_for(torch.device("cuda:77")) is None


# Captured steps. On a CPU the capture is a stand-in that reruns the step on the graph's own tensors: whatever a real
# graph would read from stale memory, the stand-in reads from there too.


def captured(batch_size=6, **options):
    seen = []

    def capture(body):
        seen.append(body)
        return body

    return CapturedSteps(take_steps, batch_size=batch_size, capture=capture, **options), seen


def attack_problem(seed, *, arch=0, count=6):
    space = tiny_space()
    view = SubnetView(random_supernet(space, seed=seed, dtype=torch.float32), [space.largest, space.smallest][arch])
    images = random_images(space, count, seed=seed, dtype=torch.float32)
    labels = torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed))
    objectives = {"ce": CrossEntropy(labels), "margin": Margin(labels)}
    objectives["kl"] = KLToTarget(torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)))
    return view, images, objectives


def attacked(view, images, objective, steps, *, predict=None, num_steps=4, step_size=0.02):
    return pgd(
        predict or view.folded(view.running_statistics()),
        objective,
        images,
        eps=0.1,
        step_size=step_size,
        num_steps=num_steps,
        generator=torch.Generator().manual_seed(1),
        steps=steps,
    )


@pytest.mark.parametrize("kind", ["ce", "kl", "margin"])
def test_replayed_steps_read_this_calls_weights_targets_and_images(kind):
    """Same arch, other numbers in every tensor, another number of steps: one capture, the eager loop's results."""
    steps, seen = captured()
    results = []
    for seed, num_steps in ((0, 4), (1, 4), (2, 1), (3, 5), (0, 4)):
        view, images, objectives = attack_problem(seed)
        before = images.clone()
        results.append(attacked(view, images, objectives[kind], steps, num_steps=num_steps))
        assert torch.equal(results[-1], attacked(view, images, objectives[kind], take_steps, num_steps=num_steps))
        assert torch.equal(images, before)
    assert len(seen) == 1
    assert torch.equal(results[0], results[4])
    assert not torch.equal(results[0], results[1])


def test_whatever_changes_what_is_launched_is_captured_anew():
    steps, seen = captured()
    view, images, objectives = attack_problem(0)
    other, _, _ = attack_problem(0, arch=1)
    assert other.spec != view.spec
    cases = [
        (view, objectives["ce"], {}),
        (view, objectives["margin"], {}),
        (other, objectives["ce"], {}),
        (view, objectives["ce"], {"step_size": 0.01}),
        (view, objectives["ce"], {"predict": view.folded(view.running_statistics(), dtype=torch.bfloat16)}),
    ]
    for _ in range(2):
        for case, objective, options in cases:
            found = attacked(case, images, objective, steps, **options)
            assert torch.equal(found, attacked(case, images, objective, take_steps, **options))
    assert len(seen) == len(steps.graphs) == len(cases)


def test_graph_unused_for_longest_goes_first():
    steps, seen = captured(capacity=2)
    view, images, objectives = attack_problem(0)
    for step_size in (0.01, 0.02, 0.01, 0.03, 0.01, 0.02):  # 0.02 goes when 0.03 comes
        attacked(view, images, objectives["ce"], steps, step_size=step_size)
    assert len(seen) == 4
    assert [key[-1] for key in steps.graphs] == [0.01, 0.02]


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_few_steps_are_captured_where_their_network_comes_again(num_steps):
    """First without a graph, then one capture that later calls replay; other shapes get their own capture."""
    steps, seen = captured()
    for meeting in range(4):
        view, images, objectives = attack_problem(meeting)
        found = attacked(view, images, objectives["ce"], steps, num_steps=num_steps)
        assert torch.equal(found, attacked(view, images, objectives["ce"], take_steps, num_steps=num_steps))
        assert len(seen) == len(steps.graphs) == min(meeting, 1)
    other, images, objectives = attack_problem(0, arch=1)
    attacked(other, images, objectives["ce"], steps, num_steps=num_steps)
    assert len(seen) == 1


def test_networks_met_before_are_remembered_up_to_a_number():
    steps, _ = captured(remembered=2)
    view, images, objectives = attack_problem(0)
    for step_size in (0.01, 0.02, 0.03, 0.01, 0.03):  # 0.01 is forgotten when 0.03 comes
        attacked(view, images, objectives["ce"], steps, step_size=step_size, num_steps=1)
    assert [key[-1] for key in steps.graphs] == [0.03]
    assert len(steps.met) == 2


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_capture_that_fails_is_told_once_and_attacks_run_eagerly_from_then_on(fails_at):
    """Even if the failed capture has changed the graph's images, the attack gives the eager result."""
    tried = []

    def capture(body):
        tried.append(body)
        if len(tried) > fails_at:
            body()
            raise RuntimeError("operation not permitted when stream is capturing")
        return body

    steps = CapturedSteps(take_steps, batch_size=6, capture=capture)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for arch in (0, 1, 0, 1):
            view, images, objectives = attack_problem(0, arch=arch)
            found = attacked(view, images, objectives["ce"], steps)
            assert torch.equal(found, attacked(view, images, objectives["ce"], take_steps))
    assert [str(each.message) for each in told] == [
        "attack steps run eagerly, because their capture failed: operation not permitted when stream is capturing"
    ]
    assert len(tried) == fails_at + 1
    assert not steps.graphs


def test_what_a_graph_reads_is_copied_type_by_type():
    """A fused copy takes lists of one type; the network's bfloat16, float32 and int64 are copied separately."""
    steps, _ = captured()
    view, images, objectives = attack_problem(0)
    predict = view.folded(view.running_statistics(), dtype=torch.bfloat16)
    attacked(view, images, objectives["ce"], steps, predict=predict)
    copied = []

    class Watched(TorchFunctionMode):
        def __torch_function__(self, function, kinds, args=(), kwargs=None):
            if function is torch._foreach_copy_:
                copied.append([{tensor.dtype for tensor in tensors} for tensors in args])
            return function(*args, **(kwargs or {}))

    with Watched():
        attacked(view, images, objectives["ce"], steps, predict=predict)
    assert all(len(types) == 1 for pair in copied for types in pair)
    assert {next(iter(targets)) for targets, _ in copied} == {torch.bfloat16, torch.float32, torch.int64}
    assert len(copied) == 3


@pytest.mark.parametrize("case", ["ragged", "closure", "with_parameters", "objective_with_state", "no_step", "cpu"])
def test_loop_stays_eager_where_a_graph_would_not_serve(case):
    steps, seen = captured()
    view, images, objectives = attack_problem(0, count=5 if case == "ragged" else 6)
    objective, predict, num_steps = objectives["ce"], None, 4
    if case == "closure":
        predict = lambda x: view(x, frozen=True)  # noqa: E731
    if case == "with_parameters":
        predict = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    if case == "objective_with_state":
        objective.history = []
    if case == "no_step":
        num_steps = 0
    if case == "cpu":
        steps = CapturedSteps(take_steps, batch_size=6)
    found = attacked(view, images, objective, steps, predict=predict, num_steps=num_steps)
    assert torch.equal(found, attacked(view, images, objective, take_steps, predict=predict, num_steps=num_steps))
    assert not seen
    assert not steps.graphs


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_cuda_graph_gives_what_the_eager_loop_gives():
    steps = CapturedSteps(take_steps, batch_size=6)
    for seed in (0, 1, 2):
        view, images, objectives = attack_problem(seed)
        predict, images = view.folded(view.running_statistics()).cuda(), images.cuda()
        objective = CrossEntropy(objectives["ce"].labels.cuda())
        found, wanted = (attacked(view, images, objective, loop, predict=predict) for loop in (steps, take_steps))
        assert float((found == wanted).float().mean()) >= 0.999
    assert len(steps.graphs) == 1


def test_no_kernel_is_chosen_by_a_clock():
    """Equal inputs and settings use equal code paths: no module of kernels reads a clock."""
    for path in Path(dispatch.__file__).parent.glob("*.py"):
        names = {
            node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        }
        assert not names & {"time", "perf_counter", "monotonic", "Event", "elapsed_time"}, path.name
