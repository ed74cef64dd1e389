"""The benchmarks' own arithmetic: gates, ceilings, names of machines, tables, the figure; no time is asserted."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from helpers import TINY, image_sets, random_images, random_supernet, tiny_config, tiny_space
from training_runs import plain_network

from proard.attacks import pgd, take_steps
from proard.losses import CrossEntropy
from proard.nets import SubnetView, extract
from proard.training import phase_plan, single_plan


def test_attacks_agree_before_they_are_timed_and_a_wrong_one_stops_the_run(capsys):
    import bench_attack

    bench_attack.main(["--net", "resnet_digits", "--quick", "--threads", "1"])
    out = capsys.readouterr().out
    assert "convolution ceiling" in out
    assert re.search(rf"{list(bench_attack.TIMED)[-1]}, batch 16( +[\d.-]+){{3}} +\d+ +[\d.]+%", out)
    found = {"exact": 0.998, "signs": 0.88, "accuracies": {"plain": 0.5, "bfloat16": 0.8}, "noise": 0.1}
    with pytest.raises(SystemExit, match=r"float64 0\.9980, .*signs in bfloat16 0\.8800, .*accuracies 0\.3000"):
        bench_attack.require(found)
    bench_attack.require({**found, "exact": 0.9995, "signs": 0.92, "accuracies": {"plain": 0.5, "bfloat16": 0.55}})


def attacked_problem(dtype=torch.float32):
    import plain_step
    import step_rows

    space, recipe = step_rows.scaled_space("resnet_digits", 1), plain_step.Recipe(num_steps=3)
    return step_rows.make_problem(space, recipe=recipe, num_archs=1, batch_size=8, dtype=dtype)


def test_an_attack_by_a_wrong_gradient_is_noticed_in_float64():
    import bench_attack

    problem = attacked_problem()
    assert bench_attack.agreement(problem)["exact"] == 1

    def elsewhere(predict, objective, adv, *bounds, **how):
        return take_steps(lambda x: predict(x.flip(3)), objective, adv, *bounds, **how)

    found = bench_attack.agreement(problem, elsewhere)
    assert found["exact"] < 0.999
    with pytest.raises(SystemExit, match="equal iterates in float64"):
        bench_attack.require(found)


def test_the_share_of_the_ceiling_counts_a_forward_and_an_input_gradient(tmp_path):
    import bench_attack
    import other_libraries

    path = tmp_path / "rows.json"
    argv = ["--net", "resnet_digits", "--quick", "--threads", "1", "--json", str(path)]
    bench_attack.main(argv, top=lambda dtype: 1e12)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    attacks = ("plain", *other_libraries.libraries(), *bench_attack.TIMED)
    expected = [f"{name}, batch 8" for name in attacks]
    assert [row["row"] for row in rows[: len(expected)]] == expected
    for row in rows:
        assert row["ceiling_share"] == pytest.approx(4 * row["macs"] * row["gradients_per_second"] / 1e12, abs=1e-4)
        assert (row["ratio_plain"] == 1) == row["row"].startswith("plain")
        for name in other_libraries.libraries():
            assert (row[f"ratio_{name}"] == 1) == row["row"].startswith(name)
            assert name in row["agreement"]["accuracies"]


@pytest.mark.parametrize("name", ["torchattacks", "foolbox"])
@pytest.mark.parametrize("random_start", [False, True])
def test_other_libraries_do_the_work_of_the_packages_attack(name, random_start):
    import common
    import other_libraries

    pytest.importorskip(name)
    problem, generator = attacked_problem(torch.float64), torch.Generator().manual_seed(1)
    (arch,), images, recipe = problem.archs, problem.images, problem.recipe
    net = extract(problem.student.eval(), arch)
    gradients = []
    net.register_forward_hook(lambda module, given, out: gradients.append(given[0].requires_grad))
    adv = other_libraries.other_attacks(net, recipe, random_start=random_start)[name](images, problem.labels, generator)
    assert gradients == [True] * recipe.num_steps
    assert (adv - images).abs().max() <= recipe.eps + 1e-12
    assert adv.min() >= 0
    assert adv.max() <= 1
    options = {"eps": recipe.eps, "step_size": recipe.step_size, "num_steps": recipe.num_steps}
    view = SubnetView(problem.student, arch)
    folded = view.folded(view.running_statistics(), dtype=torch.float64)
    with common.Float64Losses():
        own = pgd(folded, CrossEntropy(problem.labels), images, start="zero", **options)
    equal = ((own - adv).abs() < 1e-6).double().mean()
    assert equal < 0.5 if random_start else equal >= 0.99


def test_a_library_that_is_missing_has_no_row_and_a_line_that_says_how_to_install_it(monkeypatch, capsys):
    import bench_attack
    import other_libraries

    monkeypatch.setattr(other_libraries, "libraries", other_libraries.libraries.__wrapped__)
    for name in other_libraries.LEVERS:
        monkeypatch.setitem(sys.modules, name, None)
    problem = attacked_problem()
    capsys.readouterr()
    assert list(bench_attack.attacks(problem)) == ["plain", *bench_attack.TIMED]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines] == [f"no row {name}" for name in other_libraries.LEVERS]
    assert all(line.endswith('pip install -e ".[test]"') for line in lines)


def test_the_noise_of_an_accuracy_counts_the_images_on_which_attacks_differ():
    import bench_attack

    problem = attacked_problem()
    images = problem.images
    ends = {"plain": images, "float32": images.flip(0)}
    found = bench_attack.robust_accuracies(problem, {"plain": images, "float32": images})
    assert found["noise"] == 1 / len(images)
    with torch.no_grad():
        view = SubnetView(problem.student, problem.archs[0])
        labels = view.folded(view.running_statistics())(images).argmax(1)
    problem = replace(problem, labels=labels)
    found = bench_attack.robust_accuracies(problem, ends)
    differing = len(labels) * (1 - found["accuracies"]["float32"])
    assert found["accuracies"]["plain"] == 1
    assert found["noise"] == pytest.approx((3 * differing**0.5 + 1) / len(labels))


@pytest.mark.parametrize(
    ("facts", "flags", "slug"),
    [
        ({"processor": "Intel(R) Xeon(R) Processor", "cores": 2}, ["avx512f", "amx_bf16"], "intel-xeon-2c-amx"),
        ({"processor": "AMD EPYC 9R14 96-Core Processor", "cores": 2}, ["avx2", "avx512f"], "amd-epyc-9r14-2c-avx512"),
        ({"processor": "Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz", "cores": 6}, [], "intel-core-i7-8700-6c"),
        ({"processor": "x", "cores": 16, "gpu": "NVIDIA H200"}, ["avx2"], "h200"),
        ({}, [], "unknown"),
    ],
)
def test_a_machine_is_named_by_model_cores_and_instruction_set(facts, flags, slug):
    import run_all

    assert run_all.machine_slug(facts, flags) == slug


def ladder(space="resnet_cifar"):
    common = {"bench": "step", "baseline": "released step", "space": space}
    common |= {"width_scale": 0.125, "batch": 64, "num_steps": 10, "seed": 0}
    rows = [("V0", 1.0, 0.8, "released"), ("V1", 1.25, 1.0, "plain"), ("V8", 2.5, 2.0, "package")]
    return [
        {**common, "row": row, "ratio_total": total, "ratio_plain": plain, "ratio_previous": 1.0, "lever": lever}
        for row, total, plain, lever in rows
    ]


def test_results_are_one_table_a_json_file_and_a_figure_and_keep_what_was_not_repeated(tmp_path, capsys):
    import run_all

    other = {"bench": "search", "row": "exact", "ratio_total": 12.0}
    run_all.write_results(tmp_path, "here", {"cores": 2}, [*ladder(), other])
    run_all.write_results(tmp_path, "here", {"cores": 3}, [{**other, "ratio_total": 13.0}])
    kept = json.loads((tmp_path / "here.json").read_text())
    assert kept["machine"] == {"cores": 3}
    assert sorted((row["bench"], row["row"]) for row in kept["rows"]) == sorted(
        [("search", "exact"), ("step", "V0"), ("step", "V1"), ("step", "V8")]
    )
    assert next(row for row in kept["rows"] if row["bench"] == "search")["ratio_total"] == 13.0
    words = "".join(ElementTree.fromstring((tmp_path / "here.svg").read_text()).itertext())
    assert all(part in words for part in ("package", "2.50", "2.00", "resnet_cifar at width 0.125"))


def test_the_table_names_what_every_ratio_is_over():
    import run_all

    rows = [
        *ladder(),
        {
            "bench": "search",
            "row": "S4",
            "baseline": "one arch at a time",
            "ratio_total": 133.0,
            "ratio_released": 28.9,
        },
        {"bench": "data", "row": "D2", "baseline": "DataLoader", "ratio_total": 14.0, "lever": "windows"},
        {"bench": "attack", "row": "float32", "ratio_plain": 2.5},
        {"bench": "old", "row": "a", "ratio_total": 3.0},
    ]
    header, *lines = ([*filter(None, line.split("  "))] for line in run_all.summary(rows).splitlines())
    cells = [[cell.strip() for cell in line] for line in lines]
    assert [cell.strip() for cell in header][:6] == ["bench", "row", "over baseline", "baseline", "/plain", "/previous"]
    assert cells[2][:6] == ["step", "V8", "2.50", "released step", "2.00", "1.00"]
    assert cells[3][:6] == ["search", "S4", "28.90", "released form", "-", "-"]
    assert cells[4][:6] == ["data", "D2", "14.00", "DataLoader", "-", "-"]
    assert cells[5][:6] == ["attack", "float32", "-", "-", "2.50", "-"]
    assert cells[6][:6] == ["old", "a", "3.00", "-", "-", "-"]


@pytest.mark.parametrize(
    ("name", "options", "baseline"),
    [
        ("bench_data", ["--workers", "1"], "DataLoader"),
        ("bench_shared", ["--space", "resnet_digits"], "released step"),
        ("bench_step", ["--space", "resnet_digits"], "released step"),
    ],
)
def test_rows_name_the_baseline_of_their_ratio(name, options, baseline, tmp_path):
    path = tmp_path / "rows.json"
    importlib.import_module(name).main([*options, "--quick", "--threads", "1", "--json", str(path)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["baseline"] for row in rows if "ratio_total" in row} == {baseline}


def test_start_up_is_timed_stage_by_stage(tmp_path):
    import bench_startup

    names = bench_startup.stage_names()
    assert {"train_teacher", "report", "sample_archs"} <= set(names)
    assert "common" not in names
    path = tmp_path / "rows.json"
    bench_startup.main(["--quick", "--json", str(path)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["row"] for row in rows] == names[:2]
    assert all(row["seconds"] > 0.1 and row["lever"] == "imports torch" for row in rows)


def test_rows_that_a_benchmark_wrote_by_itself_are_kept_without_running_any(tmp_path, capsys):
    import run_all

    rows = tmp_path / "rows.json"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ladder()))
    run_all.main(["--rows", str(rows), "--results", str(tmp_path), "--machine", "here"])
    kept = json.loads((tmp_path / "here.json").read_text())["rows"]
    assert [row["row"] for row in kept] == [row["row"] for row in ladder()]
    printed = capsys.readouterr().out
    assert "V8" in printed
    assert "== bench_" not in printed


def test_the_figure_draws_one_run_of_the_ladder():
    import run_all

    drawn = run_all.ladder_figure([*ladder(), *ladder("resnet_micro")])
    assert [text.get_text() for text in drawn.axes[0].get_yticklabels()] == ["released", "plain", "package"]
    assert run_all.ladder_figure([{"bench": "search"}]) is None


def test_benchmarks_are_found_by_name_and_those_of_other_machines_wait_to_be_asked_for(tmp_path):
    import run_all

    for name in ("attack", "gpu", "pipeline", "step", "sync"):
        (tmp_path / f"bench_{name}.py").touch()
    assert list(run_all.chosen(None, [], tmp_path)) == ["step", "attack"]
    assert list(run_all.chosen(None, ["pipeline"], tmp_path)) == ["step", "attack", "pipeline"]
    assert list(run_all.chosen(["gpu"], [], tmp_path)) == ["gpu"]
    with pytest.raises(SystemExit, match="no benchmark nothing; there are step, attack"):
        run_all.chosen(["nothing"], [], tmp_path)


def test_a_benchmark_hands_over_its_rows_and_one_that_fails_gives_none(tmp_path):
    import run_all

    good = tmp_path / "bench_good.py"
    good.write_text(
        "import sys\nassert sys.argv[3:] == ['--quick', '--threads', '1']\n"
        "open(sys.argv[sys.argv.index('--json') + 1], 'w').write('{\"row\": \"a\"}\\n')\n"
    )
    assert run_all.run(good, quick=True, threads=1) == [{"bench": "good", "row": "a"}]
    bad = tmp_path / "bench_bad.py"
    bad.write_text("raise SystemExit('rows differ')")
    assert run_all.run(bad, quick=False, threads=None) is None


def test_seconds_of_the_stages_come_from_the_workflows_records(tmp_path):
    import bench_pipeline

    head = "s\th:m:s\tmax_rss\n"
    for name, text in {
        "prepare_data": "1.5\t0:00:01\t-\n",
        "train_phase/width": "10\t0:00:10\t300\n",
        "train_phase/depth": "20\t0:00:20\t310.4\n",
    }.items():
        path = tmp_path / "benchmarks" / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + text)
    rows = {row["row"]: row for row in bench_pipeline.stage_rows(tmp_path)}
    assert (rows["prepare_data"]["seconds"], rows["train_phase"]["seconds"]) == (1.5, 30.0)
    assert rows["train_phase"]["lever"] == "2 jobs, at most 310 MiB"
    with pytest.raises(SystemExit, match="holds no benchmark records"):
        bench_pipeline.stage_rows(tmp_path / "elsewhere")


def test_the_plain_view_has_the_logits_and_gradients_of_the_fast_one():
    from bench_pipeline import PlainView, plain_steps

    space = tiny_space(TINY)
    images = random_images(space, 6)
    seen = []
    for form in (PlainView, SubnetView):
        net = random_supernet(space)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        view, record = form(net, space.largest), {}
        logits = view(images, record=record, update_running=True)
        logits.square().mean().backward()
        view.scatter_gradients()
        fixed = view.folded(record) if form is PlainView else view.folded(record, dtype=torch.float64)
        steps = plain_steps if form is PlainView else take_steps
        options = {"eps": 0.1, "step_size": 0.04, "num_steps": 3}
        objective = CrossEntropy(torch.arange(6) % 3)
        adv = pgd(fixed, objective, images, generator=torch.Generator().manual_seed(0), steps=steps, **options)
        running = [buffer.clone() for name, buffer in net.named_buffers() if "running" in name]
        seen.append([logits.detach(), adv, *(parameter.grad for parameter in net.parameters()), *running])
    for plain, fast in zip(*seen, strict=True):
        torch.testing.assert_close(plain, fast, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("stage", ["train_teacher", "train_phase"])
def test_trainings_in_plain_form_end_as_the_packages_do(stage, tmp_path):
    import bench_pipeline

    config, space, sets = tiny_config(), tiny_space(), image_sets(tmp_path)
    (phase,), recipe = config.train_phase.phases, config.train_teacher
    alone = (recipe, single_plan(space.largest, recipe.objective, recipe))
    settings, plan = alone if stage == "train_teacher" else (phase, phase_plan(space, phase))
    teacher, data = plain_network(), [sets["train"], sets["val"]]
    ends = [bench_pipeline.train(config, settings, plan, data, form, teacher)[1] for form in bench_pipeline.FORMS]
    bench_pipeline.require_same(stage, ends)
    assert ends[0]["loss"] == pytest.approx(ends[1]["loss"], rel=1e-3)
    with pytest.raises(SystemExit, match=rf"{stage}: .* loss \["):
        bench_pipeline.require_same(stage, [ends[0], {**ends[1], "loss": 1.1 * ends[0]["loss"]}])
