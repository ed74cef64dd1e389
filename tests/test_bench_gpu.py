"""The GPU benchmark without a GPU: its message, its CPU form, its sections and their time."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from gpu_problems import small_problem

from proard.kernels.switch import in_use


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_that_nothing_was_run(capsys):
    import bench_gpu

    bench_gpu.main([])
    assert capsys.readouterr().out == bench_gpu.NO_GPU + "\n"


class Here:
    """Runs a section in this process, so that a test can change it."""

    def __init__(self, section, args):
        self.section, self.args = section, args

    def finish(self, start, seconds):
        from gpu.sections import problem_of, run_section

        problem = problem_of(self.section.space, self.args, self.args.width_scale)
        return run_section(self.section, self.args, problem, start)

    def stop(self):
        pass


def test_cpu_form_measures_every_section_and_lists_what_it_left_out(tmp_path, capsys):
    import bench_gpu
    from other_libraries import libraries

    bench_gpu.main(["--device", "cpu", "--quick", "--json", str(tmp_path / "rows.json")], work=Here)
    printed = capsys.readouterr().out
    spaces = ("resnet_digits", "mobilenet_digits")
    for space in spaces:
        assert f"equal: captured attack against the eager one: 100.000% of pixels alike ({space})" in printed
    left_out = [line.removeprefix("not run: ") for line in printed.splitlines() if line.startswith("not run: ")]
    assert left_out == bench_gpu.ON_GPU_ONLY
    *rows, last = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    assert last["not_run"] == left_out
    found = {}
    for row in rows:
        found.setdefault((row["bench"], row.get("space")), []).append(row["row"])
    assert next(iter(found)) == ("gpu_ceilings", None)
    assert found == {
        ("gpu_ceilings", None): [row["row"] for row in rows[:5]],
        **{("gpu", space): ["G0", "G1", "G2", "G4", "G5"] for space in spaces},
        **{("gpu_shared", space): [f"S{number}" for number in range(7)] for space in spaces},
        **{("gpu_labels", space): ["L0", "L1", "L2", "L3"] for space in spaces},
        **{("gpu_attack", space): ["plain", *libraries(), "float32", "bfloat16"] for space in spaces},
        ("gpu_data", None): ["D0", "D1", "D2"],
        ("gpu_kernels", None): ["pgd_update_", "softmax_difference"],
    }
    assert all(row["ms_per_step"] > 0 and row["ratio_plain"] > 0 for row in rows if row["bench"] == "gpu")
    assert all("baseline" in row for row in rows if "ratio_total" in row)
    limit = next(row["rate"] for row in rows if row["row"] == "convolution_float32_tflops")
    for row in (row for row in rows if row["row"] == "float32"):
        share = 4 * row["macs"] * row["gradients_per_second"] / (1e12 * limit)
        assert row["ceiling_share"] == pytest.approx(share, abs=1e-3)
        assert all(row[f"ratio_{name}"] > 0 for name in libraries())
        assert 0 <= row["robust_acc"] <= 1


def test_a_training_step_is_profiled_and_the_full_recipes_are_priced(tmp_path):
    from common import Budget
    from gpu import rows

    clock, profile = rows.Clock(Budget(), torch.device("cpu"), 1), tmp_path / "kernels.txt"
    busy, *hours = rows.busy_rows(small_problem(), clock, steps=1, profile=str(profile))
    assert busy["busy"] > 0
    assert busy["launches"] > 100
    assert "convolution" in profile.read_text()
    assert [row["row"] for row in hours] == ["cifar10_resnet", "cifar10_resnet_fast"]
    assert hours[0]["hours"] > 2 * hours[1]["hours"] > 0, "the published recipe takes several times as many passes"


def test_attacks_of_unequal_strength_are_not_timed():
    from gpu.rows import require_equal_accuracies

    close, apart = {"foolbox": 0.5, "bfloat16": 0.5015}, {"foolbox": 0.5, "bfloat16": 0.504}
    require_equal_accuracies({"accuracies": close, "noise": 0.0})
    require_equal_accuracies({"accuracies": apart, "noise": 0.01})
    with pytest.raises(SystemExit, match=r"differ by 0\.0040, .* 0\.0020: foolbox 0\.5000, bfloat16 0\.5040"):
        require_equal_accuracies({"accuracies": apart, "noise": 0.001})


def test_sections_are_left_out_and_named_where_time_is_short(tmp_path, capsys):
    import bench_gpu

    path = tmp_path / "rows.json"
    bench_gpu.main(["--device", "cpu", "--quick", "--minutes", "1e-7", "--json", str(path)], work=Here)
    printed = capsys.readouterr().out
    late = "it would end after the 1e-07 minutes allowed"
    names = ["ceilings", "augmented images", "kernels alone"]
    for what in ("equality", "one subnet a step", "2 subnets a step", "seconds per label", "share of the ceiling"):
        names += [f"{what}, {space}" for space in ("resnet_digits", "mobilenet_digits")]
    assert all(f"not run: {name}: {late}" in printed for name in names)
    assert [json.loads(line)["bench"] for line in path.read_text().splitlines()] == ["gpu_left_out"]


def test_a_section_that_fails_is_named_and_costs_no_other_its_rows(tmp_path, capsys):
    import bench_gpu

    def full(context):
        raise torch.OutOfMemoryError("no memory left\non this device")

    def work(section, args):
        return Here(replace(section, measure=full) if section.part == "step" else section, args)

    path = tmp_path / "rows.json"
    parts = "ceilings,step,twins"
    with pytest.raises(SystemExit, match="failed: one subnet a step, resnet_digits; one subnet a step, mobilenet"):
        bench_gpu.main(["--device", "cpu", "--quick", "--sections", parts, "--json", str(path)], work=work)
    printed = capsys.readouterr().out
    assert "not run: one subnet a step, resnet_digits: OutOfMemoryError: no memory left\n" in printed
    states = [line.split()[-1] for line in printed.split("in all\n")[1].splitlines()[1:5]]
    assert states == ["done", "failed", "failed", "done"]
    kept = {json.loads(line)["bench"] for line in path.read_text().splitlines()}
    assert kept == {"gpu_ceilings", "gpu_kernels", "gpu_left_out"}


LOST = """
import json, os, signal, sys, time
title, result = (sys.argv[sys.argv.index(name) + 1] for name in ("--one", "--result"))
start = json.loads(sys.stdin.readline())
if title == "ceilings":
    time.sleep(60)
if title == "augmented images":
    os.kill(os.getpid(), signal.SIGSEGV)
json.dump({"state": "done", "rows": [{"row": title, "bench": "b"}]}, open(result, "w"))
"""


def test_a_process_that_dies_or_hangs_stops_no_other(tmp_path, capsys):
    import bench_gpu

    script = tmp_path / "section.py"
    script.write_text(LOST)
    work, pace = partial(bench_gpu.OwnProcess, script=script), bench_gpu.Pace(loading=0.0, spare=0.0)
    path = tmp_path / "rows.json"
    argv = ["--device", "cpu", "--quick", "--sections", "ceilings,data,twins", "--json", str(path), "--minutes", "0.05"]
    with pytest.raises(SystemExit, match="failed: ceilings; augmented images"):
        bench_gpu.main(argv, work=work, pace=pace)
    printed = capsys.readouterr().out
    assert "ceilings: stopped after" in printed
    assert "augmented images: its process ended with signal 11" in printed
    assert [json.loads(line).get("row") for line in path.read_text().splitlines()] == ["kernels alone", None]


class Paced:
    """Sections that take so many seconds on a clock of their own."""

    def __init__(self, seconds, states):
        self.now, self.seconds, self.states, self.given = 0.0, seconds, states, {}

    def __call__(self, section, args):
        return SimpleNamespace(finish=lambda start, limit: self.finish(section, start, limit), stop=lambda: None)

    def finish(self, section, start, limit):
        from gpu.sections import Result

        self.given[section.title] = start
        self.now += min(self.seconds, limit)
        return Result(self.states.get(section.title, "done"))

    def run(self):
        """The benchmark as on a GPU."""
        import bench_gpu

        bench_gpu.main([], work=self, pace=bench_gpu.Pace(now=lambda: self.now), gpu_is_there=lambda: True)


@pytest.mark.parametrize("seconds", [5, 30, 1e9])
def test_it_ends_within_four_minutes_and_begins_with_the_kernels(seconds):
    work = Paced(seconds, {})
    work.run()
    assert work.now < 4 * 60
    assert list(work.given)[:2] == ["kernels: Triton", "kernels: ways to convolve"]
    if seconds == 5:
        assert list(work.given)[2] == "ceilings"
        assert len(work.given) == 16


def test_a_kernel_that_fails_its_proof_is_used_by_no_later_section():
    work = Paced(5, {"kernels: Triton": "failed"})
    with pytest.raises(SystemExit, match="failed: kernels: Triton"):
        work.run()
    plain_kernels = [start.plain_kernels for start in work.given.values()]
    assert plain_kernels == [False] + [True] * 15


def test_without_fused_kernels_a_section_runs_their_twins():
    import bench_gpu
    from gpu import sections

    args = bench_gpu.parse(["--device", "cpu", "--quick"])
    seen = []
    section = sections.Section("data", "t", 1, lambda context: seen.append(in_use("fused")) or [])
    sections.run_section(section, args, None, sections.Start(1e12, plain_kernels=True))
    assert seen == [False]
    assert in_use("fused")


def test_kernels_are_proven_under_the_sanitizer_where_it_is_installed(monkeypatch, tmp_path):
    import bench_gpu
    from gpu.sections import sanitizer, sections

    proof, other = sections(bench_gpu.parse(["--device", "cuda"]))[:3:2]
    assert (proof.proves_kernels, other.proves_kernels) == (True, False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitizer(proof, "cuda") == []
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert sanitizer(proof, "cuda")[:3] == [str(tool), "--tool", "memcheck"]
    assert sanitizer(other, "cuda") == sanitizer(proof, "cpu") == []


@pytest.mark.parametrize("argv", [["--sections", "steps"], ["--sections", ","], ["--width-scale", "0.3"]])
def test_what_is_asked_for_wrongly_is_named(argv, capsys):
    import bench_gpu

    with pytest.raises(SystemExit):
        bench_gpu.parse(argv)
    assert "expected some of kernels,ceilings" in (err := capsys.readouterr().err) or "width scale 0.3 leaves" in err


def test_rounds_end_where_another_would_not_fit():
    import common

    now = [0.0]

    def timed(seconds, rounds=5):
        now[0], seen = 0.0, []

        def call(number):
            seen.append(number)
            now[0] += 10

        budget = common.Budget(seconds, lambda: now[0])
        done = common.time_interleaved({"a": call, "b": call}, rounds=rounds, label="calls", plain="b", budget=budget)
        return done.rounds, seen

    assert timed(1000) == (5, [-1] * 2 + [number for number in range(5) for _ in range(3)])
    assert timed(81)[0] == 2  # 20 s to warm up, 30 s a round: then 1 s is left
    for seconds in (0, 5, 20):
        with pytest.raises(common.TimeIsShort):
            timed(seconds)
