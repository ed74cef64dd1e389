import pytest
import torch

import proard.nets.view
from proard.nets.subnet import folded_layer


def differences(rows=None, *, space="resnet_digits", scale=0.5):
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
    return step_checks.equality(problem, rows or step_checks.EXACT)


@pytest.mark.parametrize("space", [{}, {"space": "mobilenet_micro", "scale": 1.0}], ids=["resnet", "mobilenet"])
def test_every_float_row_takes_the_released_step_in_float64(space):
    import step_checks

    found = differences(**space)
    assert list(found) == [f"V{number}" for number in range(9)]
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
    with pytest.raises(SystemExit, match="V8 statistics"):
        step_checks.require_equal(differences(["V0", "V8"]))


def test_ratios_are_taken_within_rounds_and_unequal_baselines_show():
    import common

    quiet = [[(2.0, 2.0), (1.0, 1.0), (0.5, 0.5), (2.0, 2.0)], [(4.0, 4.0), (2.0, 2.0), (1.0, 1.0), (4.0, 4.0)]]
    timings, spread = common.summarise(["V0", "V1", "V2"], quiet)
    assert [timing.ratio_total for timing in timings.values()] == [1.0, 2.0, 4.0]
    assert [timing.ratio_previous for timing in timings.values()] == [1.0, 2.0, 2.0]
    assert spread == 0
    drifting = [[*clocks[:-1], (1.5 * clocks[-1][0], 1.0)] for clocks in quiet]
    assert common.summarise(["V0", "V1", "V2"], drifting)[1] > common.NOISY


def test_the_second_ratio_is_against_the_plain_row_of_the_same_round():
    import common

    rounds = [[(6.0, 6.0), (3.0, 3.0), (1.0, 1.0), (6.0, 6.0)], [(8.0, 8.0), (8.0, 8.0), (2.0, 2.0), (8.0, 8.0)]]
    timings, _ = common.summarise(["V0", "V1", "V2"], rounds, plain="V1")
    assert timings["V2"].ratio_plain == 3.5  # median of 3 and 4; the medians' own ratio would be 3.67
    assert timings["V2"].ratio_total == 5.0
    assert common.summarise(["V0", "V1", "V2"], rounds)[0]["V2"].ratio_plain is None


def fake_checkout(folder, networks="class DYNResNets_Cifar: pass\n"):
    """A tree of the official names; like the real one, it asks for packages that are not installed."""
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
