"""Students as ExecuTorch programs and their estimate on an Ethos-U: graphs, refusals, reports of the compiler."""

from __future__ import annotations

import importlib.util
import json
import operator
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from export_runs import BUDGET, arguments
from helpers import SMALL_SPACES, TINY, random_images, random_supernet, save_stripes, tiny_config, tiny_space
from rich.console import Console
from test_int8 import exported
from torch import fx, nn

from proard.artifacts import EXECUTORCH, QUANTISED, read_table
from proard.cli.estimate import estimate_students
from proard.config import UserError
from proard.data import load_split, to_float
from proard.evaluation.deployed import Agreement
from proard.export import ethos_u, executorch
from proard.export.executorch import deployable, refuse_undelegated, require_executorch, straight_through, undelegated
from proard.nets import extract, fold
from proard.stages import executorch_student

aten = torch.ops.aten
ATTACKS = ({"name": "pgd3", "num_steps": 3, "step_size": 0.05}, {"name": "cw3", "objective": "margin", "num_steps": 3})
OWN_WORDS = {"crafted_on", "agreement_float", "agreement_clean", "agreement_adversarial", "max_logit_difference"}
REPORT = """
Accelerator clock                                 500 MHz
System configuration             Ethos_U55_High_End_Embedded
Memory mode                               Shared_Sram
Total SRAM used                                  4.17 KiB
Total Off-chip Flash used                       25.52 KiB
CPU operators = 0 (0.0%)
NPU operators = 26 (100.0%)
NPU cycles                                              20000 cycles/batch
Total cycles                                            35000 cycles/batch
{"vela": "5.1.0", "executorch": "1.5.1", "torch": "2.14.1", "undelegated": []}
"""


class Named:
    """Stands for an operator of ExecuTorch, which is known by its text."""

    def __init__(self, text: str) -> None:
        self.text, self.__name__ = text, "stand_in"

    def __call__(self, *_):
        raise AssertionError("the graph is read, not run")

    def __str__(self) -> str:
        return self.text


def random_net(settings: dict) -> nn.Module:
    space = tiny_space(settings)
    return fold(extract(random_supernet(space, dtype=torch.float32).eval(), space.largest)).eval()


@pytest.mark.parametrize("settings", SMALL_SPACES, ids=lambda space: space["name"])
def test_the_graph_is_the_network_without_a_normalisation_and_with_means_that_keep_dims(settings):
    net = random_net(settings)
    images = random_images(tiny_space(settings), 8, dtype=torch.float32)
    images[:2] = torch.tensor([0.0, 1.0])[:, None, None, None]  # the border sees its padding
    graph = deployable(net)
    with torch.no_grad():
        found = torch.cat([graph(image) for image in images.split(1)])
        torch.testing.assert_close(found, net(images), rtol=0, atol=1e-4)
    (pixels,) = graph.graph.find_nodes(op="placeholder")
    assert [user.target for user in pixels.users] == [aten.constant_pad_nd.default]
    assert all(node.args[2] for node in graph.graph.find_nodes(op="call_function", target=aten.mean.dim))


def test_the_twin_has_the_quantised_values_and_the_gradient_inside_the_range():
    graph, how = fx.Graph(), (0.1, -2, -128, 127, torch.int8)
    product = graph.call_function(aten.mul.Tensor, (graph.placeholder("images"), 3.0))
    for step in ("quantize", "dequantize"):
        product = graph.call_function(Named(f"quantized_decomposed.{step}_per_tensor.default"), (product, *how))
    graph.output(product)
    images = torch.tensor([[0.02, 0.5, -0.31, 9.0], [0.0, 0.1, -9.0, 1.0]], requires_grad=True)
    twin = straight_through(fx.GraphModule(nn.Module(), graph))(images)
    expected = (torch.clamp((30 * images).round() - 2, -128, 127) + 2) / 10
    torch.testing.assert_close(twin, expected)
    (gradient,) = torch.autograd.grad(twin.sum(), images)
    assert gradient.tolist() == [[3, 3, 3, 0], [3, 3, 0, 3]]


def test_operators_that_no_delegate_runs_are_named():
    graph = fx.Graph()
    images = graph.placeholder("images")

    delegate = graph.call_function(Named("executorch_call_delegate"), (images,))
    taken = graph.call_function(operator.getitem, (delegate, 0))
    graph.call_function(aten.mean.dim, (taken, [2, 3]))
    graph.call_function(
        Named("<EdgeOpOverload: aten.full_like.default>: schema = aten::full_like(Tensor self)"), (images,)
    )
    found = undelegated(graph)
    assert found == ["aten.full_like.default", "aten.mean.dim"]
    with pytest.raises(
        UserError, match=r"student\.pte: XNNPACK does not take aten\.full_like\.default, aten\.mean\.dim"
    ):
        refuse_undelegated("student.pte", found)
    refuse_undelegated("student.pte", [])


def test_without_the_extra_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e \.\[executorch\]"):
        require_executorch()


def test_a_float_program_that_is_not_the_network_is_refused(monkeypatch):
    monkeypatch.setattr(executorch_student, "version", lambda name: "1")
    executorch_student.is_the_network("student.pte", Agreement(1.0, 1e-6), 1e-6)
    for top1, difference in ((0.99, 1e-6), (1.0, 1e-3), (1.0, float("nan"))):
        with pytest.raises(UserError, match=r"student\.pte is not the measured network"):
            executorch_student.is_the_network("student.pte", Agreement(top1, 1.0), difference)


def test_the_table_shares_names_and_meanings_with_that_of_int8():
    same = set(EXECUTORCH) & set(QUANTISED) - OWN_WORDS
    assert all(EXECUTORCH[name] == QUANTISED[name] for name in same)
    assert {"robust_acc", "difference", "crafted_on", "bytes", "latency_ms", "agreement_float"} <= set(EXECUTORCH)


def test_vela_s_report_is_read():
    found = ethos_u.parse_report(REPORT)
    assert (found["sram_kib"], found["flash_kib"], found["cycles"]) == (4.17, 25.52, 35000)
    assert found["milliseconds"] == pytest.approx(0.07)
    assert (found["system"], found["memory"]) == ("Ethos_U55_High_End_Embedded", "Shared_Sram")
    assert (found["npu_operators"], found["cpu_operators"], found["vela"]) == (26, 0, "5.1.0")


@pytest.mark.parametrize(("cut", "named"), [("Total cycles", "cycles"), ('{"vela"', "versions")])
def test_a_report_without_a_figure_is_refused(cut, named):
    with pytest.raises(UserError, match=f"no {named}"):
        ethos_u.parse_report("\n".join(line for line in REPORT.splitlines() if not line.startswith(cut)))


def estimated(monkeypatch, tmp_path, report=REPORT, **options):
    """The command on a tiny student, with a compiler that prints a report."""
    exported(tmp_path)
    monkeypatch.setattr(ethos_u, "_run", lambda command, what, **_: report)
    arguments = {"target": "ethos-u55-128", "students": [str(tmp_path)], "python": "python", "json": False}
    console = Console(record=True, width=200)
    estimate_students(SimpleNamespace(**arguments | options), console)
    return console.export_text()


def test_figures_are_always_called_an_estimate_by_vela(monkeypatch, tmp_path, capsys):
    text = estimated(monkeypatch, tmp_path)
    assert "estimate by Vela 5.1.0" in text
    for figure in ("4.2 KiB", "25.5 KiB", "35,000", "0.070 ms"):
        assert figure in text
    capsys.readouterr()
    estimated(monkeypatch, tmp_path, json=True)
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["source"] == "estimate by Vela 5.1.0"
    assert (entry["budget"], entry["cycles"]) == (BUDGET, 35000)


def test_operators_that_the_npu_does_not_run_stop_the_estimate(monkeypatch, tmp_path):
    left = REPORT.replace('"undelegated": []', '"undelegated": ["aten.mean.dim"]')
    with pytest.raises(UserError, match=r"ethos-u55-128 does not run aten\.mean\.dim"):
        estimated(monkeypatch, tmp_path, left)
    with pytest.raises(UserError, match="3 operators"):
        estimated(monkeypatch, tmp_path, REPORT.replace("CPU operators = 0", "CPU operators = 3"))


def test_the_environment_is_made_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands, lines = [], []

    def run(command, what, **_):
        commands.append(command[1:4])
        if "venv" in command:
            (tmp_path / "proard").mkdir(exist_ok=True)
            Path(command[-1]).mkdir()
        return ""

    monkeypatch.setattr(ethos_u, "_run", run)
    first = ethos_u.environment(lines.append)
    assert [command[1] for command in commands] == ["venv", "pip"]
    assert len(lines) == 1
    assert str(tmp_path) in lines[0]
    assert ethos_u.environment(lines.append) == first
    assert len(commands) == 2


def test_a_compiler_that_is_missing_or_fails_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be started"):
        ethos_u._run([str(tmp_path / "python")], "the compilation")
    with pytest.raises(UserError, match="the compilation failed: ValueError: no"):
        ethos_u._run([sys.executable, "-c", "raise ValueError('no')"], "the compilation")


def test_programs_are_the_network_and_are_measured_on_their_runtime(tmp_path):
    pytest.importorskip("executorch")
    exported(tmp_path, TINY)
    files = save_stripes(tmp_path)
    config = tiny_config(threat={"eps": 8 / 255}, quantize_student={"attacks": ATTACKS, "calibration_images": 64})
    written = {"float": tmp_path / "student.pte", "int8": tmp_path / "student.int8.pte"}
    written |= {"parity": tmp_path / "pte.json", "table": tmp_path / "pte.parquet"}
    read = {"weights": tmp_path / "student.safetensors", "train": files["train"], "test": files["test"]}
    executorch_student.main(arguments("executorch_student", config, budget=BUDGET, **read, **written))
    parity = json.loads(written["parity"].read_text())
    test = load_split(files["test"])
    assert parity["num_images"] == len(test)
    assert all(entry["undelegated_operators"] == [] for entry in parity["files"].values())
    assert parity["files"]["student.pte"]["top1_agreement"] == 1
    table = read_table(written["table"]).set_index(["precision", "attack"])
    pixels = to_float(test.images)
    for precision, path in (("float32", written["float"]), ("int8", written["int8"])):
        logits = executorch.Runner(path)(pixels)
        row = table.loc[(precision, "union")]
        np.testing.assert_array_equal(np.array(row["clean"]), (logits.argmax(1) == test.labels).numpy())
        assert row["bytes"] == path.stat().st_size
    names = ["pgd3", "cw3", "scaled", "transfer", "rounded", "worst", "union"]
    assert list(table.loc["int8"].index) == names
    assert list(table["crafted_on"].xs("transfer", level="attack")) == ["int8", "float32"]
    assert min(table.loc["int8", "agreement_clean"]) >= config.executorch_student.min_agreement
    before, after = (np.array(table.loc[(each, "union"), "robust"]) for each in ("float32", "int8"))
    assert table.loc[("int8", "union"), "lost"] == (before & ~after).sum()


def test_an_operator_that_xnnpack_does_not_take_stops_the_export(tmp_path):
    pytest.importorskip("executorch")

    class Means(nn.Module):
        def forward(self, images):
            return images.mean((2, 3))

    module = torch.export.export(Means(), (torch.zeros(1, 2, 4, 4),)).module(check_guards=False)
    with pytest.raises(UserError, match=r"mean\.dim"):
        executorch.save_pte(tmp_path / "means.pte", module)
    assert not list(tmp_path.iterdir())
