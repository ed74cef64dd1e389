"""Trainings with a limit in minutes: by a fake clock they make what fits, as a whole, and continue after a stop."""

from __future__ import annotations

import itertools
from dataclasses import replace
from itertools import pairwise

import pandas as pd
import pytest
import torch
from helpers import image_sets, save_stripes, tiny_config
from stage_runs import Stage
from training_runs import no_validation, phase_run, same, teacher_run

from proard.artifacts import read_table
from proard.attacks import pgd
from proard.config import ConfigError
from proard.report import setup
from proard.space import Work
from proard.space.twins import with_twins
from proard.training import Interrupted, StepResult, TrainingStep
from proard.training import run as loop
from proard.training.schedule import FEWEST, FIRST, Schedule

SHORT = {"batch_size": 8, "epochs": 40}  # 240 steps of 6 an epoch
START_UP = 5 * [4.0]


@pytest.fixture(scope="module")
def train_set(tmp_path_factory):
    return image_sets(tmp_path_factory.mktemp("images"), train=48, val=12)["train"]


class Clock:
    """A clock that only attacks and validations move: seconds of each step in order, then `rest`."""

    def __init__(self, *, first=(), rest=1.0, validation=0.0):
        self.now, self.validation, self.steps = 0.0, validation, itertools.chain(first, itertools.repeat(rest))
        self.attacks = []

    def __call__(self):
        return self.now

    def tick(self):
        self.now += next(self.steps)

    def search(self, *arguments, **options):
        self.tick()
        self.attacks.append(options["num_steps"])
        return pgd(*arguments, **options)

    def validate(self, net):
        self.now += self.validation
        return no_validation(net)


@pytest.fixture
def idle(monkeypatch):
    """Steps that draw their subnets, take their time and do nothing else."""

    def step(step_on, batch):
        step_on.plan.draw(step_on.seed, batch.step, batch.data_pass)
        step_on.attacker.search.__self__.tick()
        return StepResult(*torch.zeros(3), Work(), 0)

    monkeypatch.setattr(TrainingStep, "__call__", step)


@pytest.fixture
def rates(monkeypatch):
    """Position and learning rate of every step."""
    seen, original = [], loop.learning_rate

    def recorded(settings, step, total, warmup):
        seen.append((step, original(settings, step, total, warmup)))
        return seen[-1][1]

    monkeypatch.setattr(loop, "learning_rate", recorded)
    return seen


def timed_run(train_set, folder, clock, *, fit_now=True, **changes):
    """A teacher on a fake clock, one attack a step, validated every fifth epoch."""
    validation = {"every_epochs": 5, "num_images": 12, "num_steps": 1, "step_size": 0.05, "overfitting": "off"}
    options = {"validation": validation, "attack": {"num_steps": 1, "step_size": 0.05}, **SHORT, **changes}
    injected = {"search": clock.search, "clock": clock}
    return teacher_run(
        train_set, folder, objective="pgd_at", injected=injected, validate=clock.validate, fit_now=fit_now, **options
    )


def is_whole(rows, rates, *, lr=0.05, total=None):
    """Whether the training ended validated, at the end of its schedule, without a jump of its learning rate."""
    last, (position, final) = rows[-1], rates[-1]
    planned = last["planned_steps"]
    paces = [after - before for (before, _), (after, _) in pairwise(rates)]
    assert len(rates) == last["step"]
    assert total is None or last["step"] == total
    assert last["arch"] == "largest"
    assert last["lr"] == final < 0.03 * lr
    assert position < planned == pytest.approx(position + paces[-1])
    assert min(paces) >= 1
    steps = zip(pairwise(rates), paces, strict=True)
    slopes = [(after[1] - before[1]) / pace for (before, after), pace in steps]
    assert -0.5 * 3.15 / 200 <= min(slopes) / lr <= max(slopes) / lr <= 1 / 24  # of a cosine and a warm-up as planned
    return True


# The schedule.


def test_an_unchanged_schedule_has_the_steps_themselves():
    schedule = Schedule(planned=35_151, total=35_151)
    assert [schedule.at(step) for step in range(35_151)] == list(range(35_151))
    schedule.step_seconds = 0.1
    schedule.fit(50, 9.0, 1e6, validated_every=100)
    assert (schedule.total, schedule.step, schedule.at(77)) == (35_151, 0, 77)


def test_what_fits_leaves_time_for_validations_and_for_saving():
    schedule = Schedule(planned=1000, total=1000, step_seconds=1.0, validation=4.0, saving=2.0)
    schedule.fit(50, 60.0, 500.0, validated_every=20)
    assert schedule.total == 50 + int((0.98 * 500 - 60 - 4 - 2) / (1 + 4 / 20))
    assert schedule.at(50) == 50
    assert schedule.at(schedule.total) == pytest.approx(1000)
    before = schedule.at(200)
    schedule.fit(200, 500.0, 500.0, validated_every=20)  # no time is left
    assert schedule.total == 200 + FEWEST
    assert schedule.at(200) == before
    schedule.fit(205, 500.0, 5000.0, validated_every=20)  # more is
    assert schedule.total == 1000
    assert schedule.at(999) < 1000


def test_the_speed_is_known_after_fifty_steps_or_a_tenth_of_the_time():
    schedule = Schedule(planned=1000, total=1000)
    assert not schedule.is_due(FIRST - 1, 9.0, 100, ends_epoch=True)
    assert schedule.is_due(FIRST, 9.0, 100, ends_epoch=False)
    assert schedule.is_due(FEWEST, 11.0, 100, ends_epoch=False)
    assert not schedule.is_due(FEWEST - 1, 99.0, 100, ends_epoch=False)
    schedule.estimated = 20.0
    assert not schedule.is_due(60, 24.0, 100, ends_epoch=False)
    assert schedule.is_due(60, 24.0, 100, ends_epoch=True)
    assert schedule.is_due(60, 26.0, 100, ends_epoch=False)
    assert not schedule.is_due(1000, 90.0, 100, ends_epoch=True)


# Trainings.


@pytest.mark.usefixtures("idle")
def test_a_training_makes_the_steps_that_fit_after_fifty(train_set, tmp_path, rates, capsys):
    """Start-up takes 10 s of 10 minutes, all later steps 1 s: 577 fit besides."""
    clock = Clock(first=5 * [2.0])
    run = timed_run(train_set, tmp_path, clock, minutes=10, epochs=100)
    assert is_whole(run.rows, rates, total=5 + 578)
    assert [position for position, _ in rates[: FIRST + 1]] == list(range(FIRST + 1))
    assert rates[FIRST + 1][0] == pytest.approx(FIRST + 550 / 533)
    said = capsys.readouterr().out
    assert "teacher: minutes 10: 583 steps (97.2 epochs) instead of 100 epochs at 1 s a step" in said
    assert "teacher: minutes 10: 583 steps (97.2 epochs) instead of 100 epochs, in 9 min 48 s" in said
    assert (run.rows[-1]["epoch"], run.rows[-1]["planned_steps"], run.rows[-1]["seconds"]) == (98, 600, 588)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    "clock",
    [
        Clock(first=START_UP + 60 * [1.0], rest=1.5),
        Clock(first=START_UP + 45 * [1.0] + [1 + 0.02 * step for step in range(200)]),
        Clock(first=START_UP + 60 * [1.0], rest=0.7),
        Clock(first=START_UP, validation=6.0),
        Clock(first=START_UP + 60 * [1.0], rest=1.5, validation=9.0),
    ],
    ids=["slower", "ever slower", "faster", "validation", "slower, validation"],
)
def test_a_machine_that_changes_its_speed_ends_near_the_limit(train_set, tmp_path, rates, clock):
    run = timed_run(train_set, tmp_path, clock, minutes=3, warmup_epochs=4)
    assert 0.95 * 180 <= clock.now <= 1.02 * 180
    assert run.rows[-1]["seconds"] == pytest.approx(clock.now)
    assert is_whole(run.rows, rates)


@pytest.mark.usefixtures("idle")
def test_one_long_validation_at_the_end_is_tried_beforehand(train_set, tmp_path, rates):
    clock = Clock(validation=20.0)
    validation = {"every_epochs": 100, "num_images": 12, "overfitting": "off"}
    run = timed_run(train_set, tmp_path, clock, minutes=3, validation=validation)
    assert is_whole(run.rows, rates, total=180 - 4 - 2 * 20)
    assert 0.97 * 180 <= clock.now <= 180


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(("minutes", "total"), [(0.5, 29), (0.35, 20), (0.01, 20)])
def test_fewer_than_fifty_steps_fit(train_set, tmp_path, rates, minutes, total):
    """Twenty are made whatever the limit: ten to know the speed, ten to end the schedule."""
    run = timed_run(train_set, tmp_path, Clock(), minutes=minutes)
    assert is_whole(run.rows, rates, total=total)


def test_where_all_epochs_fit_nothing_changes(train_set, tmp_path, capsys):
    changes = {"attack": {"num_steps": 2, "step_size": 0.05, "first_steps": 1}, "epochs": 12, "warmup_epochs": 1}
    plain = timed_run(train_set, tmp_path / "plain", Clock(), **changes)
    assert "minutes" not in capsys.readouterr().out
    run = timed_run(train_set, tmp_path / "timed", Clock(validation=1.0), **changes, minutes=60)
    assert same(run.net.state_dict(), plain.net.state_dict())
    assert "teacher: minutes 60: all 12 epochs, in 1 min 15 s" in capsys.readouterr().out
    strip = [[{**row, "seconds": 0} for row in each.rows] for each in (plain, run)]
    assert strip[0] == strip[1]


def test_growing_attacks_follow_the_shortened_schedule(train_set, tmp_path):
    attack = {"num_steps": 2, "step_size": 0.05, "first_steps": 1}
    clock = Clock()
    timed_run(train_set, tmp_path, clock, minutes=2, attack=attack)
    assert len(clock.attacks) == 117
    position = Schedule(planned=240, total=117, step=13, position=13)  # after a tenth of the time
    assert clock.attacks == [1] * 13 + [1 if position.at(step) < 120 else 2 for step in range(13, 117)]


@pytest.mark.usefixtures("idle")
def test_choices_open_with_the_shortened_schedule(train_set, tmp_path):
    clock = Clock()
    injected = {"search": clock.search, "clock": clock}
    changes = {**SHORT, "sampling": "progressive", "archs_per_step": 2, "minutes": 2}
    phase = phase_run(train_set, tmp_path / "phase", fit_now=False, injected=injected, **changes)
    passes, draw = [], phase.options["plan"].draw

    def recorded(seed, step, data_pass):
        passes.append(data_pass)
        return draw(seed, step, data_pass)

    assert phase.options["plan"].opens
    phase.options["plan"] = replace(phase.options["plan"], draw=recorded)
    phase.fit()
    assert phase.rows[-1]["step"] == 117
    assert passes == sorted(passes)
    assert (passes[0], passes[-1]) == (0, 39)


def test_a_stopped_training_continues_with_its_steps_and_its_used_time(train_set, tmp_path, rates):
    """Stopped before the first estimate, after it, and shortly before the end; the time in between does not count."""
    options = {"minutes": 1.51, "epochs": 20}
    whole = timed_run(train_set, tmp_path / "whole", Clock(), **options)
    rates.clear()
    clock, stops = Clock(), [20, 51, 52, 80]
    for stop in [*stops, None]:
        run = timed_run(train_set, tmp_path / "parts", clock, fit_now=False, **options)
        run.state.path.parent.mkdir(exist_ok=True)
        batch = run.source.batch
        run.source.batch = lambda *args, run=run, batch=batch, stop=stop: (
            run.state.request_path.touch() if len(rates) == stop else None,
            batch(*args),
        )[1]
        run.state.request_path.unlink(missing_ok=True)
        clock.now += 1000  # in a queue
        if stop is None:
            run.fit()
            break
        with pytest.raises(Interrupted, match=f"after step {stop};"):
            run.fit()
        if stop > FIRST:
            _, facts = run.state.load()
            assert facts["schedule"]["total"] == whole.rows[-1]["step"] == 88
            assert facts["done"]["seconds"] == stop
    assert same(run.net.state_dict(), whole.net.state_dict())
    assert run.rows == whole.rows


# Settings, tables, words.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phase__minutes": 1, "phase__forward_equivalents": 9}, "all: forward_equivalents and minutes both set"),
        ({"train_teacher__minutes": 0}, "train_teacher.minutes is 0; expected: greater than 0"),
    ],
)
def test_two_lengths_of_one_training_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "a", "minutes": 1, "effort": {"gradients": 9}}, "effort and minutes both set the length"),
        (
            {"name": "a", "trains": "supernet", "minutes": 1, "effort": {"forward_equivalents": 9}},
            "effort and minutes of phase all both set its length",
        ),
    ],
)
def test_equal_effort_and_minutes_are_refused(entry, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(experiment={"trainings": [entry]})


def test_as_many_steps_as_a_training_with_minutes_are_not_known_beforehand():
    twins = {"trains": "twins", "archs": 2}
    for changes, part in (({"phase__minutes": 1}, "phase all"), ({"train_teacher__minutes": 1}, "the teacher")):
        rule = {"effort": {"steps": "path"}, "warm_start": "random"}
        run = tiny_config(experiment={"trainings": [{**twins, **rule}]}, **changes)
        with pytest.raises(ConfigError, match=rf"effort.steps is path, but {part} has minutes: .* its epochs to the"):
            with_twins(run)
    run = with_twins(tiny_config(experiment={"trainings": [{**twins, "epochs": 2}]}, phase__minutes=1))
    assert {(twin.epochs, twin.minutes) for twin in run.experiment.trainings} == {(2, 1)}
    run = with_twins(tiny_config(experiment={"trainings": [{**twins, "effort": {"gradients": 6}}]}, phase__minutes=1))
    assert {(twin.epochs, twin.minutes) for twin in run.experiment.trainings} == {(2, None)}


def test_a_stage_ends_in_time_and_its_table_and_the_report_say_so(tmp_path, capsys):
    paths = save_stripes(tmp_path)
    stage = Stage("train_teacher", paths, tmp_path / "teacher", epochs=2000, minutes=0.05)
    stage.run()
    said = capsys.readouterr().out
    assert "teacher: 2000 passes over 96 images, at most 0.05 min, " in said
    last = read_table(stage.outputs[1]).iloc[-1]
    assert last["step"] < last["planned_steps"] == 12_000
    assert last["lr"] < 0.05 * 0.05  # of twenty steps, on a busy machine
    made = last["step"] / 6
    assert f"teacher: minutes 0.05: {last['step']} steps ({made:.1f} epochs) instead of 2000 epochs, in " in said
    settings = tiny_config(train_teacher__epochs=2000, train_teacher__minutes=0.05).model_dump(mode="json")
    history = read_table(stage.outputs[1])
    words = setup._teacher_words(settings["train_teacher"], [history])
    assert f", {made:.1f} of 2000 epochs, in {last['seconds']:.0f} s, batch 16" in words
    others = [pd.DataFrame([{"phase": "teacher", "step": 3}]), history.assign(phase="control")]
    assert ", 2000 epochs, batch 16" in setup._teacher_words(settings["train_teacher"], others)
