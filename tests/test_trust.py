"""AutoAttack and the checks for masked gradients: exact on linear networks, resumable, told on card and page."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from export_runs import BUDGET, arguments, selected_student
from helpers import tiny_config
from torch import nn

from proard import cli
from proard.artifacts import ArtifactError, read_header, read_table, sha256, write_json
from proard.config import Threat, UserError
from proard.data import load_split, to_float
from proard.evaluation.autoattack import ATTACKS, Counted, autoattack, check_classes, run_attack
from proard.evaluation.masking import CHECKS, Evidence, Examination
from proard.export import load_student
from proard.export.robustbench import Publication, _additional_data, broken_rules, entry, submission
from proard.nets import FoldedNet
from proard.stages import autoattack_student, check_student, describe_student, export_student
from proard.stages.export_student import EXPORTED

NAMES = ("left", "right", "low", "none", "other")
EPS = 0.02
ATTACK = {"name": "pgd3", "num_steps": 3, "step_size": 0.01}
CHANGES = {
    "space__classes": len(NAMES),
    "threat__eps": EPS,
    "verify_front": {"attacks": [ATTACK]},
    "select_student": {"candidates": 2, "attack": ATTACK},
    "autoattack_student": {"num_images": 16, "block_size": 8},
    "check_student": {"num_images": 16},
}
CONFIG = tiny_config(**CHANGES)


class Linear(nn.Module):
    """Logits that are linear in the pixels: the distance to every other class is known exactly."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = torch.randn(len(NAMES), 64, generator=generator)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images - 0.5).flatten(1) @ self.weight.T

    def distances(self, images: torch.Tensor, labels: torch.Tensor, norm: str) -> torch.Tensor:
        """Smallest perturbation that changes the class."""
        logits = self(images)
        margins = logits.gather(1, labels[:, None]) - logits  # (batch, classes)
        directions = self.weight[labels][:, None] - self.weight[None]  # (batch, classes, pixels)
        sizes = torch.linalg.vector_norm(directions, ord=1 if norm == "linf" else 2, dim=2)
        return (margins / sizes).masked_fill(sizes == 0, torch.inf).amin(1)


@pytest.fixture(scope="module", params=["linf", "l2"])
def linear(request):
    """A linear network and images in the middle of the pixel range, each clearly inside or outside the radius."""
    norm = request.param
    generator = torch.Generator().manual_seed(0)
    net = Linear(generator)
    images = (0.5 + 0.08 * torch.randn(60, 1, 8, 8, generator=generator)).clamp(0.1, 0.9)
    labels = net(images).argmax(1)
    distance = net.distances(images, labels, norm)
    eps = float(distance.median())
    assert eps < 0.1 or norm == "l2"  # the pixel range is no limit
    clear = ((distance < 0.9 * eps) | (distance > 1.1 * eps)).nonzero()[:, 0]
    images, labels, robust = images[clear], labels[clear], distance[clear] > eps
    assert 5 < int(robust.sum()) < len(robust) - 5
    return net, images, labels, robust, Threat(norm=norm, eps=eps)


@pytest.mark.parametrize("attack", ATTACKS[:3])
def test_gradient_attacks_find_the_exact_distance_of_a_linear_network(linear, attack):
    net, images, labels, robust, threat = linear
    found, warnings = run_attack(Counted(net), images, labels, attack=attack, threat=threat, seed=0)
    assert found.tolist() == robust.tolist()
    assert warnings == []
    for index in (robust.nonzero()[0], (~robust).nonzero()[0]):  # a single image left
        one, _ = run_attack(Counted(net), images[index], labels[index], attack=attack, threat=threat, seed=0)
        assert one.tolist() == robust[index].tolist()


def test_square_never_loses_an_image_that_no_perturbation_can_change(linear):
    net, images, labels, robust, threat = linear
    found, _ = run_attack(Counted(net), images, labels, attack="square", threat=threat, seed=0)
    assert bool(found[robust].all())
    assert not bool(found[~robust].all())


def test_attacks_leave_the_global_generator_alone(linear):
    net, images, labels, _, threat = linear
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run_attack(Counted(net), images[:2], labels[:2], attack="apgd-ce", threat=threat, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_warnings_of_autoattack_are_kept(linear):
    net, images, labels, _, threat = linear
    noisy = lambda batch: net(batch) + 1e-2 * torch.randn(len(batch), len(NAMES))  # noqa: E731
    wrapped = nn.Module()
    wrapped.forward = noisy
    _, warnings = run_attack(Counted(wrapped), images[:8], labels[:8], attack="apgd-ce", threat=threat, seed=0)
    assert any("randomized defense" in message for message in warnings)


def test_too_few_classes_are_one_clear_error():
    with pytest.raises(UserError, match=r"from 4 classes on, there are 3: set autoattack_student.run: false"):
        check_classes(3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """A random supernet, a student chosen from it and exported."""
    folder = tmp_path_factory.mktemp("run")
    files = selected_student(folder, CONFIG, val=60, number=20, classes=NAMES)
    exported = folder / "results" / "tiny" / "export_student" / BUDGET
    flags = {name: files[name] for name in ("student", "supernet", "train", "test", "manifest")}
    flags |= {"budget": BUDGET, **{name: exported / file for name, file in EXPORTED.items()}}
    export_student.main(arguments("export_student", CONFIG, **flags))
    return files | {name: exported / file for name, file in EXPORTED.items()}


def attack_flags(inputs, folder, *, config=CONFIG):
    """Command line of the stage; results of the attacks are kept in `folder`."""
    flags = {name: inputs[name] for name in ("weights", "student", "test")}
    flags |= {"budget": BUDGET, "cache": folder / "cache", "table": folder / BUDGET / "table.parquet"}
    return arguments("autoattack_student", config, **flags), flags["table"]


@pytest.fixture(scope="module")
def attacked(inputs) -> Path:
    """The table of an undisturbed AutoAttack, where the run has it."""
    folder = inputs["weights"].parents[2] / "autoattack_student"
    argv, table = attack_flags(inputs, folder)
    autoattack_student.main(argv)
    return table


def test_the_table_says_what_is_left_after_each_attack(inputs, attacked):
    table = read_table(attacked).set_index("attack")
    assert list(table.index) == ["apgd-ce", "apgd-t", "fab-t", "square", "autoattack"]
    masks = np.stack([np.asarray(mask) for mask in table["robust"]])
    assert (np.diff(masks.astype(int), axis=0) <= 0).all()
    assert (masks[-1] == masks[-2]).all()
    assert table["robust_acc"].tolist() == masks.mean(1).tolist()
    own = read_table(inputs["student"])
    own = own[(own["role"] == "choice") & (own["split"] == "test") & (own["attack"] == "worst")].iloc[0]
    clean, robust = (np.asarray(own[name])[:16] for name in ("clean", "robust"))
    assert np.asarray(table["clean"].iloc[0]).tolist() == clean.tolist()
    assert (table["left_out"] == (clean & ~robust).sum()).all()
    assert table["left_out"].iloc[0] > 0
    assert table.loc["apgd-ce", "attacked"] == robust.sum()
    assert table.loc["apgd-t", "attacked"] == masks[0].sum()
    assert (table["own_robust_acc"] == robust.mean()).all()
    assert not (masks[-1] & ~robust).any()
    assert set(table["num_images"]) == {16}


def test_the_networks_own_gradient_changes_no_outcome(inputs, attacked, monkeypatch):
    """With autograd's gradient and the library's convolutions the same images are robust."""
    net = load_student(inputs["weights"]).requires_grad_(False)
    images = load_split(inputs["test"]).take(range(16))
    threat = CONFIG.threat
    found = []
    for own in (True, False):
        if not own:
            monkeypatch.setattr(FoldedNet, "input_gradient", lambda net: None)
        found.append(autoattack(net, images, threat=threat, seed=0, block_size=16))
    assert (found[0].clean == found[1].clean).all()
    for attack in ATTACKS:
        ours, theirs = (each.entries[attack] for each in found)
        assert ours["robust"].tolist() == theirs["robust"].tolist()
        assert (ours["gradients"], ours["attacked"]) == (theirs["gradients"], theirs["attacked"])


def test_all_images_are_attacked_where_the_settings_say_so(inputs, attacked, tmp_path):
    section = CONFIG.autoattack_student.model_copy(update={"attack_all": True, "num_images": 3})
    argv, path = attack_flags(inputs, tmp_path, config=CONFIG.model_copy(update={"autoattack_student": section}))
    autoattack_student.main(argv)
    table = read_table(path)
    assert set(table["left_out"]) == {0}
    assert table["attacked"].iloc[0] == np.asarray(table["clean"].iloc[0]).sum()


def test_a_kill_in_each_attack_changes_no_outcome(inputs, attacked, tmp_path):
    """One block of images, so that the k-th kept result ends the k-th attack."""
    section = CONFIG.autoattack_student.model_copy(update={"num_images": 8})
    config = CONFIG.model_copy(update={"autoattack_student": section})
    undisturbed, expected = attack_flags(inputs, tmp_path / "undisturbed", config=config)
    autoattack_student.main(undisturbed)
    argv, table = attack_flags(inputs, tmp_path / "killed", config=config)
    command = [sys.executable, "-m", "proard.stages.autoattack_student", *argv]
    kept = lambda: len(list((tmp_path / "killed" / "cache").rglob("*.json")))  # noqa: E731
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for done in range(len(ATTACKS)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert "AutoAttack on" in process.stdout.readline()
        while kept() < done:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert kept() in (done, done + 1)
        assert not table.exists()
    autoattack_student.main(argv)
    first, second = (read_table(path) for path in (expected, table))
    assert [mask.tolist() for mask in first["robust"]] == [mask.tolist() for mask in second["robust"]]


def test_another_students_weights_are_refused(inputs, tmp_path):
    argv, _ = attack_flags({**inputs, "weights": inputs["supernet"]}, tmp_path)
    with pytest.raises(ArtifactError, match="contains 'supernet', expected student"):
        autoattack_student.main(argv)
    config = CONFIG.model_copy(update={"threat": Threat(eps=0.03)})
    with pytest.raises(ArtifactError, match=r"has threat .*0.02.* this job .*0.03.*rerun export_student"):
        autoattack_student.main(attack_flags(inputs, tmp_path, config=config)[0])


@pytest.fixture(scope="module")
def checked(inputs, attacked) -> Path:
    """The table of the checks."""
    table = attacked.parents[2] / "check_student" / BUDGET / "checks.parquet"
    flags = {name: inputs[name] for name in ("weights", "onnx", "student", "test", "supernet", "train")}
    flags |= {"budget": BUDGET, "autoattack": attacked, "checks": table}
    check_student.main(arguments("check_student", CONFIG, **flags))
    return table


def test_the_twelve_checks_have_value_threshold_and_verdict(checked):
    table = read_table(checked)
    assert table["number"].tolist() == list(range(1, 13))
    assert table["check"].tolist() == [check.name for check in CHECKS]
    applied = table[table["value"].notna()]
    assert len(applied) == 12
    for _, row in applied.iterrows():
        holds = row["value"] <= row["threshold"] if row["relation"] == "<=" else row["value"] >= row["threshold"]
        assert row["passed"] == holds, row["check"]
    by_name = table.set_index("check")
    assert by_name.loc["own network", "value"] == 0
    assert by_name.loc["forward pass", "passed"]
    assert by_name.loc["deployed file", "passed"]
    assert set(json.loads(by_name.loc["black box", "details"])) == {"Square", "transfer from another subnet"}


def examined(net, images, labels, threat, **evidence):
    """Values of the checks by name, and whether each passed."""
    options = {"accounting": "any_iterate", "batch_size": 50, "seed": 0, "evidence": Evidence(**evidence)}
    examination = Examination(net, images, labels, threat=threat, **options)
    found = dict(zip((check.name for check in CHECKS), examination.run(), strict=True))
    assert examination.gradients > 0
    return {
        check.name: (value, value is not None and (value <= limit if check.relation == "<=" else value >= limit))
        for check in CHECKS
        for value, limit in [(found[check.name].value, examination.threshold(check))]
    }


def test_a_linear_network_passes_all_checks_that_apply(linear):
    net, images, labels, robust, threat = linear
    after = {name: robust.numpy() for name in ATTACKS}
    found = examined(net, images, labels, threat, after=after, others={"itself": net})
    failed = {name: value for name, (value, passed) in found.items() if value is not None and not passed}
    assert failed.keys() <= {"noise", "overfitting"}  # images lie at the border, where noise does change classes
    assert found["linearity"][0] < 0.2
    assert found["own network"][0] is None


def test_networks_that_mask_their_gradients_are_caught(linear):
    net, images, labels, robust, threat = linear
    steep = examined(lambda batch: 1e4 * net(batch), images, labels, threat)
    assert not steep["zero gradients"][1]  # the softmax is exactly one-hot
    assert not steep["radius"][1]
    coarse = lambda batch: net((4096 * batch).round() / 4096)  # noqa: E731 - no gradient at all
    assert not examined(coarse, images, labels, threat, others={"the plain network": net})["black box"][1]
    after = {name: np.ones(len(robust), bool) for name in ATTACKS}
    after["square"] = after["autoattack"] = robust.numpy()  # only the attack without gradients succeeded
    assert not examined(coarse, images, labels, threat, after=after)["black box"][1]
    generator = torch.Generator().manual_seed(0)
    noise = lambda batch: net(batch) + torch.randn(len(batch), len(NAMES), generator=generator)  # noqa: E731
    assert not examined(noise, images, labels, threat)["forward pass"][1]


@pytest.fixture(scope="module")
def described(inputs, attacked, checked) -> Path:
    """The card with both, also beside the exported files."""
    card = checked.parents[2] / "describe_student" / BUDGET / "card.md"
    flags = {name: inputs[name] for name in ("weights", "student", "supernet", "manifest")}
    flags |= {"budget": BUDGET, "autoattack": attacked, "checks": checked, "card": card}
    describe_student.main(arguments("describe_student", CONFIG, **flags))
    return card


def test_the_first_robust_accuracy_of_the_card_is_autoattacks(inputs, attacked, described):
    text = described.read_text("utf-8")
    row = read_table(attacked).set_index("attack").loc["autoattack"]
    own = read_table(inputs["student"])
    own = own[(own["role"] == "choice") & (own["split"] == "test") & (own["attack"] == "worst")].iloc[0]
    _, front, body = text.split("---\n", 2)
    metrics = yaml.safe_load(front)["model-index"][0]["results"][0]["metrics"]
    assert [entry["value"] for entry in metrics[1:]] == [round(row["robust_acc"], 4), round(own["robust_acc"], 4)]
    assert "AutoAttack" in metrics[1]["name"]
    robust = [line for line in body.splitlines() if line.startswith("| Robust accuracy")]
    assert f"{row['robust_acc']:.2%}" in robust[0]
    assert f"{own['robust_acc']:.2%}" in robust[1]
    assert "AutoAttack" in robust[0]
    gap = row["own_robust_acc"] - row["robust_acc"]
    assert (f"AutoAttack leaves {100 * gap:.1f} points fewer images correct" in body) == (gap > 0.005)
    assert body.count("| 12 | overfitting:") == 1
    assert f"{row['left_out']} images that are misclassified" in body


def test_the_folder_that_is_passed_on_has_the_same_card_and_right_checksums(inputs, described):
    folder = inputs["weights"].parent
    assert (folder / "card.md").read_text("utf-8") == described.read_text("utf-8")
    lines = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert set(lines) == set(EXPORTED.values()) - {"SHA256SUMS"}
    assert all(sha256(folder / name) == digest for name, digest in lines.items())


def test_a_card_is_not_written_from_tables_of_other_weights(inputs, attacked, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(inputs["weights"].parent, folder)
    path = folder / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    flags = {name: inputs[name] for name in ("student", "supernet", "manifest")}
    flags |= {"budget": BUDGET, "weights": path, "autoattack": attacked, "card": tmp_path / "card.md"}
    with pytest.raises(ArtifactError, match=r"examined other weights.*rerun the stage"):
        describe_student.main(arguments("describe_student", CONFIG, **flags))


def test_robustbench_names_every_rule_that_is_not_met(inputs, attacked, capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["robustbench", str(inputs["weights"].parent)])
    said = capsys.readouterr().err
    for words in (
        "rule data: the student was trained on digits; expected prepare_data.source cifar10 or cifar100",
        "rule images: AutoAttack on 16 test images; expected all 10,000",
        "rule attacks: AutoAttack did not attack",
        "rule additional data: the teacher is not there; give --additional-data yes or no",
    ):
        assert words in said
    elsewhere = tmp_path / "export_student" / BUDGET
    shutil.copytree(inputs["weights"].parent, elsewhere)
    write_json(tmp_path / "prepare_data" / "manifest.json", {"splits": {"train": {"additional": 3}}})
    assert _additional_data(elsewhere, Publication()) is True
    with pytest.raises(UserError, match=r"rule AutoAttack: there is no .*table.parquet"):
        submission(elsewhere, Publication())


def test_a_student_that_meets_the_rules_is_written_as_the_leaderboard_reads_it(inputs, attacked, monkeypatch, capsys):
    header = {**read_header(inputs["weights"]), "dataset": "cifar10", "threat": {"norm": "linf", "eps": 8 / 255}}
    row = read_table(attacked).iloc[-1].copy()
    row[["num_images", "left_out", "warnings"]] = [10_000, 0, ""]
    options = {"made_from": "a", "checksum": "a"}
    assert broken_rules(header, row, **options) == []
    assert broken_rules({**header, "threat": {"norm": "linf", "eps": 0.031}}, row, **options)[0].startswith(
        "eps: 7.905"
    )
    assert broken_rules({**header, "threat": {"norm": "l1", "eps": 12}}, row, **options)[0].startswith("threat")
    assert broken_rules(header, row, made_from="b", checksum="a")[0].startswith("weights")
    row["warnings"] = "there are 3 points with zero gradient!"
    assert broken_rules(header, row, **options)[0].startswith("gradients")
    listed = entry(header, row, Publication(title="Small"), additional=False)
    keys = "link name authors additional_data number_forward_passes dataset venue architecture eps clean_acc reported"
    assert set(keys.split()) | {"autoattack_acc", "unreliable"} == set(listed)
    assert (listed["eps"], listed["autoattack_acc"]) == ("8/255", f"{100 * row['robust_acc']:.2f}")

    monkeypatch.setattr("proard.export.robustbench.broken_rules", lambda *_, **__: [])
    monkeypatch.setattr("proard.export.robustbench.DATA", {"digits": "digits"})
    folder = inputs["weights"].parent
    cli.main(["robustbench", str(folder), "--additional-data", "no", "--title", "Small and robust"])
    assert json.loads((folder / "robustbench.json").read_text())["name"] == "Small and robust"
    assert "TO BE FILLED IN" in (folder / "robustbench.md").read_text()
    assert "TO BE FILLED IN" in capsys.readouterr().out
    code = """
import sys; sys.modules["proard"] = None
import torch
from load_student import load_student
model = load_student("student.pt2").eval()
assert isinstance(model, torch.nn.Module) and not model.training
torch.save(model(torch.load("images.pt")), "logits.pt")
"""
    images = to_float(load_split(inputs["test"]).images[:7]).contiguous()
    torch.save(images, folder / "images.pt")
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    from proard.export import load_student

    torch.testing.assert_close(torch.load(folder / "logits.pt"), load_student(inputs["weights"])(images))


def test_the_independent_script_finds_equal_outcomes(inputs, tmp_path):
    section = CONFIG.autoattack_student.model_copy(update={"attack_all": True, "num_images": 6, "block_size": 5})
    argv, path = attack_flags(inputs, tmp_path, config=CONFIG.model_copy(update={"autoattack_student": section}))
    autoattack_student.main(argv)
    script = Path(__file__).parents[1] / "benchmarks" / "check_autoattack.py"
    command = [sys.executable, script, inputs["pt2"], inputs["test"], "--table", path]
    command += ["--num-images", "6", "--block-size", "5"]
    guard = {**os.environ, "PYTHONPATH": str(tmp_path)}
    (tmp_path / "proard.py").write_text("raise ImportError('the script must not need the package')")
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=guard)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'apgd-ce': 0, 'apgd-t': 0, 'fab-t': 0, 'square': 0" in done.stdout


def test_blocks_do_not_depend_on_each_other(inputs, monkeypatch):
    monkeypatch.setattr("proard.evaluation.autoattack.ATTACKS", ("apgd-ce", "apgd-t"))
    from proard.export import load_student

    net, images = load_student(inputs["weights"]).requires_grad_(False), load_split(inputs["test"]).first(10)
    threat = CONFIG.threat
    whole = autoattack(net, images, threat=threat, seed=0, block_size=5)
    first = autoattack(net, images.first(5), threat=threat, seed=0, block_size=5)
    assert whole.entries["apgd-t"]["robust"][:5].tolist() == first.entries["apgd-t"]["robust"].tolist()
