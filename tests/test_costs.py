"""The ledger: work counted by hand, cached measurements apart, attempts that add up, and what students alone cost."""

from __future__ import annotations

import builtins
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import image_sets, random_images, random_supernet, tiny_config, tiny_space
from synthetic_run import SyntheticRun
from training_runs import EPS, phase_run, plain_network, step_of, take

from proard import cli
from proard.artifacts import COSTS, Provenance, read_table, write_table
from proard.config import NEEDS, Attack, Measurement, Threat, UserError
from proard.config.losses import AdaAd, Rslad
from proard.evaluation import Conditions, SubnetMeter
from proard.progress import duration
from proard.report.cost_page import cost_figure
from proard.report.costs import CostComparison, by_stage, emissions, read_ledgers
from proard.report.svg import to_svg
from proard.space import Tally, Work, one_pass
from proard.stages import report
from proard.stages.energy import EnergyMeter, read_brand_alone
from proard.stages.ledger import Ledger
from proard.training import passes_alone, phase_plan

SPACE = tiny_space()
LABELS = torch.arange(6) % 3


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return image_sets(tmp_path_factory.mktemp("sets"), train=48, val=30)


def phase_of(**changes):
    (phase,) = tiny_config(**{f"phase__{key}": value for key, value in changes.items()}).train_phase.phases
    return phase


def macs(arch):
    return SPACE.spec(arch).macs


def test_work_adds_up_and_multiplies():
    assert 2 * (one_pass(10) + Work(1, 5, 3)) == Work(4, 30, 6)
    assert sum([one_pass(1), one_pass(2)], start=Work()) == Work(2, 3)


# A training step: every network's passes times its own size.


@pytest.mark.parametrize(
    ("changes", "own", "asked"),
    [
        ({"loss": "rslad"}, 3 + 2 * 2 + 3, 1),
        ({"loss": "adaad"}, 1 + 2 * 2 + 3, 2 * 2 + 1),  # a clean pass for batch norm alone
        ({"loss": "mtard"}, 3 + 2 * 2 + 3, 2),
        ({"loss": "rslad", "awp": {"gamma": 0.01}}, 3 + 2 * 2 + 3 + 6, 1),
    ],
)
def test_passes_count_at_the_size_of_their_network(changes, own, asked):
    phase = phase_of(sampling="uniform", archs_per_step=1, **changes)
    plan = phase_plan(SPACE, phase)
    (drawn,) = plan.draw(0, 0, 0)
    net = random_supernet(SPACE, dtype=torch.float32)
    step = step_of(net, phase, plan, teacher=plain_network(), control=plain_network())
    work = take(step, random_images(SPACE, 6, dtype=torch.float32), LABELS).work
    assert work == Work(own + asked, own * macs(drawn.arch) + asked * macs(SPACE.largest), 1)


def test_a_dynamic_teacher_and_the_frozen_one_beside_it_are_both_paid():
    phase = phase_of(sampling="uniform", archs_per_step=1, loss="iad", teacher="both")
    plan = phase_plan(SPACE, phase)
    net = random_supernet(SPACE, dtype=torch.float32)
    number = next(step for step in range(20) if len(plan.draw(0, step, 0)) == 2)
    _, student = plan.draw(0, number, 0)
    step = step_of(net, phase, plan, teacher=plain_network())
    work = take(step, random_images(SPACE, 6, dtype=torch.float32), LABELS, number=number).work
    each = 3 + 2 * 2 + 3
    largest = 1 + each + 2  # frozen on clean images, the guide's own step, both on adversarial images
    assert work == Work(largest + each, largest * macs(SPACE.largest) + each * macs(student.arch), 2)


def test_a_subnet_without_a_frozen_teacher_is_counted_in_the_history(sets, tmp_path):
    run = phase_run(sets["train"], tmp_path, archs_per_step=2, sampling="sandwich", loss="rslad")
    last = run.rows[-1]
    images, each = last["images"], 3 + 2 * 2 + 3
    assert last["weight_gradients"] == 2 * images
    expected = images * (each * (macs(SPACE.largest) + macs(SPACE.smallest)) + macs(SPACE.largest))
    assert last["work_macs"] == pytest.approx(expected)


# Measuring.


class Seen(torch.nn.Module):
    """Counts images, and those among them that a gradient was taken of."""

    def __init__(self, net):
        super().__init__()
        self.net, self.images = net, 0

    def forward(self, images):
        self.images += len(images)
        return self.net(images)


class Counting(SubnetMeter):
    def _student(self, arch):
        self.seen = Seen(super()._student(arch))
        return self.seen


def meter(sets, folder, tally):
    options = {"checksum": "abc", "train": sets["train"], "cache": folder, "tally": tally}
    conditions = Conditions(Threat(eps=EPS), Measurement(recalibration_images=20, batch_size=10), 0)
    return Counting(random_supernet(SPACE, dtype=torch.float32), conditions=conditions, **options)


def test_measurements_are_spent_once_and_cached_afterwards(sets, tmp_path):
    attacks = [Attack(name="a", num_steps=3, step_size=0.05), Attack(name="b", objective="margin", num_steps=2)]
    arch, first, second = SPACE.smallest, Tally(), Tally()
    made = meter(sets, tmp_path, first)
    rows = made.rows(arch, sets["val"], attacks)
    gradients = sum(row["gradients"] for row in rows)
    last = sum(round(row["robust_acc"] * 30) for row in rows)  # at least these passed without a gradient
    forwards = made.seen.images - 30 - gradients  # the actual passes: the clean pass, and forwards of the attacks
    assert last <= forwards <= 60
    assert first.spent == (20 + 30 + 2 * gradients + forwards) * one_pass(macs(arch))
    assert first.cached == Work()
    meter(sets, tmp_path, second).rows(arch, sets["val"], attacks)
    assert second.spent == Work()
    assert second.cached == (30 + 2 * gradients + forwards) * one_pass(macs(arch))
    assert second.cached_seconds == pytest.approx(sum(row["seconds"] for row in rows))


# The ledger of a job.


def test_a_ledger_says_what_was_spent(tmp_path):
    ledger = Ledger("train_phase", tmp_path / "train_phase" / "depth" / "net.safetensors", device="cpu", threads=3)
    ledger.trained, ledger.tally.spent = Work(10, 100, 4), Work(1, 7)
    ledger.tally.cached, ledger.tally.cached_seconds = Work(2, 9), 1.5
    ledger.write(Provenance("tiny", "train_phase", seed=5))
    (row,) = read_table(tmp_path / "train_phase" / "depth" / "costs.parquet").to_dict("records")
    assert (row["stage"], row["job"], row["attempts"], row["devices"], row["seed"]) == ("train_phase", "depth", 1, 3, 5)
    assert (row["forward_equivalents"], row["work_macs"], row["weight_gradients"]) == (11, 107, 4)
    assert (row["train_macs"], row["measure_macs"], row["cached_macs"], row["cached_seconds"]) == (100, 7, 9, 1.5)
    assert row["device_seconds"] == pytest.approx(3 * row["seconds"])
    assert row["peak_rss_bytes"] > 2**24
    assert row["energy_wh"] >= 0
    assert "codecarbon" in row["energy_method"]


@pytest.mark.parametrize("stage", NEEDS)
def test_every_stage_records_its_costs(stage):
    source = (Path(report.__file__).parent / f"{stage}.py").read_text("utf-8")
    assert source.split("def main(")[1].split("\n\n\n")[0].rstrip().endswith("job.record_costs()")


def test_attempts_add_up(tmp_path):
    first, second = (Ledger("train_teacher", tmp_path / "a.safetensors", device="cpu", threads=1) for _ in range(2))
    first.tally.spent = Work(5, 50)
    first.started -= 100
    second.resume(first.state())
    second.started -= 10
    second.tally.spent += Work(1, 10)
    row = second.row()
    assert (row["attempts"], row["measure_forward_equivalents"], row["measure_macs"]) == (2, 6, 60)
    assert 110 <= row["seconds"] < 120
    second.resume(None)  # an older state, without a ledger
    assert second.row()["attempts"] == 2


def test_no_counter_is_no_failure(monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments):
        if name == "codecarbon":
            raise ImportError("not here")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    meter = EnergyMeter()
    assert meter.read() is None
    assert meter.method == "none: ImportError: not here"


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="not Linux")
def test_the_brand_of_the_processor_is_what_a_full_look_finds(tmp_path):
    import cpuinfo

    own = cpuinfo.get_cpu_info
    try:
        cpuinfo.get_cpu_info = cpuinfo.cpuinfo.get_cpu_info
        expected = cpuinfo.get_cpu_info().get("brand_raw")
        read_brand_alone()
        assert cpuinfo.get_cpu_info().get("brand_raw") == expected
        other = tmp_path / "cpuinfo"
        other.write_text("processor : 0\nmodel name\t: A CPU @ 1 GHz \nprocessor : 1\nmodel name : another\n")
        read_brand_alone(other)
        assert cpuinfo.get_cpu_info() == {"brand_raw": "A CPU @ 1 GHz"}
        cpuinfo.get_cpu_info = full = lambda: {}
        other.write_text("processor : 0\nCPU part : 0xd40\n")
        for unknown in (other, tmp_path / "absent"):
            read_brand_alone(unknown)
            assert cpuinfo.get_cpu_info is full
    finally:
        cpuinfo.get_cpu_info = own


def test_energy_grows_in_silence(capfd):
    meter = EnergyMeter()
    first = meter.read()
    ended = time.monotonic() + 0.3
    while time.monotonic() < ended:
        torch.rand(200, 200).sum()
    assert meter.read() > first >= 0
    assert capfd.readouterr() == ("", "")


def test_emissions_follow_the_country():
    assert emissions(1000, "SWE") < emissions(1000, "USA")
    with pytest.raises(UserError, match="country 'QQQ' is not known; expected three letters"):
        emissions(1000, "QQQ")


# Students alone.


def test_passes_of_a_student_alone():
    found = passes_alone(SPACE, phase_of(loss="rslad"), Rslad())
    assert found == (3 + 2 * 2 + 3, 1)
    assert passes_alone(SPACE, phase_of(loss="rslad", teacher="dynamic"), Rslad()) == found  # frozen, for one alone
    found = passes_alone(SPACE, phase_of(loss="adaad", attack__num_steps=3), AdaAd())
    assert found == (1 + 2 * 3 + 3, 2 * 3 + 1)
    attack = {"num_steps": 3, "first_steps": 1}
    assert passes_alone(SPACE, phase_of(attack=attack), Rslad())[0] == 3 + 2 * 2 + 3  # 1, 2, 3 steps


def comparison(**changes):
    facts = {
        "shared": 1000,
        "training": 600,
        "once": 800,
        "each": 10,
        "images": {"steps": 10.0},
        "own": 10,
        "others": 1,
    }
    return CostComparison(**{**facts, "teacher_macs": 4, "students": {"macs=2": 2}, "mean_macs": 1, **changes})


def test_ratio_and_break_even_by_hand():
    found = comparison()
    assert found.alone(2) == 10 * (10 * 2 + 4) == 240
    assert found.ratio(5, 2) == (1000 + 5 * 240) / (1000 + 800 + 5 * 10)
    assert found.training_ratio(5, 2) == (1000 + 5 * 240) / (1000 + 600)
    number = found.break_even(2)
    assert number == 4  # 800 / 230 is 3.5
    assert found.ratio(number - 1, 2) < 1 <= found.ratio(number, 2)
    assert comparison(each=500).break_even(2) is None


def job(folder, stage, name="", **costs):
    row = {"stage": stage, "job": name, "attempts": 1, "seconds": 1.0, "device": "cpu", "devices": 1, **costs}
    write_table(folder / stage / name / "costs.parquet", [row], COSTS, Provenance("r", stage))


def test_a_run_is_summed_by_stage(tmp_path, capsys):
    job(tmp_path, "train_teacher", seconds=5.0, work_macs=3e12, forward_equivalents=10.0, peak_rss_bytes=7)
    job(tmp_path, "evaluate_archs", "0-1", work_macs=1e12, cached_macs=2e12, peak_rss_bytes=3, energy_wh=1.0)
    job(tmp_path, "evaluate_archs", "2-3", work_macs=4e12, cached_macs=0.0, peak_rss_bytes=5, peak_cuda_bytes=3e9)
    ledgers = read_ledgers(tmp_path)
    table = by_stage(ledgers).set_index("stage")
    assert table.index.tolist() == ["train_teacher", "evaluate_archs"]
    shards = table.loc["evaluate_archs"]
    assert (shards["jobs"], shards["work_macs"], shards["cached_macs"], shards["peak_rss_bytes"]) == (2, 5e12, 2e12, 5)
    assert pd.isna(shards["energy_wh"]), "a sum with an unknown part is unknown"
    cli.main(["cost", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "5.00\u202fT" in printed
    assert "no comparison without" in printed
    assert "peak GPU bytes" in printed
    assert "3.00\u202fG" in printed


def test_a_folder_without_a_run_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["cost", str(tmp_path)])
    assert "holds no costs.parquet" in capsys.readouterr().err


def test_the_page_tells_costs_and_the_comparison(tmp_path):
    run = SyntheticRun(tmp_path)
    peaks = {"peak_rss_bytes": 2**30, "peak_cuda_bytes": 5 * 2**30}
    job(run.folder, "train_teacher", seconds=65.0, work_macs=3e12, energy_wh=2.0, **peaks)
    report.main([*run.flags(), "--ledgers", str(run.folder)])
    page = run.path("report", "report.html").read_text("utf-8")
    section = page.split('<section id="costs">')[1].split("</section>")[0]
    assert "3.00\u202fT" in section
    assert "1.0, GPU 5.0" in section
    assert "Energy 2 Wh" in section
    assert "no comparison without" in section
    assert "Jobs without a ledger were read from their table" in section
    assert "the section on time has Snakemake's" in section  # two tables of times differ, and say why
    section = page.split('<section id="time">')[1].split("</section>")[0]
    total = duration(read_ledgers(run.folder).query("stage != 'report'")["seconds"].sum())
    assert f'<a href="#costs">What it cost</a> counts {total}: each job from the reading' in section
    figure = to_svg(cost_figure(comparison(images={"steps": 10.0, "path": 30.0})), "costs")
    for words in ("mean of the exported students, path", "Training steps only", "the paper"):
        assert words in figure
