"""The workflow on a real SLURM: a whole run, and one with every kind of failure on a cluster.

After each failure, the documented recovery gives the tables and weights of an undisturbed run, which
ran here, without SLURM.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cluster_runs import FROM_PHASE, ROOT, Run, copy_of, made_once, same, wait_until
from mini_slurm import Slurm, missing, slurm_cluster
from profiles import edited_profile, rules_with_a_gpu

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    if (why := missing()) is not None:
        if os.environ.get("PROARD_REQUIRE_SLURM"):
            pytest.fail(why)
        pytest.skip(f"no SLURM can be started: {why}")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, slurm_cluster(Path(folder)) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def undisturbed(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "undisturbed"
    run = Run(folder)
    made_once(folder, run)
    return run


@pytest.fixture
def run(undisturbed: Run, slurm: Slurm, tmp_path: Path) -> Iterator[Run]:
    """The undisturbed run up to its last phase; no job of it outlives the test."""
    copied = copy_of(undisturbed, tmp_path / "run", slurm, without=FROM_PHASE)
    yield copied
    copied.stop()


def test_a_run_from_an_empty_folder_equals_the_one_without_a_cluster(undisturbed, slurm, tmp_path):
    run = Run(tmp_path / "run", slurm)
    run()
    assert same(run, undisturbed)
    assert run.parity() == [True]
    assert (run.results / "report" / "report.html").exists()
    assert set(run.states("")) == {"COMPLETED"}
    rules = {job["comment"].removeprefix("rule_").split("_wildcards")[0]: job for job in run.jobs("").values()}
    assert {name for name, job in rules.items() if "gpu" in job["gpus"]} == rules_with_a_gpu() & set(rules)
    assert {"prepare_data", "train_phase", "evaluate_archs", "merge_table", "export_student", "report"} < set(rules)
    assert not (ROOT / "logs" / "slurm").exists()


def test_a_cancelled_job_is_submitted_again_with_more_memory(run, undisturbed, slurm):
    process = run.start("train_phases")
    slurm("scancel", run.trains(process))
    run.end(process)
    assert run.states("train_phase") == ["CANCELLED", "COMPLETED"]
    assert run.resumed()
    assert run.weights() == phases_of(undisturbed)
    memory = [job["memory"] for job in run.jobs("train_phase").values()]
    assert memory == ["16000M", "32000M"]


def test_a_killed_process_is_started_again(run, undisturbed):
    process = run.start("train_phases")
    run.trains(process)
    assert run.signal_trainers(signal.SIGKILL) == 1
    run.end(process)
    assert run.states("train_phase") == ["FAILED", "COMPLETED"]
    assert run.resumed()
    assert run.weights() == phases_of(undisturbed)


def test_a_job_that_hits_its_time_limit_continues_in_the_next_attempt(run, undisturbed, slurm):
    process = run.start("train_phases")
    job = run.trains(process)
    assert run.signal_trainers(signal.SIGSTOP) == 1  # hangs until SLURM's time limit
    slurm("scontrol", "update", f"jobid={job}", "timelimit=1")  # only this job's: a slow machine needs the next one's
    run.end(process)
    assert run.states("train_phase") == ["TIMEOUT", "COMPLETED"]
    assert run.resumed()
    assert run.weights() == phases_of(undisturbed)


def test_a_requeued_job_continues_under_the_same_number(run, undisturbed, slurm):
    process = run.start("train_phases")
    job = run.trains(process)
    slurm("scontrol", "requeue", job)
    run.end(process)
    assert {number: facts["state"] for number, facts in run.jobs("train_phase").items()} == {job: "COMPLETED"}
    assert re.search(r"Restarts=1\b", slurm("scontrol", "show", "job", job))
    assert run.resumed()
    assert run.weights() == phases_of(undisturbed)


def test_drained_nodes_are_waited_for_and_a_lost_node_is_left(run, undisturbed, slurm):
    slurm("scontrol", "update", "nodename=n1,n2", "state=drain", "reason=test")
    try:
        process = run.start("train_phases")
        wait_until(lambda: run.states("train_phase") == ["PENDING"], "no job", process)
        time.sleep(3)
        assert run.states("train_phase") == ["PENDING"]
    finally:
        slurm("scontrol", "update", "nodename=n1,n2", "state=resume")
    job = run.trains(process)
    lost = run.jobs("train_phase")[job]["nodes"]
    slurm("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    try:
        run.end(process)
    finally:
        slurm("scontrol", "update", f"nodename={lost}", "state=resume")
    assert run.states("train_phase") == ["COMPLETED"]
    assert run.jobs("train_phase")[job]["nodes"] != lost
    assert run.resumed()
    assert run.weights() == phases_of(undisturbed)


def test_a_killed_snakemake_is_unlocked_and_run_again(run, undisturbed, slurm):
    process = run.start("train_phases")
    orphan = run.trains(process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert orphan in slurm.jobs(states="running")
    assert "Directory cannot be locked" in run("train_phases", status=1)
    run("train_phases", "--unlock")
    run("train_phases", "--rerun-incomplete")
    assert run.weights() == phases_of(undisturbed)


def test_a_full_disk_is_said_and_mended(run, undisturbed):
    folder = run.results / "train_phase" / "all"
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "full", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        run("train_phases", "--retries", "0", status=1)
        assert re.search(r"error: .*no space left.*supernet", (run.logs / "train_phase" / "all.log").read_text())
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        run("train_phases")
        assert run.weights() == phases_of(undisturbed)
    finally:
        run.stop()
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_damaged_shard_is_named_and_measured_again(undisturbed, slurm, tmp_path):
    run = copy_of(undisturbed, tmp_path / "run", slurm, without=["merge_table"])
    shard = run.results / "evaluate_archs" / "0004-0007" / "table.parquet"
    content = bytearray(shard.read_bytes())
    column = pq.ParquetFile(shard).metadata.row_group(0).column(0)
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    shard.write_bytes(content)
    run("merge_table", "--retries", "1", status=1)
    attempts = run.jobs("merge_table").values()
    assert [(job["state"], job["memory"]) for job in attempts] == [("FAILED", "4000M"), ("FAILED", "8000M")]
    said = (run.logs / "merge_table.log").read_text()
    assert re.search(r"error: .*/0004-0007/table.parquet is no readable .*; delete it and rerun its stage", said)
    shard.unlink()
    run("merge_table")
    assert run.states("evaluate_archs") == ["COMPLETED"]
    assert same(run, undisturbed)


def test_an_edited_profile_sends_shards_to_its_gpus_as_one_array(undisturbed, slurm, tmp_path):
    shards = ["sample_archs", "evaluate_archs", "merge_table", "cache"]
    run = copy_of(undisturbed, tmp_path / "run", slurm, without=shards)
    run.profile[1] = edited_profile(tmp_path / "site", partition="work", gpu_partition="gpu")
    run("merge_table", "--jobs", "5")
    shards = run.jobs("evaluate_archs")
    assert len(shards) == 4
    assert len({number.split("_")[0] for number in shards}) == 1
    assert {(job["partition"], job["gpus"]) for job in shards.values()} == {("gpu", "gres:gpu:h200:1")}
    assert {(job["partition"], job["gpus"]) for job in run.jobs("sample_archs").values()} == {("work", "N/A")}
    assert same(run, undisturbed)


def phases_of(run: Run) -> dict[str, str]:
    """The weights that exist when the phases are trained."""
    return {name: checksum for name, checksum in run.weights().items() if name.startswith(("prepare_data", "train_"))}
