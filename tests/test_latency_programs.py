"""The latency kit for ExecuTorch: programs are the exported networks, and their table is not that of ONNX files."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL_SPACES, TINY, random_supernet, tiny_space
from latency_runs import CONFIG, first_block_last, invented_times, run_file, timed_student

from proard.artifacts import write_json
from proard.config import UserError
from proard.export.executorch import deployable
from proard.latency import bench, plan
from proard.latency.check import check
from proard.latency.fit import fit
from proard.latency.graphs import onnx_file, random_weights
from proard.latency.programs import call_program, float_program, graph_of, int8_program
from proard.nets import extract, fold
from proard.space import Part, read_device

REAL, INTEGER = 6, 1  # float32 and int8 in ExecuTorch's numbers of types


def named_weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random weights that depend on the name alone."""
    return random_weights(zlib.crc32(name.encode()))(name, shape)


@pytest.mark.parametrize("settings", SMALL_SPACES, ids=lambda entry: entry["name"])
def test_programs_of_parts_compute_what_their_onnx_files_do(settings):
    space = tiny_space(settings)
    for part in (*first_block_last(space), Part.whole(space.spec(space.largest))):
        maps = torch.rand(1, part.channels, part.size, part.size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found = graph_of(part, named_weights)(maps).numpy()
        expected = run_file(onnx_file(part, named_weights), maps.numpy())
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("settings", SMALL_SPACES, ids=lambda entry: entry["name"])
def test_the_program_of_a_network_has_the_operators_of_the_exported_one(settings):
    space = tiny_space(settings)
    net = fold(extract(random_supernet(space, dtype=torch.float32).eval(), space.largest)).eval()
    graphs = deployable(net), graph_of(Part.whole(space.spec(space.largest)), named_weights)
    exported, timed = ([str(node.target) for node in each.graph.nodes if node.op == "call_function"] for each in graphs)
    assert exported == timed


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_table_of_executorch_is_named_for_it_and_checks_its_file(precision: str, tmp_path: Path, monkeypatch):
    (tmp_path / "my.yaml").write_text(CONFIG)
    monkeypatch.setattr(plan, "writers", lambda kind: (lambda part, weights: part.key.encode(), lambda: b""))
    manifest = plan.plan(tmp_path / "my.yaml", tmp_path / "kit", int8=precision == "int8", runtime="executorch")
    assert (manifest["runtime"], manifest["precision"]) == ("executorch", precision)
    assert {Path(name).suffix for name in manifest["files"]} == {".pte"}
    student = timed_student(tmp_path)
    measured = bench.measure({"student.onnx": student / "student.onnx"}, name="A Board", rounds=1, seconds=0.001)
    times = invented_times(tmp_path / "kit", timed={**measured, "runtime": "executorch 1.5.1, XNNPACK"})
    write_json(tmp_path / "kit" / "bench.json", times)

    path, content = fit(tmp_path / "kit", out=tmp_path / "latency")
    ending, name = ("-int8", "student.int8.pte") if precision == "int8" else ("", "student.pte")
    assert path.name == f"a-board-executorch{ending}.json"
    assert (content["precision"], content["runtime"]) == (precision, "executorch 1.5.1, XNNPACK")
    device = read_device(path)
    assert device is not None
    assert device.file == name

    exported, made = (tmp_path / stage / "macs=1M" for stage in ("export_student", "executorch_student"))
    shutil.copytree(student, exported)
    with pytest.raises(UserError, match=rf"the table is of {re.escape(name)}, and .*run executorch_student"):
        check(exported, device=path)
    made.mkdir(parents=True)
    (made / name).write_bytes(b"")
    (timed,) = measured["files"].values()
    write_json(tmp_path / "student.bench.json", {**measured, "files": {name: timed}})
    record = check(exported, device=path, measured=tmp_path / "student.bench.json")
    assert (record["precision"], record["file"], record["measured_ms"]) == (precision, name, timed[bench.TIME])
    assert record["is_the_device"] is False  # measured by onnxruntime
    assert f"ms, `{name}` |" in (exported / "card.md").read_text()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"table of ExecuTorch needs ExecuTorch.*pip install -e \.\[executorch\]"):
        check(exported, device=path)


def test_without_the_extra_no_programs_are_planned(tmp_path: Path, monkeypatch):
    (tmp_path / "my.yaml").write_text(CONFIG)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--runtime executorch needs ExecuTorch.*pip install -e \.\[executorch\]"):
        plan.plan(tmp_path / "my.yaml", tmp_path / "kit", runtime="executorch")
    assert not (tmp_path / "kit").exists()


def test_programs_are_timed_by_executorch_without_this_package(tmp_path: Path):
    pytest.importorskip("executorch")
    first, block, last = first_block_last(tiny_space(TINY))
    programs = {"call": call_program(), "float": float_program(block, random_weights(0))}
    parts = {"first": first, "block": block, "last": last}
    programs |= {name: int8_program(part, random_weights(0)) for name, part in parts.items()}
    for name, program in programs.items():
        (tmp_path / f"{name}.pte").write_bytes(program)
    assert {name: types_of(tmp_path / f"{name}.pte") for name in programs} == {
        "call": (REAL, REAL),
        "float": (REAL, REAL),
        "first": (REAL, INTEGER),  # from images
        "block": (INTEGER, INTEGER),
        "last": (REAL, REAL),  # a mean, which XNNPACK computes in float32, to logits
    }
    write_json(tmp_path / "manifest.json", {"files": [f"{name}.pte" for name in programs]})
    shutil.copyfile(bench.__file__, tmp_path / "bench.py")
    blocked = "import sys\nfor name in ('proard', 'onnx', 'onnxruntime', 'scipy'): sys.modules[name] = None\n"
    words = ["bench.py", "--rounds", "1", "--seconds", "0.001"]
    start = f"{blocked}sys.argv = {words!r}\nimport runpy\nrunpy.run_path('bench.py', run_name='__main__')"
    subprocess.run([sys.executable, "-c", start], cwd=tmp_path, check=True, capture_output=True)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["runtime"] == f"executorch {version('executorch')}, XNNPACK"
    assert all(entry["runs"] >= 6 for entry in found["files"].values())


def types_of(path: Path) -> tuple[int, int]:
    """Numbers of the types of a program's input and output."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    facts = program.load_method("forward").metadata
    return facts.input_tensor_meta(0).dtype(), facts.output_tensor_meta(0).dtype()
