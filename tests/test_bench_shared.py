import pytest
import torch


def problem(dtype=torch.float64):
    import plain_step
    import step_rows

    return step_rows.make_problem(
        step_rows.scaled_space("resnet_digits", 0.5),
        recipe=plain_step.Recipe(num_steps=5),
        num_archs=3,
        batch_size=4,
        dtype=dtype,
    )


def test_one_step_on_several_subnets_has_the_mean_of_their_gradients():
    import bench_shared
    import step_checks

    found = bench_shared.equality(problem())
    assert list(found) == ["S1", "S2"]
    assert step_checks.require_equal(found) <= 1e-10


def test_a_forgotten_subnet_is_noticed():
    import bench_shared
    import step_checks

    class Forgetful(bench_shared.PackageStep):
        def together(self, archs, *rest):
            return super().together(archs[:-1], *rest)

    given = problem()
    with pytest.raises(SystemExit, match="S2"):
        step_checks.require_equal(bench_shared.equality(given, Forgetful(given)))


def test_every_row_trains_and_a_shared_attack_takes_fewer_gradients():
    import bench_shared

    given = problem(torch.float32)
    for call in bench_shared.timed_calls(given).values():
        call(0)
    spent = {}
    for row in ("S2", "S3", "S4"):
        step = bench_shared.package_step(row, given)
        step.together(given.archs, given.images, given.labels, torch.Generator().manual_seed(1))
        spent[row] = step.result.gradients
    assert spent == {"S2": 3 * (5 + 1), "S3": (5 + 1) + 2 * (3 + 1), "S4": (5 + 1) + 2 * (1 + 1)}
