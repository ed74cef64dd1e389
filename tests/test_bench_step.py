import pytest
import torch

import proard.nets.view


def differences(rows=None, *, space="resnet_digits", scale=0.5, **how):
    import plain_step
    import step_checks
    import step_rows

    problem = step_rows.make_problem(
        step_rows.scaled_space(space, scale),
        recipe=plain_step.Recipe(num_steps=2),
        num_archs=1,
        batch_size=4,
        dtype=torch.float64,
    )
    return step_checks.equality(problem, rows or step_checks.EXACT, **how)


@pytest.mark.parametrize("space", [{}, {"space": "mobilenet_micro", "scale": 1.0}], ids=["resnet", "mobilenet"])
def test_every_float_row_takes_the_released_step_in_float64(space):
    import step_checks

    found = differences(**space)
    quantities = ("adv", "logits", "gradients", "parameters", "statistics")
    assert list(found) == [f"V{number} {quantity}" for number in range(9) for quantity in quantities]
    assert step_checks.require_equal(found) <= 1e-10


class WrongAttack:
    """V8 with an attack of one step less, and statistics that are updated twice."""

    def __init__(self, problem, fault):
        import step_rows

        self.fault = fault
        few = problem.with_steps(problem.recipe.num_steps - (fault == "adv"))
        self.step = step_rows.PackageStep(few)

    def __call__(self, arch, images, *rest):
        if self.fault == "statistics":
            self.step.net.train()(images, arch)
        return self.step(arch, images, *rest)

    def __getattr__(self, name):
        return getattr(self.step, name)


@pytest.mark.parametrize("fault", ["adv", "statistics"])
def test_a_step_with_a_fault_is_noticed(fault):
    import step_checks
    import step_rows

    def build(row, problem):
        return WrongAttack(problem, fault) if row == "V8" else step_rows.build(row, problem)

    with pytest.raises(SystemExit, match=f"V8 {fault}"):
        step_checks.require_equal(differences(["V0", "V8"], build=build))


def test_ratios_are_taken_within_rounds_and_unequal_baselines_show():
    import common

    quiet = [[(2.0, 2.0), (1.0, 1.0), (0.5, 0.5), (2.0, 2.0)], [(4.0, 4.0), (2.0, 2.0), (1.0, 1.0), (4.0, 4.0)]]
    timed = common.summarise(["V0", "V1", "V2"], quiet)
    assert [timing.ratio_total for timing in timed.timings.values()] == [1.0, 2.0, 4.0]
    assert [timing.ratio_previous for timing in timed.timings.values()] == [1.0, 2.0, 2.0]
    assert timed.spread == 0
    drifting = [[*clocks[:-1], (1.5 * clocks[-1][0], 1.0)] for clocks in quiet]
    assert common.summarise(["V0", "V1", "V2"], drifting).spread > common.NOISY


def test_the_second_ratio_is_against_the_plain_row_of_the_same_round():
    import common

    rounds = [[(6.0, 6.0), (3.0, 3.0), (1.0, 1.0), (6.0, 6.0)], [(8.0, 8.0), (8.0, 8.0), (2.0, 2.0), (8.0, 8.0)]]
    timings = common.summarise(["V0", "V1", "V2"], rounds, plain="V1").timings
    assert timings["V2"].ratio_plain == 3.5  # median of 3 and 4; the medians' own ratio would be 3.67
    assert timings["V2"].ratio_total == 5.0
    assert common.summarise(["V0", "V1", "V2"], rounds).timings["V2"].ratio_plain is None


def fake_checkout(folder, networks="class DYNResNets_Cifar: pass\n"):
    """A tree of the official names; like the real one, it imports packages that are not installed."""
    files = {
        "proard/utils/__init__.py": "class MyNetwork: CHANNEL_DIVISIBLE = 8\n",
        "proard/classification/elastic_nn/networks/__init__.py": f"import horovod.torch as hvd\n{networks}",
        "robust_loss/rslad.py": "from proard.utils import MyNetwork\nrslad_loss = MyNetwork.CHANNEL_DIVISIBLE\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return str(folder)


def test_official_classes_come_from_the_checkout_and_leave_this_package_alone(tmp_path):
    import sys

    import official_step

    official = official_step.load_official(fake_checkout(tmp_path), "resnet_cifar")
    assert official.networks.__file__.startswith(str(tmp_path))
    assert official.loss.rslad_loss == 8
    assert sys.modules["proard.nets.view"] is proard.nets.view
    assert not any(name.startswith(("horovod", "robust_loss")) for name in sys.modules)
    assert str(tmp_path) not in sys.path


def test_a_path_without_the_official_modules_is_refused_with_the_reason(tmp_path):
    import official_step

    with pytest.raises(SystemExit, match=r"is no checkout .* lacks proard/classification, robust_loss/rslad\.py"):
        official_step.load_official(str(tmp_path), "resnet_cifar")
    with pytest.raises(SystemExit, match="--space is resnet_digits, expected resnet_cifar"):
        official_step.load_official(str(tmp_path), "resnet_digits")
    with pytest.raises(SystemExit, match=r"not found there: .*networks\.DYNResNets_Cifar"):
        official_step.load_official(fake_checkout(tmp_path, networks="other = 1\n"), "resnet_cifar")
    with pytest.raises(SystemExit, match="fail to import: ModuleNotFoundError"):
        official_step.load_official(fake_checkout(tmp_path, networks="import nowhere\n"), "resnet_cifar")
    assert "proard.nets.view" in __import__("sys").modules
