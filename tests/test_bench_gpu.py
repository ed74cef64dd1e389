"""The GPU benchmark without a GPU: its message, its CPU form, and gates that detect errors."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from proard.attacks import take_steps
from proard.kernels import CapturedSteps, dispatch
from proard.kernels.cudnn import NoEpilogues
from proard.kernels.switch import in_use
from proard.space import key_of


def small_problem():
    import plain_step
    import step_rows

    return step_rows.make_problem(
        step_rows.scaled_space("resnet_digits", 0.5),
        recipe=plain_step.Recipe(num_steps=2),
        num_archs=2,
        batch_size=4,
        dtype=torch.float32,
    )


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


FEW = {  # for the interpreter
    "updates": {"shapes": ((1, 1, 8, 8), (3, 5, 17, 19))},
    "logit gradients": {"batches": ((1, 1), (3, 7), (1, 101))},
    "noise": {"shapes": ((2, 3, 5, 5),)},
    "passes": {"shapes": ((2, 24, 3, 3),)},
    "batch norm": {"shapes": ((2, 24, 3, 3),)},
    "products": {"channels": ((8, 24),), "sizes": ((2, 3, 5),)},
}


@pytest.mark.parametrize("name", FEW)
def test_kernels_are_proven_on_odd_shapes_and_a_wrong_one_is_noticed(name, capsys):
    from gpu.checks import proof_rows

    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fused = dispatch.all_fused(NoEpilogues(), types=(torch.float32,))
    rows = proof_rows(name, device, fused, **FEW[name])
    assert len(rows) >= 2

    def off(function):
        def wrong(*given, **how):
            found = function(*given, **how)
            (found[0] if isinstance(found, tuple) else found).add_(0.1)
            return found

        return wrong

    names = (
        "pgd_update_",
        "philox_uniform",
        "softmax_difference",
        "finish_",
        "slope_",
        "norm_forward",
        "norm_backward",
        "product",
    )
    parts = {
        key: SimpleNamespace(
            **{each: getattr(part, each) for each in ("fits", "suits") if hasattr(part, each)},
            **{each: off(getattr(part, each)) for each in names if hasattr(part, each)},
        )
        for key, part in ((key, getattr(fused, key)) for key in ("steps", "maps", "norms", "product"))
    }
    with pytest.raises(SystemExit, match="differs from its reference by"):
        proof_rows(name, device, replace(fused, **parts), **FEW[name])
    assert "against the reference" in capsys.readouterr().out


def test_real_shapes_are_proven():
    from gpu.checks import REAL

    batches, channels, sides = ({shape[place] for shape in REAL["updates"]["shapes"]} for place in (0, 1, 3))
    assert {1, 1024} <= batches
    assert {1, 3, 5} <= channels
    assert max(sides) == 224
    images, classes = (set(each) for each in zip(*REAL["logit gradients"]["batches"], strict=True))
    assert {1, 1024} <= images
    assert {1, 2, 10, 101, 1001} <= classes
    maps = REAL["batch norm"]["shapes"]
    assert {24, 40, 264, 2048} <= {shape[1] for shape in maps}
    assert max(shape[0] * shape[2] * shape[3] for shape in maps) >= 2**16


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


def test_a_step_in_which_the_host_waits_is_noticed():
    from gpu.checks import step_never_waits

    modes = []
    assert "never waits" in step_never_waits(small_problem(), set_mode=modes.append)
    assert modes == ["default", "default", "error", "default"]

    def waits(*args):
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(SystemExit, match=r"the host waits .* called a synchronizing CUDA operation"):
        step_never_waits(small_problem(), waits, modes.append)
    assert modes[-1] == "default"


class Stale(CapturedSteps):
    """Graphs that do not read new weights."""

    def _captured(self, *given):
        graph = super()._captured(*given)
        load = graph.load
        graph.load = lambda predict, *rest: load(graph.predict, *rest)
        return graph


def test_graph_that_reads_stale_weights_is_noticed():
    from gpu.checks import graphs_agree

    problem = small_problem()
    assert "100.000%" in graphs_agree(problem, capture=lambda body: body)
    with pytest.raises(SystemExit, match=r"captured attack in .* agrees with the eager one on"):
        graphs_agree(problem, Stale, capture=lambda body: body)


def test_replayed_steps_that_move_the_weights_otherwise_are_noticed():
    from gpu.checks import replays_agree

    problem = small_problem()
    assert "2 archs, replayed and eager: cosine of the weights' moves 1.000000" in replays_agree(
        problem, capture=lambda body: body
    )
    with pytest.raises(SystemExit, match="replayed steps move the weights otherwise"):
        replays_agree(problem, capture=lambda body: lambda: None)
    with pytest.raises(SystemExit, match="0 graphs were recorded for 2 archs"):
        replays_agree(problem)


def both_in_float64():
    """A problem in float64, and the same as another device would hold it."""
    problem = small_problem()
    return [problem.placed(torch.device("cpu"), torch.float64) for _ in range(2)]


def move(problem, names, size):
    """Add noise of that size to some layers' weights."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in sorted(names):
            weight = problem.student.layers[name].weight
            weight.add_(size * torch.randn(weight.shape, generator=generator))


def test_attack_and_step_that_differ_from_the_cpus_are_noticed():
    from gpu import checks as gpu_checks

    problem, other = both_in_float64()
    move(other, other.student.layers, 1e-14)  # as another order of summation would
    assert "2 archs: 100.000%" in gpu_checks.attacks_agree(problem, other)
    assert "cosine 1.000000" in gpu_checks.steps_agree(problem, other)
    move(other, other.student.layers, 0.05)
    with pytest.raises(SystemExit, match="agrees with the CPU's on"):
        gpu_checks.attacks_agree(problem, other)
    with pytest.raises(SystemExit, match="have a cosine of"):
        gpu_checks.steps_agree(problem, other)


def test_every_arch_of_the_problem_is_compared():
    from gpu import checks as gpu_checks

    problem, other = (replace(each, archs=each.archs[::-1]) for each in both_in_float64())
    first, second = ({key_of(conv) for conv in problem.student.space.spec(arch).convs} for arch in problem.archs)
    move(other, second - first, 0.05)
    with pytest.raises(SystemExit, match="agrees with the CPU's on"):
        gpu_checks.attacks_agree(problem, other)
    with pytest.raises(SystemExit, match="have a cosine of"):
        gpu_checks.steps_agree(problem, other)
    alone = [replace(each, archs=each.archs[:1]) for each in (problem, other)]
    gpu_checks.attacks_agree(*alone)
    gpu_checks.steps_agree(*alone)


def test_fused_kernels_that_step_elsewhere_are_noticed():
    from gpu.checks import fused_attacks_agree

    problem = small_problem()
    assert "100.000%" in fused_attacks_agree(problem)

    def backwards(*given, step_size, num_steps):
        return take_steps(*given, step_size=-step_size, num_steps=num_steps)

    with pytest.raises(SystemExit, match="a step with fused kernels agrees with the plain one on"):
        fused_attacks_agree(problem, backwards)


def test_gates_compare_repeatable_convolutions_without_tf32_and_put_all_back():
    from gpu import checks as gpu_checks

    settings = [
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cudnn, "deterministic"),
    ]
    before = [getattr(*setting) for setting in settings]
    with gpu_checks.full_float32():
        assert [getattr(*setting) for setting in settings] == [False, False, True]
    assert [getattr(*setting) for setting in settings] == before


class Clocked:
    """Ways to convolve that take so many seconds each, by a clock of their own."""

    def __init__(self, **seconds):
        self.now, self.seconds, self.seen = 0.0, seconds, set()

    def took(self, name, shape):
        self.now += self.seconds.get(f"first_{name}", 0) if (name, shape) not in self.seen else 0
        self.seen.add((name, shape))
        self.now += self.seconds[name]

    def product(self, x, weight, **_):
        self.took("product", weight.shape)
        return x

    def convolve_relu(self, x, weight, bias, **_):
        self.took("cudnn", weight.shape)
        return None if self.seconds.get("without") else x

    def finish_(self, out, *_):
        self.took("usual", ())
        return out

    def fastest(self, monkeypatch):
        from gpu import ways

        monkeypatch.setattr(ways, "BATCH", 1)
        monkeypatch.setattr(ways, "SHAPES", ((8, 16, 1, 4), (8, 8, 3, 4)))
        fused = dispatch.Fused(None, self, None, self, NoEpilogues())
        found = ways.times(fused, self, torch.device("cpu"), clock=lambda: self.now)
        return {name: way.pays for name, way in found.items()}


@pytest.mark.parametrize(
    ("seconds", "product", "cudnn"),
    [
        ({"product": 1e-3, "cudnn": 1e-3, "usual": 2e-3}, True, True),
        ({"product": 3e-3, "cudnn": 1e-3, "usual": 2e-3}, False, True),
        ({"product": 1e-3, "cudnn": 3e-3, "usual": 2e-3}, True, False),
        ({"product": 1e-3, "cudnn": 1e-3, "usual": 2e-3, "first_cudnn": 1.0}, True, False),
        ({"product": 1e-3, "cudnn": 1e-3, "usual": 2e-3, "first_product": 1.0}, False, True),
        ({"product": 1e-3, "cudnn": 1e-3, "usual": 2e-3, "without": 1}, True, False),
    ],
)
def test_a_way_pays_if_it_is_faster_and_its_first_call_is_short(monkeypatch, seconds, product, cudnn):
    assert Clocked(**seconds).fastest(monkeypatch) == {"product": product, "cudnn": cudnn}
