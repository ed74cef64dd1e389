"""proard doctor, with fake SLURM commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from proard.config import load, read_file
from proard.doctor import here
from proard.doctor.checkup import merged, on_cluster
from proard.doctor.probe import HELD, TOKEN, facts

ROOT = Path(__file__).parents[1]
VERSION = "case $1 in --version) echo slurm 24.05; exit;; esac"
ANSWERS = {  # the answers of a healthy cluster, as shell lines
    "sbatch": f"{VERSION}; [ $1 = --test-only ] || {{ cat > job.sh; sh job.sh > said 2>&1; echo 7; }}",
    "srun": f'{VERSION}; shift 2; exec "$@"',
    "squeue": f"{VERSION}; echo COMPLETED",
    "scontrol": f"{VERSION}; echo MinJobAge = 300 sec",
    "scancel": VERSION,
    "sinfo": 'echo "work* gpu:h200:4"',
    "sacct": "echo Slurm accounting storage is disabled >&2; exit 1",
}
PROFILE = {"executor": "slurm", "jobs": 100, "slurm-status-command": "squeue", "default-resources": {"mem_mb": 4000}}


class Cluster:
    """A folder with fake commands, the only ones on PATH, and a profile called slurm."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, line in ANSWERS.items():
            self.answer(name, line)
        for name in ("sh", "cat", "env"):
            (folder / "bin" / name).symlink_to(f"/bin/{name}")
        monkeypatch.setenv("PATH", str(folder / "bin"))
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.delenv("SLURM_CONF", raising=False)
        monkeypatch.chdir(folder)
        self.profile()

    def answer(self, command: str, line: str) -> None:
        path = self.folder / "bin" / command
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def profile(self, **changes: object) -> None:
        path = self.folder / "slurm" / "profile.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({**PROFILE, **changes}, sort_keys=False))

    def failures(self, config: Path | None = None, *, jobs: bool = False) -> dict[str, str]:
        """Names of the failed checks of the cluster, with their result and fix."""
        run = None if config is None else load(read_file(config))
        found = on_cluster("slurm", run, Path("results"), jobs=jobs, patience=180.0)
        return {finding.name: f"{finding.result} -> {finding.fix}" for finding in found if finding.fails}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    return Cluster(tmp_path, monkeypatch)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump({"run": "a", "sample_archs": {"num_archs": 1000}, "evaluate_archs": {"archs_per_shard": 5}})
    )
    return path


def test_a_healthy_cluster_has_no_failures(cluster):
    assert cluster.failures() == {}


@pytest.mark.parametrize(
    ("command", "line", "check", "words"),
    [
        ("sinfo", "echo Unable to contact slurm controller >&2; exit 1", "SLURM", ["Unable to contact"]),
        ("sbatch", f"{VERSION}; echo sbatch: error: bad account >&2; exit 1", "a CPU job", ["bad account", "profile"]),
        ("scontrol", f"{VERSION}; echo MinJobAge = 60 sec", "status of jobs", ["60 s", "storage is disabled"]),
    ],
    ids=["controller", "account", "MinJobAge"],
)
def test_a_refusal_of_the_cluster_is_reported_with_a_fix(cluster, command, line, check, words):
    cluster.answer(command, line)
    found = cluster.failures()
    assert check in found
    assert all(word in found[check] for word in words), found


def test_a_machine_without_slurm_has_one_failure(cluster):
    (cluster.folder / "bin" / "sbatch").unlink()
    found = cluster.failures()
    assert list(found) == ["sbatch"]
    assert "no command sbatch" in found["sbatch"]


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"default-resources": {"slurm_account": "YOUR_ACCOUNT"}}, "a CPU job", ["still YOUR_ACCOUNT"]),
        ({"slurm-status-command": "sacct"}, "status of jobs", ["slurm-status-command: squeue"]),
        ({"slurm-array-jobs": "evaluate_archs", "slurm-array-limit": 50}, "job arrays", ["200 shards", "jobs: 100"]),
        ({"slurm-array-jobs": "evaluate_archs", "jobs": 500}, "job arrays", ["slurm-array-limit: 50"]),
    ],
    ids=["placeholder", "sacct", "arrays", "array limit"],
)
def test_what_is_wrong_in_the_profile_is_named(cluster, config, changes, check, words):
    cluster.profile(**changes)
    found = cluster.failures(config)
    assert next(iter(found)) == check
    assert all(word in found[check] for word in words), found


def test_jobs_have_the_flags_that_the_plugin_gives(cluster):
    cluster.answer("sbatch", f'echo "$@" >> {cluster.folder}/asked')
    gpu = {"slurm_partition": "gpu", "gpu_model": "h200"}
    gres = {"gpu": 0, "gres": "'gpu:h200:1'", "slurm_extra": "'--qos=long'"}
    cluster.profile(**{"set-resources": {"train_phase": gpu, "train_teacher": gpu, "evaluate_archs": gres}})
    assert cluster.failures() == {}
    asked = [line for line in (cluster.folder / "asked").read_text().splitlines() if "--test-only" in line]
    assert [line.split(" --time")[0].removeprefix("--test-only").strip() for line in asked] == [
        "",
        "--partition=gpu --gpus=h200:1",
        "--gres=gpu:h200:1 --qos=long",
    ]


def test_a_job_without_gpu_or_answer_is_reported(cluster):
    found = cluster.failures(jobs=True)
    if not os.path.exists("/dev/nvidia0"):
        assert list(found) == ["a GPU job: GPU"]
    cluster.answer("srun", f"{VERSION}; echo no module named proard >&2; exit 1")
    found = cluster.failures(jobs=True)
    assert "ended without an answer" in found["a CPU job runs"]


def test_a_waiting_job_is_cancelled_and_no_failure(cluster):
    cluster.answer("sbatch", f"{VERSION}; echo 7")
    cluster.answer("squeue", f"{VERSION}; case $* in *%r*) echo Priority;; *) echo PENDING;; esac")
    cluster.answer("scancel", f'echo "$@" >> {cluster.folder}/cancelled')
    found = list(on_cluster("slurm", None, Path("results"), jobs=True, patience=1.5))
    assert not [finding for finding in found if finding.fails]
    assert [finding.result for finding in found if "is still queued (Priority)" in finding.result]
    assert (cluster.folder / "cancelled").read_text().split().count("7") == 2


def test_a_folder_that_may_not_be_written_is_named(cluster):
    (cluster.folder / "results").write_text("a file")
    found = here.file_system(Path("results"))
    assert found.fails
    assert "results" in found.result


def test_the_command_ends_with_status_1_where_a_run_would_fail(cluster):
    command = [sys.executable, "-m", "proard.cli", "doctor", "--no-jobs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "all checks passed: a run can start"
    cluster.profile(**{"default-resources": {"slurm_partition": "YOUR_PARTITION"}})
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "fails a CPU job: slurm_partition is still YOUR_PARTITION\n      -> " in done.stdout
    done = subprocess.run([*command, "--profile", "slrum"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no profile slrum" in done.stderr


@pytest.mark.parametrize(
    ("version", "bounds", "met"),
    [
        ("9.27.1", ">=9.19,<10", True),
        ("10.0", ">=9.19,<10", False),
        ("9.2", ">=9.19,<10", False),
        ("2.15.0+cu132", ">=2.11", True),
        ("2.8.0", ">=2.8", True),
        ("2.1.4", "==2.1", True),
        ("7.0rc1", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version, bounds, met):
    assert here.within(version, bounds) is met


def test_config_files_are_put_over_each_other_key_by_key():
    assert merged([{"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"c": [3]}}]) == {"a": {"b": 1, "c": [3]}, "d": 1}


def test_the_disk_that_a_run_takes_grows_with_its_networks():
    small, large = (here.disk_of(load({"run": "a", "space": space})) for space in ("resnet_micro", "resnet_cifar"))
    assert large / small == pytest.approx(46.08 / 0.66, rel=0.2)
    assert large > 4 * 46.08e6 * 8


def test_a_probe_sees_the_callers_file_and_lock(tmp_path):
    (tmp_path / TOKEN).write_text("secret")
    (tmp_path / HELD).touch()
    assert facts(tmp_path)["respects_locks"] is False  # no process holds it
    with FileLock(tmp_path / HELD):
        done = subprocess.run(
            [sys.executable, "-m", "proard.doctor.probe", str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=True,
        )
    seen = json.loads(done.stdout)
    assert seen == json.loads((tmp_path / "answer.json").read_text())
    assert (seen["token"], seen["respects_locks"], seen["python"]) == ("secret", True, sys.executable)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"right": True, "bfloat16": False, "compiled": True}, "float32 replaces it; C kernels compiled"),
        ({"right": True, "bfloat16": True, "compiled": False}, "no C kernels"),
        ({"right": False, "cosine": 0.5, "parameter": "stem", "bfloat16": True, "compiled": True}, "stem is wrong"),
    ],
)
def test_arithmetic_is_described(facts, expected):
    line = json.dumps({"capability": "AVX2", "cosine": 1.0, "parameter": "", **facts})
    finding = here.arithmetic_finding(True, line)
    assert expected in finding.result
    assert finding.fails is not facts["right"]


def test_a_step_that_crashes_its_process_is_a_failure():
    assert here.arithmetic_finding(False, "corrupted size vs. prev_size").fails
