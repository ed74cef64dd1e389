from pathlib import Path

import pytest
import torch

import proard.nets.view
from proard.nets.subnet import folded_layer

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def differences(rows=None):
    import plain_step
    import step_checks
    import step_rows

    problem = step_rows.make_problem(
        step_rows.scaled_space("resnet_digits", 0.5),
        recipe=plain_step.Recipe(num_steps=2),
        num_archs=1,
        batch_size=4,
        dtype=torch.float64,
    )
    return step_checks.equality(problem, rows or step_checks.EXACT)


def test_every_float_row_takes_the_released_step_in_float64():
    import step_checks

    found = differences()
    assert list(found) == [f"V{number}" for number in range(8)]
    assert all(set(row) == {"adv", "logits", "gradients", "parameters", "statistics"} for row in found.values())
    assert step_checks.require_equal(found) <= 1e-10


def test_a_wrongly_folded_batch_norm_is_noticed(monkeypatch):
    import step_checks

    def forgets_the_mean(weight, scale, shift, mean, var):
        return folded_layer(weight, scale, shift, torch.zeros_like(mean), var)

    monkeypatch.setattr(proard.nets.view, "folded_layer", forgets_the_mean)
    found = differences(["V0", "V3", "V4"])
    assert max(found["V3"].values()) <= 1e-10
    with pytest.raises(SystemExit, match="V4 adv"):
        step_checks.require_equal(found)


def test_statistics_moved_by_another_momentum_are_noticed(monkeypatch):
    import step_checks

    monkeypatch.setattr(proard.nets.view, "BN_MOMENTUM", 0.2)
    with pytest.raises(SystemExit, match="V7 statistics"):
        step_checks.require_equal(differences(["V0", "V7"]))


def test_ratios_are_taken_within_rounds_and_unequal_baselines_show():
    import common

    quiet = [[(2.0, 2.0), (1.0, 1.0), (0.5, 0.5), (2.0, 2.0)], [(4.0, 4.0), (2.0, 2.0), (1.0, 1.0), (4.0, 4.0)]]
    timings, spread = common.summarise(["V0", "V1", "V2"], quiet)
    assert [timing.ratio_total for timing in timings.values()] == [1.0, 2.0, 4.0]
    assert [timing.ratio_previous for timing in timings.values()] == [1.0, 2.0, 2.0]
    assert spread == 0
    drifting = [[*clocks[:-1], (1.5 * clocks[-1][0], 1.0)] for clocks in quiet]
    assert common.summarise(["V0", "V1", "V2"], drifting)[1] > common.NOISY
