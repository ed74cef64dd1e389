"""The latency kit: the files are the exported networks, the timing program runs alone, the fit is honest."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from helpers import SMALL_SPACES, TINY, random_images, random_supernet, tiny_space
from latency_runs import CONFIG, first_block_last, invented_times, run_file, timed_student

from proard.artifacts import sha256, write_json
from proard.cli import main
from proard.config import PRESETS, UserError
from proard.export import export_program
from proard.latency.bench import TIME, measure
from proard.latency.bench import main as bench
from proard.latency.check import check
from proard.latency.fit import MODELS, Quality, fit, left_out_error, solve
from proard.latency.graphs import onnx_file, random_weights
from proard.latency.int8 import int8_file
from proard.latency.plan import halves, plan, read_plan
from proard.nets import extract, fold
from proard.space import LatencyTable, Part, SearchSpace, parse_budget, read_device
from proard.space.cost import check_budget
from proard.space.sampling import enumerate_genotypes, identity_columns
from proard.space.tables import parts_of
from proard.stages.select_student import under_budget, with_costs


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for a device."""
    folder = tmp_path_factory.mktemp("kit")
    (folder / "my.yaml").write_text(CONFIG)
    plan(folder / "my.yaml", folder / "kit")
    return folder / "kit"


@pytest.mark.parametrize("settings", SMALL_SPACES, ids=lambda entry: entry["name"])
def test_the_file_of_a_network_is_the_exported_one(settings):
    space = tiny_space(settings)
    for arch in (space.smallest, space.largest):
        net = fold(extract(random_supernet(space).eval(), arch)).float().eval()
        state = net.state_dict()

        def weights(name, shape, state=state):
            found = state[name].numpy()
            assert found.shape == shape
            return found

        data = onnx_file(Part.whole(space.spec(arch)), weights)
        images = random_images(space, 3).float()
        with torch.no_grad():
            np.testing.assert_allclose(run_file(data, images.numpy()), net(images).numpy(), rtol=1e-4, atol=1e-4)
        program = torch.onnx.export(export_program(net), opset_version=20, dynamo=True, verbose=False)
        exported = [node.op_type for node in program.model_proto.graph.node]
        exported = ["Flatten" if op == "Reshape" else op for op in exported]  # neither moves a number
        assert [node.op_type for node in onnx.load_from_string(data).graph.node] == exported


@pytest.mark.parametrize("settings", SMALL_SPACES, ids=lambda entry: entry["name"])
def test_latency_is_a_base_and_the_sum_over_the_parts_that_are_timed(settings):
    space = tiny_space(settings)
    times = {part.key: 1e-6 * part.macs for part in parts_of(space)}  # a device whose time is its MACs
    timed = SearchSpace(space.settings, LatencyTable("a", "both", 0.5, 2.0, 1e-6, times, {}))
    genotypes = space.sample(20, np.random.default_rng(0))
    costs = timed.costs(genotypes)
    np.testing.assert_allclose(costs["latency"], 0.5 + 3e-6 * costs["macs"])
    assert len(times) <= len(list(parts_of(space)))  # equal layers have one key, whatever they are named


def test_the_cheapest_subnet_is_found_where_latency_falls_as_a_block_grows():
    space = tiny_space(TINY)
    rng = np.random.default_rng(0)
    times = {part.key: float(rng.uniform(1, 5)) for part in parts_of(space)}
    timed = SearchSpace(space.settings, LatencyTable("a", "table", 0.0, 1.0, 0.0, times, {}))
    everything = enumerate_genotypes(space.choices, space.canonical)
    costs = timed.costs(everything)
    for column, values in costs.items():
        assert timed.costs(timed.tables.cheapest(column)[None])[column][0] == pytest.approx(values.min())
    assert costs["latency"].argmin() != 0


def test_a_plan_holds_a_file_for_every_part_and_the_subnets_in_two_halves(planned: Path):
    manifest, _ = read_plan(planned)
    kinds = [entry["kind"] for entry in manifest["files"].values()]
    space = SearchSpace(PRESETS["resnet_digits"])
    assert kinds.count("part") == len({part.key for part in parts_of(space)})
    subnets = [entry for entry in manifest["files"].values() if entry["kind"] == "subnet"]
    assert len(subnets) == 40
    assert sum(entry["fitted"] for entry in subnets) == 20
    assert [entry["macs"] for entry in subnets] == sorted(entry["macs"] for entry in subnets)
    assert len({entry["arch_id"] for entry in subnets}) == 40
    for name, entry in manifest["files"].items():
        assert (planned / name).stat().st_size, entry
    (planned.parent / "my.yaml").write_text(CONFIG)
    with pytest.raises(UserError, match="is not empty"):
        plan(planned.parent / "my.yaml", planned)


@pytest.mark.parametrize("count", [12, 13, 40])
def test_half_of_the_subnets_are_fitted_with_both_ends(count):
    fitted = halves(count, 0)
    assert fitted[0]
    assert fitted[-1]
    assert abs(fitted.sum() - count // 2) <= 1


def test_the_timing_program_runs_alone_with_numpy_and_onnxruntime(planned: Path, tmp_path: Path):
    words = ["--rounds", "1", "--seconds", "0.001", "--name", "here", "--out", str(tmp_path / "bench.json")]
    blocked = "import sys\nfor name in ('proard', 'torch', 'onnx', 'scipy', 'pandas'): sys.modules[name] = None\n"
    start = (
        f"{blocked}sys.argv = ['bench.py', *{words!r}]\nimport runpy\nrunpy.run_path('bench.py', run_name='__main__')"
    )
    subprocess.run([sys.executable, "-c", start], cwd=planned, check=True, capture_output=True)
    found = json.loads((tmp_path / "bench.json").read_text())
    manifest, checksum = read_plan(planned)
    assert set(found["files"]) == set(manifest["files"])
    assert found["manifest_sha256"] == checksum
    assert found["device"]["name"] == "here"
    for entry in found["files"].values():
        assert len(entry["passes"]) == 2
        assert 0 < entry["p10_ms"] <= entry["median_ms"] <= entry["p90_ms"]
    assert {"governor", "temperature", "load"} <= set(found["before"])


@pytest.mark.parametrize(("macs", "uses"), [(0.0, "table"), (1e-5, "macs")])
def test_the_fit_finds_an_exact_law_and_uses_it(planned: Path, tmp_path: Path, macs: float, uses: str):
    write_json(planned / "bench.json", invented_times(planned, macs=macs))
    path, content = fit(planned, out=tmp_path)
    assert path.name == "an-invented-device.json"
    assert content["quality"][uses]["mean_error"] < 1e-6
    assert content["quality"][uses]["within_5"] == 1.0
    assert content["quality"][uses]["kendall"] == pytest.approx(1.0)
    other = "macs" if uses == "table" else "table"
    assert content["quality"][other]["mean_error"] > 0.01
    assert content["model"]["uses"] in (uses, "both")
    assert (content["num_fitted"], content["num_unseen"]) == (20, 20)
    device = read_device(path)
    assert device is not None
    manifest, _ = read_plan(planned)
    subnets = {file: entry for file, entry in manifest["files"].items() if entry["kind"] == "subnet"}
    times = json.loads((planned / "bench.json").read_text())["files"]
    predicted = SearchSpace(PRESETS["resnet_digits"], device).costs(
        np.asarray([entry["genotype"] for entry in subnets.values()])
    )
    np.testing.assert_allclose(predicted["latency"], [times[file][TIME] for file in subnets], rtol=1e-6)


def test_unseen_subnets_choose_nothing_and_noise_is_that_of_the_passes(planned: Path, tmp_path: Path):
    times = invented_times(planned, passes=(1.1, 1.0))
    manifest, _ = read_plan(planned)
    for file, entry in manifest["files"].items():
        if entry["kind"] == "subnet" and not entry["fitted"]:
            times["files"][file][TIME] *= 3
    write_json(planned / "bench.json", times)
    _, content = fit(planned, out=tmp_path)
    assert content["model"]["uses"] in ("table", "both")
    assert content["quality"]["table"]["mean_error"] == pytest.approx(2 / 3, abs=1e-3)
    assert content["quality"]["noise"]["mean_error"] == pytest.approx(0.1)


def test_a_fit_of_other_files_or_without_times_is_one_error(planned: Path, tmp_path: Path):
    (planned / "bench.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"bench.json cannot be read .* run bench.py on the device"):
        fit(planned, out=tmp_path)
    write_json(planned / "bench.json", {**invented_times(planned), "manifest_sha256": "0"})
    with pytest.raises(UserError, match="is of another plan"):
        fit(planned, out=tmp_path)
    with pytest.raises(UserError, match="proard latency plan writes it"):
        fit(tmp_path / "none", out=tmp_path)
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(UserError, match="is no latency table"):
        read_device(tmp_path / "wrong.json")


def test_a_table_of_another_space_names_the_way_out(planned: Path, tmp_path: Path):
    write_json(planned / "bench.json", invented_times(planned))
    path, _ = fit(planned, out=tmp_path)
    with pytest.raises(UserError, match="lacks blocks of this space"):
        SearchSpace(tiny_space(TINY).settings, read_device(path)).costs(np.zeros((1, 1), dtype=int))


def test_least_squares_of_relative_errors_have_no_negative_weight():
    rng = np.random.default_rng(0)
    features = np.column_stack([np.ones(20), rng.uniform(1, 5, 20), rng.uniform(1, 5, 20)])
    measured = features @ np.asarray([0.3, 2.0, 0.0])
    weights = solve(features, measured)
    np.testing.assert_allclose(weights, [0.3, 2.0, 0.0], atol=1e-8)
    assert left_out_error(features, measured) < 1e-8
    assert left_out_error(features[:, :1], measured) > 0.1
    assert set(MODELS) == {"table", "macs", "both"}


def test_quality_counts_shares_and_order():
    found = Quality.of(np.asarray([1.0, 2.12, 3.6, 4.0]), np.asarray([1.0, 2.0, 3.0, 5.0]))
    assert found.within_5 == 0.25
    assert found.within_10 == 0.5
    assert found.kendall == 1.0
    assert found.mean_error == pytest.approx((0 + 0.06 + 0.2 + 0.2) / 4)


def test_the_command_plans_fits_and_says_which_model_it_uses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "my.yaml").write_text(CONFIG)
    main(["latency", "plan", str(tmp_path / "my.yaml"), "--out", str(tmp_path / "kit")])
    assert "50 blocks and 40 subnets of space resnet_digits, float32" in capsys.readouterr().out
    bench_file = tmp_path / "kit" / "subnets" / "00.onnx"
    bench([str(bench_file), "--rounds", "1", "--seconds", "0.001"])
    assert json.loads(bench_file.with_suffix(".bench.json").read_text())["files"]["00.onnx"]["runs"] >= 6
    write_json(tmp_path / "kit" / "bench.json", invented_times(tmp_path / "kit"))
    capsys.readouterr()
    main(["latency", "fit", str(tmp_path / "kit"), "--out", str(tmp_path / "latency"), "--name", "board"])
    text = capsys.readouterr().out
    assert "20 subnets fitted; on 20 others" in text
    assert "<- used" in text
    assert "MACs alone" in text
    assert f"device: {tmp_path / 'latency' / 'board.json'}" in text


def values_at(data: bytes) -> tuple[str, str]:
    """Types of input and output of an ONNX file."""
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.get_inputs()[0].type, session.get_outputs()[0].type


@pytest.mark.parametrize("settings", SMALL_SPACES, ids=lambda entry: entry["name"])
def test_int8_files_of_parts_are_quantised_as_students_and_pass_integers_on(settings):
    space = tiny_space(settings)
    first, block, last = first_block_last(space)
    real, integer = "tensor(float)", "tensor(uint8)"
    assert values_at(int8_file(first, random_weights(0)))[0] == real  # images
    assert values_at(int8_file(last, random_weights(0))) == (integer, real)  # logits
    assert values_at(int8_file(block, random_weights(0))) == (integer, integer)
    for part in (first, block, last, Part.whole(space.spec(space.smallest))):
        graph = onnx.load_from_string(int8_file(part, random_weights(0))).graph
        weights = {entry.name: entry.data_type for entry in graph.initializer}
        made_by = {node.output[0]: node for node in graph.node}
        layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
        assert len(layers) == len(part.convs) + bool(part.classes)
        for node in layers:
            assert [made_by[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
            assert weights[made_by[node.input[1]].input[0]] == onnx.TensorProto.INT8


def test_a_table_of_int8_files_says_so_and_checks_the_int8_file(student: Path, tmp_path: Path):
    (tmp_path / "my.yaml").write_text(CONFIG)
    plan(tmp_path / "my.yaml", tmp_path / "kit", int8=True)
    times = measure({"call.onnx": tmp_path / "kit" / "call.onnx"}, name="A Board", rounds=1, seconds=0.001)
    write_json(tmp_path / "kit" / "bench.json", {**invented_times(tmp_path / "kit"), "device": times["device"]})
    path, content = fit(tmp_path / "kit", out=tmp_path / "latency")
    assert path.name == "a-board-int8.json"
    assert content["precision"] == "int8"
    exported, quantised = (tmp_path / stage / "macs=1M" for stage in ("export_student", "quantize_student"))
    shutil.copytree(student, exported)
    with pytest.raises(UserError, match=r"the table is of student\.int8\.onnx, and there is no .*run quantize_student"):
        check(exported, device=path, seconds=0.002)
    for folder in (exported, quantised):  # a copied folder, then the place where the stage writes
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tmp_path / "kit" / "subnets" / "39.onnx", folder / "student.int8.onnx")
        record = check(exported, device=path, seconds=0.002)
        assert (record["precision"], record["file"]) == ("int8", "student.int8.onnx")
        assert f"Promised for {content['device']}, int8" in (exported / "card.md").read_text()
        (exported / "student.int8.onnx").unlink(missing_ok=True)


def archive_of(space: SearchSpace, count: int) -> pd.DataFrame:
    """An archive that an earlier version wrote: without the columns of the other costs."""
    genotypes = np.concatenate([space.sample(count, np.random.default_rng(0)), [space.genotype(space.smallest)]])
    columns = identity_columns(space, genotypes)
    order = np.random.default_rng(1).permutation(len(genotypes)) / len(genotypes)
    return pd.DataFrame({**columns, "predicted_clean_acc": order, "predicted_robust_acc": order})


def test_a_student_is_within_every_limit_and_the_best_of_these():
    space = tiny_space(TINY)
    times = {part.key: 1e-3 * part.macs**0.5 for part in parts_of(space)}
    timed = SearchSpace(space.settings, LatencyTable("a", "table", 0.0, 1.0, 0.0, times, {}))
    archive = with_costs(archive_of(timed, 60), timed)
    limits = {name: float(archive[name].median()) for name in ("latency", "sram")}
    text = f"latency={limits['latency']:.6f}ms,sram={limits['sram']:.0f}"
    chosen = under_budget(archive, parse_budget(text), 3)
    within = (archive["latency"] <= float(f"{limits['latency']:.6f}")) & (archive["sram"] <= int(limits["sram"]))
    expected = archive[within].drop_duplicates("arch").sort_values("predicted_robust_acc", ascending=False)
    assert chosen["arch"].tolist() == expected["arch"].tolist()[:3]
    assert not within.all()
    assert check_budget(text, timed) == ""


def test_limits_that_no_subnet_keeps_together_name_the_smallest_cost_beside_the_others():
    space = tiny_space(TINY)
    archive = with_costs(archive_of(space, 20), space)
    archive = archive[archive["macs"].isin([archive["macs"].min(), archive["macs"].max()])].drop_duplicates("macs")
    few, many = sorted(archive["macs"])
    archive.loc[archive["macs"] == few, "sram"], archive.loc[archive["macs"] == many, "sram"] = 9000, 10
    with pytest.raises(UserError, match=rf"beside the other limits is sram=9000 .* or macs={many} "):
        under_budget(archive, parse_budget(f"macs={few},sram=10"), 1)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """An exported student that was selected with the device `board.json`."""
    return timed_student(tmp_path)


def test_a_checked_student_has_promise_and_measurement_on_its_card_once(student: Path):
    macs = SearchSpace(PRESETS["resnet_digits"]).spec(SearchSpace(PRESETS["resnet_digits"]).largest).macs
    for _ in range(2):
        record = check(student, seconds=0.002)
    assert record == json.loads((student / "latency.json").read_text())
    assert record["promised_ms"] == pytest.approx(1 + 1e-6 * macs)
    assert record["error"] == pytest.approx(record["promised_ms"] / record["measured_ms"] - 1)
    assert record["met"] is False  # no network takes a microsecond
    assert record["is_the_device"] is False  # the table is of another runtime
    card = (student / "card.md").read_text()
    assert card.startswith("# A student\n\n## Limits\n\n- one\n")
    assert card.count("## Latency, promised and measured") == 1
    assert "NOT met" in card
    sums = dict(reversed(line.split()) for line in (student / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: sha256(student / name) for name in ("card.md", "latency.json")}


def test_a_student_is_checked_by_what_was_measured_on_the_device(student: Path, tmp_path: Path):
    bench([str(student / "student.onnx"), "--rounds", "1", "--seconds", "0.001", "--out", str(tmp_path / "b.json")])
    times = json.loads((tmp_path / "b.json").read_text())
    assert check(student, measured=tmp_path / "b.json")["measured_ms"] == times["files"]["student.onnx"][TIME]
    write_json(tmp_path / "b.json", {**times, "threads": 2})
    with pytest.raises(UserError, match=r"is not of student\.onnx on 1 threads"):
        check(student, measured=tmp_path / "b.json")
