"""The host does not wait for the device inside a step; a failure that it detects later has changed no weight."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import image_sets, random_images, random_supernet, tiny_config, tiny_space
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import phase_run, same, step_of, take

from proard.config import UserError
from proard.config.losses import Plain, Trades
from proard.losses import Objective
from proard.nets import extract, fold
from proard.progress import Progress
from proard.training import Drawn, Plan, phase_plan, single_plan
from proard.training.guard import Guard, flat

WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}


class Waits(TorchDispatchMode):
    """Collects the operations whose results the host has to wait for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split(".")[0]
        if name in WAITING:
            self.seen.append(name)
        return function(*args, **kwargs or {})


def one_step(settings, plan, *, teacher=None):
    net = random_supernet(tiny_space(), dtype=torch.float32)
    step = step_of(net, settings, plan, teacher=teacher)
    images, labels = random_images(tiny_space(), 6, dtype=torch.float32), torch.arange(6) % 3
    with Waits() as waits:
        outcome = take(step, images, labels)
    return step, waits.seen, outcome


@pytest.mark.parametrize("bn_mode", ["clean_batch", "running", "batch"])
@pytest.mark.parametrize("objective", ["plain", "trades", "pgd_at"])
def test_a_step_of_one_network_makes_no_host_wait(objective, bn_mode):
    attack = {"num_steps": 2, "step_size": 0.05, "bn_mode": bn_mode}
    settings = tiny_config(train_teacher__attack=attack, train_teacher__clip_norm=1.0).train_teacher
    made, seen, _ = one_step(settings, single_plan(tiny_space().largest, settings.objective, settings))
    assert seen == []
    assert made.update.guard.failure() is None


def test_a_step_of_several_subnets_makes_no_host_wait():
    (phase,) = tiny_config(phase__teacher="both", phase__archs_per_step=3).train_phase.phases
    space = tiny_space()
    teacher = fold(extract(random_supernet(space, dtype=torch.float32).eval(), space.largest))
    _, seen, result = one_step(phase, phase_plan(space, phase), teacher=teacher)
    assert seen == []
    assert (result.loss.shape, result.clean.shape, result.robust.shape) == ((), (), ())


def test_the_counter_sees_a_wait():
    with Waits() as waits:
        float(torch.ones(()) + 1)
    assert waits.seen == ["aten::_local_scalar_dense"]


def test_guard_remembers_the_first_failure_alone():
    guard = Guard(torch.device("cpu"))
    for step, loss in enumerate([1.0, 2.0]):
        guard.watch(torch.tensor(loss), step)
    assert guard.failure() is None
    assert float(guard.alive) == 1
    for step, loss in enumerate([math.inf, math.nan, 1.0], start=2):
        guard.watch(torch.tensor(loss), step)
    assert guard.failure() == (2, math.inf)
    assert (float(guard.alive), float(guard.failed)) == (0, 1)


@pytest.mark.parametrize("failed", [False, True])
def test_guard_puts_back_what_was_saved_only_after_a_failure(failed):
    guard = Guard(torch.device("cpu"))
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0], [4.0]])]
    saved = flat(tensors)
    for tensor in tensors:
        tensor += 10
    tensors[0][0] = torch.nan
    guard.watch(torch.tensor(torch.nan if failed else 1.0), 0)
    guard.restore_(tensors, saved)
    wanted = saved if failed else torch.tensor([torch.nan, 12, 13, 14])
    torch.testing.assert_close(flat(tensors), wanted, rtol=0, atol=0, equal_nan=True)
    assert tensors[1].shape == (2, 1)


def test_after_a_failure_further_steps_move_nothing_at_all():
    settings = tiny_config().train_teacher
    made, _, _ = one_step(settings, single_plan(tiny_space().largest, Trades(), settings))
    kept = {name: tensor.clone() for name, tensor in made.tensors().items()}
    images, labels = random_images(tiny_space(), 6, dtype=torch.float32), torch.arange(6) % 3
    for step, batch in ((1, images * torch.nan), (2, images)):
        take(made, batch, labels, number=step, seed=step)
        assert same(made.tensors(), kept), f"step {step}"
    assert made.update.guard.failure()[0] == 1


def test_a_finite_loss_with_a_gradient_that_is_not_moves_nothing_in_the_same_step():
    settings = tiny_config().train_teacher
    made, _, _ = one_step(settings, single_plan(tiny_space().largest, Plain(), settings))
    kept = {name: tensor.clone() for name, tensor in made.tensors().items()}
    steep = Objective(None, lambda batch: 0.5 + (0 * batch.clean).sum().sqrt(), frozenset({"clean"}))
    made.plan = Plan(lambda seed, step, data_pass: [Drawn(tiny_space().largest, steep, {})])
    images, labels = random_images(tiny_space(), 6, dtype=torch.float32), torch.arange(6) % 3
    with Waits() as waits:
        loss = take(made, images, labels, number=1).loss
    assert waits.seen == []
    assert loss == 0.5
    assert made.update.guard.failure() == (1, 0.5)
    assert same(made.tensors(), kept)


@pytest.fixture(scope="module")
def train_set(tmp_path_factory):
    return image_sets(tmp_path_factory.mktemp("images"), train=48, val=12)["train"]


@pytest.mark.parametrize("read_every", [1, 20])
def test_what_is_saved_does_not_depend_on_when_the_host_looks(train_set, tmp_path, read_every):
    """Step 1 of 6 in an epoch fails; with late reads, the host has launched all further steps before it knows."""
    run = phase_run(train_set, tmp_path, epochs=1, batch_size=8, fit_now=False, injected={"read_every": read_every})
    run.source.poison_at = 1
    with pytest.raises(UserError, match="the loss is nan at step 1"):
        run.fit()
    assert len(run.source.given) == (2 if read_every == 1 else 5)  # the fifth step is always read
    assert same(run.net.state_dict(), run.source.before[1])
    done = run.state.load()[1]["done"]
    assert {name: done[name] for name in ("step", "epoch_images", "images")} == {
        "step": 1,
        "epoch_images": 8,
        "images": 8,
    }
    good = phase_run(train_set, tmp_path / "good", epochs=1 / 6, batch_size=8)
    assert done["epoch_loss"] / 8 == good.rows[-1]["loss"]
    assert done["epoch_clean"] / 8 == good.rows[-1]["train_clean_acc"]


def test_progress_asks_for_its_note_only_when_it_shows(capsys):
    asked = []
    progress = Progress("work", 3, "steps", every=1000)
    for number in range(2):
        progress.advance(note=lambda number=number: asked.append(number) or f"note {number}")
    assert asked == []
    progress.show()
    assert asked == [1]
    assert "note 1" in capsys.readouterr().out
