"""The subnets of a step: sampling strategies, teacher modes, batch-norm statistics and their updates."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import image_sets, tiny_config, tiny_space
from training_runs import phase_run, same, teacher_run

from proard.training import phase_plan


@pytest.fixture(scope="module")
def train_set(tmp_path_factory):
    return image_sets(tmp_path_factory.mktemp("images"), train=48, val=12)["train"]


def drawn_archs(steps=6, passes=None, **changes):
    space = tiny_space()
    (phase,) = tiny_config(**{f"phase__{key}": value for key, value in changes.items()}).train_phase.phases
    plan = phase_plan(space, phase)
    draws = [plan.draw(0, step, step // 3 if passes is None else passes) for step in range(steps)]
    return space, plan, [[drawn.arch for drawn in step] for step in draws], draws


def test_sandwich_draws_largest_smallest_and_random_ones():
    space, plan, archs, _ = drawn_archs(sampling="sandwich", archs_per_step=4)
    assert all(step[:2] == [space.largest, space.smallest] and len(step) == 4 for step in archs)
    assert len({arch for step in archs for arch in step[2:]}) > 4
    assert plan.passes_per_epoch == 1


def test_sandwich_takes_the_ends_of_the_open_choices():
    space, _, archs, _ = drawn_archs(sampling="sandwich", width=[1], expand=[0.5], archs_per_step=3)
    for step in archs:
        assert all(arch.width == (1, 1, 1) and max(arch.expand) == 0.5 for arch in step)
        assert (step[0].depth, step[1].depth) == ((1, 1), (0, 0))
    assert space.largest not in {arch for step in archs for arch in step}


@pytest.mark.parametrize(("sampling", "fixed"), [("sandwich", 2), ("uniform", 0)])
def test_a_pool_of_subnets_is_drawn_anew_for_every_pass(sampling, fixed):
    by_pass = [
        drawn_archs(sampling=sampling, archs_per_step=4, arch_pool=6, steps=40, passes=number)[2] for number in range(2)
    ]
    pools = [{arch for step in archs for arch in step[fixed:]} for archs in by_pass]
    assert all(len(pool) <= 6 for pool in pools)
    assert pools[0] != pools[1]
    assert len({tuple(step[fixed:]) for step in by_pass[0]}) > 3, "subnets of a step differ from step to step"
    with pytest.raises(ValueError, match="arch_pool 3 is smaller than archs_per_step 4"):
        drawn_archs(archs_per_step=4, arch_pool=3)
    with pytest.raises(ValueError, match="arch_pool is for sampling uniform and sandwich; sampling is pareto"):
        drawn_archs(sampling="pareto", arch_pool=8)


def test_per_pass_keeps_one_subnet_for_a_whole_pass():
    _, plan, archs, _ = drawn_archs(sampling="per_pass", archs_per_step=3, steps=12)
    assert plan.passes_per_epoch == 3
    assert all(len(step) == 1 for step in archs)
    by_pass = [[step[0] for step in archs[start : start + 3]] for start in range(0, 12, 3)]
    assert all(len(set(group)) == 1 for group in by_pass)
    assert len({group[0] for group in by_pass}) > 2


def test_per_pass_makes_as_many_passes_an_epoch_as_subnets(train_set, tmp_path):
    run = phase_run(train_set, tmp_path, sampling="per_pass", archs_per_step=3, epochs=1)
    assert [(row["epoch"], row["step"]) for row in run.rows] == [(1, 9)]


def test_uniform_draws_afresh_in_every_step_and_repeats_with_its_seed():
    _, plan, archs, _ = drawn_archs(sampling="uniform", archs_per_step=2, passes=0)
    assert all(len(step) == 2 for step in archs)
    assert len({arch for step in archs for arch in step}) > 6
    again = drawn_archs(sampling="uniform", archs_per_step=2, passes=5)[2]
    assert again == archs
    assert [drawn.arch for drawn in plan.draw(1, 0, 0)] != archs[0]


@pytest.mark.parametrize("sampling", ["per_pass", "uniform", "sandwich"])
@pytest.mark.parametrize("teacher", ["dynamic", "both"])
def test_dynamic_teacher_comes_first_and_once(sampling, teacher):
    space, plan, archs, draws = drawn_archs(sampling=sampling, teacher=teacher, archs_per_step=3, frozen_weight=0.3)
    for step in draws:
        assert (step[0].arch, step[0].guides) == (space.largest, True)
        assert "beta" in step[0].options
        assert not any(drawn.guides for drawn in step[1:])
    assert all(step.count(space.largest) == 1 for step in archs)
    assert plan.frozen_weight == {"dynamic": 0.0, "both": 0.3}[teacher]


def test_strange_choice_of_a_phase_is_refused():
    with pytest.raises(ValueError, match=r"width \[0.7\] is not in space tiny; choices are \[0.5, 1.0\]"):
        drawn_archs(width=[0.7])


@pytest.mark.parametrize("teacher", ["frozen", "dynamic"])
def test_only_a_dynamic_teacher_trains_what_the_phase_leaves_closed(train_set, tmp_path, teacher):
    run = phase_run(
        train_set, tmp_path, teacher=teacher, width=[0.5], weight_decay=0, epochs=1, sampling="uniform", fit_now=False
    )
    before = run.net.layers["unit2_block1_conv2"].weight.detach().clone()
    run.fit()
    after = run.net.layers["unit2_block1_conv2"].weight.detach()
    assert not torch.equal(after[:8, :8], before[:8, :8])
    assert torch.equal(after[8:], before[8:]) == (teacher == "frozen")


@pytest.mark.parametrize("bn_mode", ["running", "batch", "clean_batch"])
@pytest.mark.parametrize("teacher", ["frozen", "dynamic", "both"])
@pytest.mark.parametrize("objective", ["pgd_at", "trades"])
def test_every_teacher_with_every_statistics_trains(train_set, tmp_path, bn_mode, teacher, objective):
    attack = {"num_steps": 1, "step_size": 0.05, "bn_mode": bn_mode}
    options = {"teacher": teacher, "teacher_objective": objective, "attack": attack}
    run = phase_run(train_set, tmp_path, epochs=1 / 3, **options)
    assert math.isfinite(run.rows[-1]["loss"])
    assert not same(run.source.before[0], run.net.state_dict())


@pytest.mark.parametrize("objective", ["plain", "pgd_at", "trades"])
@pytest.mark.parametrize("bn_mode", ["running", "batch", "clean_batch"])
def test_running_statistics_move_once_a_step(train_set, tmp_path, objective, bn_mode):
    attack = {"num_steps": 1, "step_size": 0.05, "bn_mode": bn_mode}
    run = teacher_run(train_set, tmp_path, objective=objective, attack=attack, epochs=1 / 3)
    stem = run.net.layers["stem_out"]
    images = run.source.given[0]
    with torch.no_grad():
        weight = run.source.before[0]["layers.stem_out.weight"]
        clean = torch.nn.functional.conv2d(run.net.normalise(images), weight, padding=1).mean((0, 2, 3))
    moved = stem.bn.running_mean / clean
    if objective == "pgd_at" and bn_mode != "clean_batch":  # there is no clean pass: the adversarial one moves them
        assert 0.05 < float(moved.median()) < 0.2
    else:
        torch.testing.assert_close(stem.bn.running_mean, 0.1 * clean)


@pytest.mark.parametrize(
    ("inner", "guide", "student"),
    [("loss", "kl_clean", "kl_teacher"), ("ce", "ce", "ce"), ("kl_teacher", "kl_clean", "kl_teacher")],
)
def test_inner_objective_is_chosen_by_name(inner, guide, student):
    draws = drawn_archs(teacher="dynamic", teacher_objective="trades", attack={"objective": inner})[3]
    assert {drawn.objective.inner for step in draws for drawn in step if drawn.guides} == {guide}
    assert {drawn.objective.inner for step in draws for drawn in step if not drawn.guides} == {student}
