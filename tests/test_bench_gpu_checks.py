"""Checks of the GPU benchmark, without a GPU: what they accept, and that they notice errors."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gpu_problems import small_problem

from proard.attacks import take_steps
from proard.kernels import CapturedSteps, dispatch
from proard.kernels.cudnn import NoEpilogues
from proard.space import key_of

FEW = {  # for the interpreter
    "updates": {"shapes": ((1, 1, 8, 8), (3, 5, 17, 19))},
    "logit gradients": {"batches": ((1, 1), (3, 7), (1, 101))},
    "noise": {"shapes": ((2, 3, 5, 5),)},
    "passes": {"shapes": ((2, 24, 3, 3),)},
    "batch norm": {"shapes": ((2, 24, 3, 3),)},
    "products": {"channels": ((8, 24),), "sizes": ((2, 3, 5),)},
}


@pytest.mark.parametrize("name", FEW)
def test_kernels_are_proven_on_odd_shapes_and_a_wrong_one_is_noticed(name, capsys):
    from gpu.checks import proof_rows

    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fused = dispatch.all_fused(NoEpilogues(), types=(torch.float32,))
    rows = proof_rows(name, device, fused, **FEW[name])
    assert len(rows) >= 2

    def off(function):
        def wrong(*given, **how):
            found = function(*given, **how)
            (found[0] if isinstance(found, tuple) else found).add_(0.1)
            return found

        return wrong

    names = (
        "pgd_update_",
        "philox_uniform",
        "softmax_difference",
        "finish_",
        "slope_",
        "norm_forward",
        "norm_backward",
        "product",
    )
    parts = {
        key: SimpleNamespace(
            **{each: getattr(part, each) for each in ("fits", "suits") if hasattr(part, each)},
            **{each: off(getattr(part, each)) for each in names if hasattr(part, each)},
        )
        for key, part in ((key, getattr(fused, key)) for key in ("steps", "maps", "norms", "product"))
    }
    with pytest.raises(SystemExit, match="differs from its reference by"):
        proof_rows(name, device, replace(fused, **parts), **FEW[name])
    assert "against the reference" in capsys.readouterr().out


def test_real_shapes_are_proven():
    from gpu.checks import REAL

    batches, channels, sides = ({shape[place] for shape in REAL["updates"]["shapes"]} for place in (0, 1, 3))
    assert {1, 1024} <= batches
    assert {1, 3, 5} <= channels
    assert max(sides) == 224
    images, classes = (set(each) for each in zip(*REAL["logit gradients"]["batches"], strict=True))
    assert {1, 1024} <= images
    assert {1, 2, 10, 101, 1001} <= classes
    maps = REAL["batch norm"]["shapes"]
    assert {24, 40, 264, 2048} <= {shape[1] for shape in maps}
    assert max(shape[0] * shape[2] * shape[3] for shape in maps) >= 2**16


def test_a_step_in_which_the_host_waits_is_noticed():
    from gpu.checks import step_never_waits

    modes = []
    assert "never waits" in step_never_waits(small_problem(), set_mode=modes.append)
    assert modes == ["default", "default", "error", "default"]

    def waits(*args):
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(SystemExit, match=r"the host waits .* called a synchronizing CUDA operation"):
        step_never_waits(small_problem(), waits, modes.append)
    assert modes[-1] == "default"


class Stale(CapturedSteps):
    """Graphs that do not read new weights."""

    def _captured(self, *given):
        graph = super()._captured(*given)
        load = graph.load
        graph.load = lambda predict, *rest: load(graph.predict, *rest)
        return graph


def test_graph_that_reads_stale_weights_is_noticed():
    from gpu.checks import graphs_agree

    problem = small_problem()
    assert "100.000%" in graphs_agree(problem, capture=lambda body: body)
    with pytest.raises(SystemExit, match=r"captured attack in .* agrees with the eager one on"):
        graphs_agree(problem, Stale, capture=lambda body: body)


def test_replayed_steps_that_move_the_weights_otherwise_are_noticed():
    from gpu.checks import replays_agree

    problem = small_problem()
    assert "2 archs, replayed and eager: cosine of the weights' moves 1.000000" in replays_agree(
        problem, capture=lambda body: body
    )
    with pytest.raises(SystemExit, match="replayed steps move the weights otherwise"):
        replays_agree(problem, capture=lambda body: lambda: None)
    with pytest.raises(SystemExit, match="0 graphs were recorded for 2 archs"):
        replays_agree(problem)


def both_in_float64():
    """A problem in float64, and the same as another device would hold it."""
    problem = small_problem()
    return [problem.placed(torch.device("cpu"), torch.float64) for _ in range(2)]


def move(problem, names, size):
    """Add noise of that size to some layers' weights."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in sorted(names):
            weight = problem.student.layers[name].weight
            weight.add_(size * torch.randn(weight.shape, generator=generator))


def test_attack_and_step_that_differ_from_the_cpus_are_noticed():
    from gpu import checks as gpu_checks

    problem, other = both_in_float64()
    move(other, other.student.layers, 1e-14)  # as another order of summation would
    assert "2 archs: 100.000%" in gpu_checks.attacks_agree(problem, other)
    assert "cosine 1.000000" in gpu_checks.steps_agree(problem, other)
    move(other, other.student.layers, 0.05)
    with pytest.raises(SystemExit, match="agrees with the CPU's on"):
        gpu_checks.attacks_agree(problem, other)
    with pytest.raises(SystemExit, match="have a cosine of"):
        gpu_checks.steps_agree(problem, other)


def test_every_arch_of_the_problem_is_compared():
    from gpu import checks as gpu_checks

    problem, other = (replace(each, archs=each.archs[::-1]) for each in both_in_float64())
    first, second = ({key_of(conv) for conv in problem.student.space.spec(arch).convs} for arch in problem.archs)
    move(other, second - first, 0.05)
    with pytest.raises(SystemExit, match="agrees with the CPU's on"):
        gpu_checks.attacks_agree(problem, other)
    with pytest.raises(SystemExit, match="have a cosine of"):
        gpu_checks.steps_agree(problem, other)
    alone = [replace(each, archs=each.archs[:1]) for each in (problem, other)]
    gpu_checks.attacks_agree(*alone)
    gpu_checks.steps_agree(*alone)


def test_fused_kernels_that_step_elsewhere_are_noticed():
    from gpu.checks import fused_attacks_agree

    problem = small_problem()
    assert "100.000%" in fused_attacks_agree(problem)

    def backwards(*given, step_size, num_steps):
        return take_steps(*given, step_size=-step_size, num_steps=num_steps)

    with pytest.raises(SystemExit, match="a step with fused kernels agrees with the plain one on"):
        fused_attacks_agree(problem, backwards)


def test_gates_compare_repeatable_convolutions_without_tf32_and_put_all_back():
    from gpu import checks as gpu_checks

    settings = [
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cudnn, "deterministic"),
    ]
    before = [getattr(*setting) for setting in settings]
    with gpu_checks.full_float32():
        assert [getattr(*setting) for setting in settings] == [False, False, True]
    assert [getattr(*setting) for setting in settings] == before


class Clocked:
    """Ways to convolve that take so many seconds each, by a clock of their own."""

    def __init__(self, **seconds):
        self.now, self.seconds, self.seen = 0.0, seconds, set()

    def took(self, name, shape):
        self.now += self.seconds.get(f"first_{name}", 0) if (name, shape) not in self.seen else 0
        self.seen.add((name, shape))
        self.now += self.seconds[name]

    def product(self, x, weight, **_):
        self.took("product", weight.shape)
        return x

    def convolve_relu(self, x, weight, bias, **_):
        self.took("cudnn", weight.shape)
        return None if self.seconds.get("without") else x

    def finish_(self, out, *_):
        self.took("usual", ())
        return out

    def fastest(self, monkeypatch):
        from gpu import ways

        monkeypatch.setattr(ways, "BATCH", 1)
        monkeypatch.setattr(ways, "SHAPES", ((8, 16, 1, 4), (8, 8, 3, 4)))
        fused = dispatch.Fused(None, self, None, self, NoEpilogues())
        found = ways.times(fused, self, torch.device("cpu"), clock=lambda: self.now)
        return {name: way.pays for name, way in found.items()}


@pytest.mark.parametrize(
    ("seconds", "product", "cudnn"),
    [
        ({"product": 1e-3, "cudnn": 1e-3, "usual": 2e-3}, True, True),
        ({"product": 3e-3, "cudnn": 1e-3, "usual": 2e-3}, False, True),
        ({"product": 1e-3, "cudnn": 3e-3, "usual": 2e-3}, True, False),
        ({"product": 1e-3, "cudnn": 1e-3, "usual": 2e-3, "first_cudnn": 1.0}, True, False),
        ({"product": 1e-3, "cudnn": 1e-3, "usual": 2e-3, "first_product": 1.0}, False, True),
        ({"product": 1e-3, "cudnn": 1e-3, "usual": 2e-3, "without": 1}, True, False),
    ],
)
def test_a_way_pays_if_it_is_faster_and_its_first_call_is_short(monkeypatch, seconds, product, cudnn):
    assert Clocked(**seconds).fastest(monkeypatch) == {"product": product, "cudnn": cudnn}
