"""The GPU benchmark where there is no GPU: it says so, its CPU form runs, and its gates notice what is wrong."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from proard.kernels import captured, dispatch, plain
from proard.nets.elastic import key_of


def small_problem():
    import plain_step
    import step_rows

    return step_rows.make_problem(
        step_rows.scaled_space("resnet_digits", 0.5),
        recipe=plain_step.Recipe(num_steps=2),
        num_archs=2,
        batch_size=4,
        dtype=torch.float32,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_that_nothing_was_run(capsys):
    import bench_gpu

    bench_gpu.main([])
    assert capsys.readouterr().out == bench_gpu.NO_GPU + "\n"


def test_cpu_form_checks_times_and_lists_what_it_left_out(tmp_path, capsys):
    import bench_gpu

    bench_gpu.main(["--device", "cpu", "--quick", "--json", str(tmp_path / "rows.json")])
    printed = capsys.readouterr().out
    assert "equal: captured attack against the eager one: 100.000%" in printed
    for row in ("G3", "G6", "G7"):
        assert f"not run: {row}" in printed
    rows = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    assert [row["row"] for row in rows] == ["G0", "G1", "G2", "G4", "G5"]
    assert all(row["ms_per_step"] > 0 and row["not_run"] for row in rows)


def test_ladder_is_left_out_and_named_where_time_is_short(capsys):
    import bench_gpu

    bench_gpu.main(["--device", "cpu", "--quick", "--minutes", "0.0001"])
    assert "not run: the ladder: one round would end after the 0.0001 minutes allowed" in capsys.readouterr().out


def test_graph_that_reads_stale_weights_is_noticed(monkeypatch):
    import gpu_checks

    problem = small_problem()
    assert "100.000%" in gpu_checks.graphs_agree(problem, capture=lambda body: body)
    load = captured.Captured.load

    def forgets_the_weights(graph, predict, objective, images):
        load(graph, graph.predict, objective, images)

    monkeypatch.setattr(captured.Captured, "load", forgets_the_weights)
    with pytest.raises(SystemExit, match=r"captured attack in .* agrees with the eager one on"):
        gpu_checks.graphs_agree(problem, capture=lambda body: body)


def both_in_float64():
    """A problem in float64, and the same as another device would hold it."""
    import gpu_checks

    problem = small_problem()
    return [gpu_checks.placed(problem, torch.device("cpu"), torch.float64) for _ in range(2)]


def move(problem, names, size):
    """Add noise of that size to some layers' weights."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in sorted(names):
            weight = problem.student.layers[name].weight
            weight.add_(size * torch.randn(weight.shape, generator=generator))


def test_attack_and_step_that_differ_from_the_cpus_are_noticed():
    import gpu_checks

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
    import gpu_checks

    problem, other = (gpu_checks.replace(each, archs=each.archs[::-1]) for each in both_in_float64())
    first, second = ({key_of(conv) for conv in problem.student.space.spec(arch).convs} for arch in problem.archs)
    move(other, second - first, 0.05)
    with pytest.raises(SystemExit, match="agrees with the CPU's on"):
        gpu_checks.attacks_agree(problem, other)
    with pytest.raises(SystemExit, match="have a cosine of"):
        gpu_checks.steps_agree(problem, other)
    alone = [gpu_checks.replace(each, archs=each.archs[:1]) for each in (problem, other)]
    gpu_checks.attacks_agree(*alone)
    gpu_checks.steps_agree(*alone)


def test_fused_kernels_that_step_elsewhere_are_noticed(monkeypatch):
    import gpu_checks

    problem = small_problem()
    assert "100.000%" in gpu_checks.fused_attacks_agree(problem)
    wrong = SimpleNamespace(
        fits=lambda *tensors: True,
        pgd_update_=lambda adv, gradient, *bounds, **step: plain.pgd_update_(adv, -gradient, *bounds, **step),
        softmax_difference=plain.softmax_difference,
    )
    monkeypatch.setattr(dispatch, "fused_for", lambda device: wrong)
    with pytest.raises(SystemExit, match="a step with fused kernels agrees with the plain one on"):
        gpu_checks.fused_attacks_agree(problem)


def test_gates_compare_repeatable_convolutions_without_tf32_and_put_all_back():
    import gpu_checks

    settings = [
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cudnn, "deterministic"),
    ]
    before = [getattr(*setting) for setting in settings]
    with gpu_checks.full_float32():
        assert [getattr(*setting) for setting in settings] == [False, False, True]
    assert [getattr(*setting) for setting in settings] == before
