"""Trainings that exit before their job's time limit, signals, and the two kept states."""

from __future__ import annotations

import math
import re
import signal
import time

import pytest
from helpers import save_stripes, tiny_config
from stage_runs import LONG, Stage

from proard.artifacts import read_header
from proard.config import UserError, job_settings
from proard.training import ResumeState
from proard.training.time_limit import TimeLimit, end_of_job


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return save_stripes(folder)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The long teacher, uninterrupted."""
    stage = Stage("train_teacher", inputs, tmp_path_factory.mktemp("whole"), **LONG)
    stage.run()
    return stage


# When a job ends.


def test_the_end_of_a_job_comes_from_its_environment():
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1000"}
    assert end_of_job({}) == math.inf
    assert end_of_job(slurm) == 1000
    assert end_of_job({**slurm, "PROARD_END_TIME": "500.5"}) == 500.5
    with pytest.raises(UserError, match=r"SLURM_JOB_END_TIME is 'soon'; expected seconds since 1970"):
        end_of_job({"SLURM_JOB_END_TIME": "soon"})


@pytest.mark.parametrize(
    ("said", "end"),
    [
        ("2033-05-18T03:33:20", time.mktime((2033, 5, 18, 3, 33, 20, 0, 0, -1))),
        ("NONE", math.inf),
        ("", math.inf),
        (None, math.inf),
    ],
)
def test_squeue_is_asked_where_the_environment_does_not_say(tmp_path, monkeypatch, said, end):
    if said is not None:
        queue = tmp_path / "squeue"
        queue.write_text(f"#!/bin/sh\n[ \"$3\" = 7 ] && echo '{said}'\n")
        queue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=None)
    assert end_of_job({"SLURM_JOB_ID": "7"}) == end


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self):
        return self.now


def test_a_budget_is_short_where_the_next_step_and_saving_may_not_fit():
    clock = Clock()
    budget = TimeLimit(2000, clock=clock)  # keeps 60 s aside
    assert not budget.is_short(ends_epoch=True)
    for now, ends_epoch in ((10, False), (40, False), (540, True)):
        clock.now = now
        budget.step(ends_epoch=ends_epoch)
    clock.now = 560
    budget.saved()
    limits = {False: 2000 - 60 - 20 - 30, True: 2000 - 60 - 20 - 500}
    for ends_epoch, limit in limits.items():
        for now, short in ((limit - 20, False), (limit + 1, True)):
            clock.now = budget.before = now
            assert budget.is_short(ends_epoch=ends_epoch) == short, (ends_epoch, now)


def test_a_tenth_of_a_short_job_is_kept_aside_and_without_an_end_nothing_is_short():
    clock = Clock()
    assert TimeLimit(100, clock=clock).aside == 10
    endless = TimeLimit(clock=clock)
    clock.now = 1e12
    endless.step(ends_epoch=False)
    assert not endless.is_short(ends_epoch=True)


# Real processes.


@pytest.mark.parametrize("how", ["SLURM_JOB_END_TIME", "--minutes"])
def test_a_training_leaves_before_its_time_is_up_and_continues(inputs, whole, tmp_path, how):
    """Even with no time left each attempt makes one step."""
    stage = Stage("train_teacher", inputs, tmp_path, **{**LONG, "minutes_between": 5})
    over = {how: str(int(time.time()))} if how.startswith("SLURM") else {}
    more = ["--minutes", "0"] if how.startswith("--") else []
    for step in (1, 2) if over else (1,):
        process = stage.start(*more, **over)
        _, err = process.communicate()
        assert process.returncode == 1
        wanted = f"error: teacher: stopped by the end of the job's time after step {step}; the same command continues\n"
        assert err == wanted
        assert read_header(stage.state)["facts"]["done"]["step"] == step
    stage.run()
    assert stage.equals(whole)


def test_an_early_warning_makes_a_training_save_and_leave(inputs, whole, tmp_path):
    stage = Stage("train_teacher", inputs, tmp_path, **LONG)
    process = stage.start()
    stage.wait_until_step(process, 3)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate()
    assert process.returncode == 1
    (step,) = re.findall(
        r"^error: teacher: stopped by SIGUSR1 after step (\d+); the same command continues$", err, re.M
    )
    assert read_header(stage.state)["facts"]["done"]["step"] == int(step)
    stage.run()
    assert stage.equals(whole)


# States.


@pytest.mark.parametrize("damage", ["half", "missing"])
def test_the_previous_state_continues_where_the_newest_is_damaged(inputs, whole, tmp_path, capsys, damage):
    stage = Stage("train_teacher", inputs, tmp_path, **LONG)
    process = stage.start()
    stage.wait_until_step(process, 5)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    previous = stage.state.with_name("teacher.previous.state")
    newest, before = (read_header(path)["facts"]["done"]["step"] for path in (stage.state, previous))
    assert before < newest
    data = stage.state.read_bytes()
    if damage == "missing":  # killed between two renamings
        stage.state.unlink()
    else:
        stage.state.write_bytes(data[: len(data) // 2])
    stage.run()
    said = capsys.readouterr().out
    assert ("state ignored" in said) == (damage != "missing")
    assert f"resumed after step {before} of 60" in said
    assert stage.equals(whole)


def test_how_often_a_state_is_saved_changes_no_settings_of_jobs():
    jobs = [job_settings(tiny_config(save_every_minutes=minutes), "train_teacher") for minutes in (5, 0.5)]
    assert jobs[0] == jobs[1]
    assert job_settings(tiny_config(train_teacher__lr=0.123), "train_teacher") != jobs[0]


def test_a_state_saved_at_another_rhythm_counts(inputs, whole, tmp_path, capsys):
    stage = Stage("train_teacher", inputs, tmp_path, **LONG)
    process = stage.start()
    stage.wait_until_step(process, 3)
    process.kill()
    process.wait()
    Stage("train_teacher", inputs, tmp_path, **{**LONG, "minutes_between": 7}).run()
    assert "resumed after step" in capsys.readouterr().out
    assert stage.equals(whole)


def test_a_flag_says_how_often_a_training_saves(inputs, tmp_path, monkeypatch):
    steps: list[int] = []

    def save(state, tensors, facts):
        steps.append(facts["done"]["step"])
        original(state, tensors, facts)

    original = ResumeState.save
    monkeypatch.setattr(ResumeState, "save", save)
    short = {"epochs": 1, "minutes_between": 1e-6}
    Stage("train_teacher", inputs, tmp_path, **short).run()
    Stage("train_phase", inputs, tmp_path, teacher=tmp_path / "teacher.safetensors", **short).run()
    # one more at each end, for what follows may take long
    assert steps == 2 * [1, 2, 3, 4, 5, 6, 6]
