"""The estimate of the remaining time ignores work that happens only once."""

from __future__ import annotations

import pytest
from helpers import image_sets
from training_runs import teacher_run

from proard.attacks import pgd
from proard.progress import Progress


@pytest.mark.parametrize(("start_up", "left"), [(0, "19 min 15 s left"), (5, "1 min 50 s left")])
def test_rate_leaves_start_up_out(start_up, left, capsys):
    now = [0.0]
    progress = Progress("work", 120, "steps", start_up=start_up, every=1e9, clock=lambda: now[0])
    for number in range(10):
        now[0] += 20 if number < 5 else 1.0
        progress.advance()
    progress.show()
    assert left in capsys.readouterr().out


def test_a_single_unit_has_a_rate_before_start_up_is_over(capsys):
    now = [0.0]
    progress = Progress("work", 3, "steps", start_up=1, every=1.0, clock=lambda: now[0])
    now[0] = 2.0
    progress.advance()
    assert "4 s left" in capsys.readouterr().out


def test_a_training_announces_its_time_without_start_up(tmp_path, capsys):
    """Five steps of 20 s, then steps of 1 s: 14 remain after the tenth."""
    now = [0.0]
    steps = iter(range(40))

    def search(*arguments, **options):
        now[0] += 20 if next(steps) < 5 else 1
        return pgd(*arguments, **options)

    injected = {"search": search, "clock": lambda: now[0]}
    train = image_sets(tmp_path, train=48, val=12)["train"]
    teacher_run(train, tmp_path, epochs=4, batch_size=8, injected=injected)
    assert "teacher: about 14 s to go, validation apart" in capsys.readouterr().out
