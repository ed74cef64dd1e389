"""The training stages under torchrun, two gloo processes: as one process, killed, stopped, continued."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml
from helpers import save_stripes
from safetensors.torch import load_file
from stage_runs import ROOT, STARTED, Stage

from proard.artifacts import read_header

LONG = {"epochs": 3, "archs_per_step": 2, "minutes_between": 0.0005}  # 18 steps, saved after nearly every one
TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}  # float32 sums in another order, a few steps on
PATIENCE = 60  # seconds to wait for processes that got a signal to end


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test():
    yield
    while STARTED:
        process = STARTED.pop()
        for worker in children(process.pid):
            os.kill(worker, signal.SIGKILL)
        process.kill()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    paths = save_stripes(folder)
    stage = Stage("train_teacher", paths, folder)
    stage.run()
    return {**paths, "teacher": stage.outputs[0]}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The long phase in two processes, uninterrupted."""
    stage = Stage("train_phase", inputs, tmp_path_factory.mktemp("whole"), **LONG)
    out, err = stage.start(processes=2).communicate()
    assert "in each of 2 processes" in out, err
    return stage


def children(pid):
    """Processes that a living one has started."""
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def gone(pid):
    """Whether a process does not run any more."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_gone(pids):
    """Wait a little until none of these processes runs."""
    deadline = time.monotonic() + PATIENCE
    while not all(map(gone, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("train_teacher", {"objective": "trades", "batch_size": 15}),
        ("train_teacher", {"objective": "pgd_at"}),
        ("train_phase", {"loss": "rslad", "archs_per_step": 3}),
        ("train_phase", {"taught_by": "dynamic", "archs_per_step": 3, "batch_size": 15}),
    ],
    ids=["trades", "pgd_at", "frozen", "dynamic"],
)
def test_two_processes_write_what_one_writes(inputs, tmp_path, name, changes):
    # Few steps: later ones amplify rounding, where the sign of a gradient near zero changes.
    one, two = (Stage(name, inputs, tmp_path / str(count), epochs=0.5, **changes) for count in (1, 2))
    one.run()
    process = two.start(processes=2)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert {path.name for path in two.folder.iterdir()} == {path.name for path in one.folder.iterdir()}
    weights = [load_file(stage.outputs[0]) for stage in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, **TOLERANCE)
    first, second = (stage.history() for stage in (one, two))
    assert first.keys() == second.keys()
    for column, values in first.items():
        if column in ("phase", "arch", "dtype", "attack_dtype"):
            assert second[column] == values
        else:
            assert second[column] == pytest.approx(values, rel=1e-3, nan_ok=True), column


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_job_and_the_same_command_continues(inputs, whole, tmp_path, victim):
    stage = Stage("train_phase", inputs, tmp_path, **LONG)
    process = stage.start(processes=2)
    stage.wait_until_step(process, 4)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[victim], signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode != 0
    assert "forcefully" not in err, "the survivor was not stuck until torchrun lost its patience"
    assert re.search(r"^error: another process of this training is gone; the same command continues ", err, re.M), err
    assert all_gone(workers)
    assert stage.nothing_declared_is_there()
    out, err = stage.start(processes=2).communicate()
    assert re.search(r"resumed after step \d+ of 18", out), err
    assert stage.equals(whole)


def test_stopped_processes_save_and_one_process_continues(inputs, whole, tmp_path, capsys):
    stage = Stage("train_phase", inputs, tmp_path, **LONG)
    process = stage.start(processes=2)
    stage.wait_until_step(process, 4)
    workers = children(process.pid)
    os.kill(workers[1], signal.SIGTERM)  # reaches one of them; all stop at the same step
    _, err = process.communicate()
    assert process.returncode != 0
    (step,) = re.findall(r"^error: all: stopped by SIGTERM after step (\d+); the same command continues$", err, re.M)
    assert read_header(stage.state)["facts"]["done"]["step"] == int(step)
    assert all_gone(workers)
    stage.run()
    said = capsys.readouterr().out
    assert f"resumed after step {step} of 18" in said
    assert "2 processes before, 1 now" in said
    for key, value in load_file(whole.outputs[0]).items():
        torch.testing.assert_close(load_file(stage.outputs[0])[key], value, **TOLERANCE)


def test_processes_do_not_outlive_their_launcher(inputs, tmp_path):
    stage = Stage("train_phase", inputs, tmp_path, **LONG)
    process = stage.start(processes=2)
    stage.wait_until_step(process, 2)
    workers = children(process.pid)
    process.kill()
    process.wait()
    assert all_gone(workers)
    assert read_header(stage.state)["facts"]["done"]["step"] >= 2


def test_a_stage_that_does_not_train_is_refused_as_several_processes(inputs):
    environment = {**os.environ, "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "proard.stages.sample_archs", "--settings", '{"run": "x"}', "--archs", "x"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: sample_archs is no training: start it as one process, python -m proard.stages.sample_archs\n"
    )


def test_snakemake_starts_a_process_per_gpu(tmp_path):
    short = {"epochs": 1, "attack": {"num_steps": 1}}
    config = tmp_path / "small.yaml"
    config.write_text(
        yaml.safe_dump({"run": "small", "validation": {"num_images": 20, "num_steps": 1}, "train_teacher": short})
    )
    options = ["--snakefile", ROOT / "workflow" / "Snakefile", "--directory", tmp_path, "--configfile", config]
    command = [sys.executable, "-m", "snakemake", "train_teacher", "--cores", "2", *map(str, options)]
    several = ["--set-resources", "train_teacher:gpu=2"]
    done = subprocess.run([*command, *several], capture_output=True, text=True, check=False, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "starting python -m torch.distributed.run --standalone --nproc-per-node 2 -m proard.stages.train_tea" in said
    assert "device cpu, 1 threads in each of 2 processes" in said
    assert (tmp_path / "results" / "small" / "train_teacher" / "teacher.safetensors").exists()
    again = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=False, timeout=120)
    assert "Nothing to be done" in again.stdout + again.stderr
