"""The training stages as programs: killed, stopped, replaced and continued; damaged inputs; their outputs."""

from __future__ import annotations

import re
import signal
import time

import pytest
from helpers import CONFIG, SMALL_SPACES, random_supernet, save_stripes, tiny_config, tiny_space
from stage_runs import LONG, OUTPUTS, Stage

from proard.artifacts import ArtifactError, Provenance, read_header, read_metadata, read_table
from proard.config import ConfigError, UserError, job_settings
from proard.nets import extract, load_static, load_supernet, save_static, save_supernet
from proard.stages import train_control, train_teacher


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Image sets and a teacher from a short training."""
    folder = tmp_path_factory.mktemp("inputs")
    paths = save_stripes(folder)
    stage = Stage("train_teacher", paths, folder)
    stage.run()
    return {**paths, "teacher": stage.outputs[0]}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The long phase, uninterrupted."""
    stage = Stage("train_phase", inputs, tmp_path_factory.mktemp("whole"), **LONG)
    stage.run()
    return stage


# Real processes, really killed.


def test_killed_teacher_continues_to_the_same_weights(inputs, tmp_path):
    uninterrupted = Stage("train_teacher", inputs, tmp_path / "whole", **LONG)
    uninterrupted.run()
    stage = Stage("train_teacher", inputs, tmp_path / "killed", **LONG)
    process = stage.start()
    stage.wait_until_step(process, 7)  # in the second epoch
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert stage.nothing_declared_is_there()
    out, err = stage.start().communicate()
    assert re.search(r"resumed after step \d+ of 60", out), out + err
    assert stage.equals(uninterrupted)
    costs, whole = stage.costs(), uninterrupted.costs()
    assert (costs["attempts"], whole["attempts"]) == (2, 1)
    for name in (
        "forward_equivalents",
        "train_macs",
        "measure_macs",
        "weight_gradients",
    ):
        assert costs[name] == whole[name] > 0, name


def test_phase_killed_then_terminated_continues_to_the_same_weights(inputs, whole, tmp_path, capsys):
    stage = Stage("train_phase", inputs, tmp_path, **LONG)
    process = stage.start()
    stage.wait_until_step(process, 7)
    process.kill()
    process.wait()
    assert stage.nothing_declared_is_there()
    process = stage.start()
    stage.wait_until_step(process, 20)
    process.terminate()
    out, err = process.communicate()
    assert process.returncode == 1
    assert "resumed after step" in out
    assert re.fullmatch(r"error: all: stopped by SIGTERM after step \d+; the same command continues\n", err)
    assert stage.nothing_declared_is_there()
    stopped = int(re.search(r"after step (\d+)", err)[1])
    assert read_header(stage.state)["facts"]["done"]["step"] == stopped >= 20
    stage.run()
    assert f"resumed after step {stopped} of 60" in capsys.readouterr().out
    assert stage.equals(whole)


def test_successor_takes_over_from_a_process_that_still_trains(inputs, whole, tmp_path):
    stage = Stage("train_phase", inputs, tmp_path, **LONG)
    orphan = stage.start()
    stage.wait_until_step(orphan, 3)
    orphan.send_signal(signal.SIGSTOP)  # suspended until the successor has sent its request
    successor = stage.start()
    for _ in range(9000):
        if stage.outputs[0].with_suffix(".handover").exists():
            break
        assert successor.poll() is None, successor.communicate()[1]
        time.sleep(0.02)
    orphan.send_signal(signal.SIGCONT)
    _, orphan_error = orphan.communicate()
    out, err = successor.communicate()
    assert (orphan.returncode, successor.returncode) == (1, 0), err
    assert re.fullmatch(r"error: all: stopped by a successor after step \d+; .*\n", orphan_error)
    assert re.search(rf"process {orphan.pid} on \S+ still trains supernet; asking it to save and stop", out)
    stopped = re.search(r"after step (\d+)", orphan_error)[1]
    assert f"resumed after step {stopped} of 60" in out
    assert stage.equals(whole)


def test_damaged_teacher_is_one_line_that_names_file_and_remedy(inputs, tmp_path):
    teacher = tmp_path / "teacher.safetensors"
    teacher.write_bytes(inputs["teacher"].read_bytes()[:-100])
    stage = Stage("train_phase", inputs, tmp_path, teacher=teacher)
    process = stage.start()
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.count("\n") == 1
    assert re.match(rf"error: {re.escape(str(teacher))} is truncated .*; delete it and rerun its stage", err)
    assert stage.nothing_declared_is_there()


# The same within this process.


@pytest.fixture(scope="module")
def stopped(inputs, tmp_path_factory):
    """A phase stopped in its tenth step; its state, as bytes."""
    stage = Stage("train_phase", inputs, tmp_path_factory.mktemp("stopped"), **LONG)
    process = stage.start()
    stage.wait_until_step(process, 10)
    process.terminate()
    process.communicate()
    return stage.state.read_bytes()


def test_damaged_state_is_ignored(inputs, whole, stopped, tmp_path, capsys):
    stage = Stage("train_phase", inputs, tmp_path, **LONG)
    stage.state.write_bytes(stopped[: len(stopped) // 2])
    stage.run()
    said = capsys.readouterr().out
    assert f"state ignored: {stage.state} is truncated" in said
    assert "resumed" not in said
    assert stage.equals(whole)


def test_state_of_other_settings_or_another_seed_is_ignored(inputs, stopped, tmp_path, capsys):
    for changes in ({"lr": 0.03}, {"seed": 1}):
        stage = Stage("train_phase", inputs, tmp_path, **{**LONG, "epochs": 1, **changes})
        stage.state.write_bytes(stopped)
        stage.run()
        said = capsys.readouterr().out
        assert f"state ignored: {stage.state} is of other settings, seed, threads or inputs" in said
        assert "resumed" not in said


def test_state_of_other_inputs_is_ignored(inputs, stopped, tmp_path, capsys):
    others = save_stripes(tmp_path / "others", train=99)
    stage = Stage("train_phase", {**inputs, "train": others["train"]}, tmp_path / "phase", **{**LONG, "epochs": 0.5})
    stage.folder.mkdir()
    stage.state.write_bytes(stopped)
    stage.run()
    assert "of other settings, seed, threads or inputs" in capsys.readouterr().out


def test_files_that_a_killed_writer_left_are_removed(inputs, tmp_path):
    stage = Stage("train_phase", inputs, tmp_path, epochs=0.5)
    for name in (".supernet.state.k3j2.part", ".supernet.safetensors.x.part", "supernet.handover", "supernet.lock"):
        (tmp_path / name).write_text("half")
    stage.run()
    assert {path.name for path in tmp_path.iterdir()} == {*OUTPUTS["train_phase"], "costs.parquet"}


def damaged(data, kind):
    """The bytes of a safetensors file, damaged."""
    middle = len(data) - 400
    header = data.index(b'"kind') if b'"kind' in data else data.index(b"kind")
    return {
        "empty": b"",
        "half": data[: len(data) // 2],
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "header": data[:header] + b"}}" + data[header + 2 :],
        "text": b"<html>not found</html>" * 40,
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "half", "flipped", "header", "text"])
@pytest.mark.parametrize("flag", ["teacher", "train", "previous"])
def test_damaged_input_is_named_with_its_remedy(inputs, tmp_path, kind, flag):
    previous = tmp_path / "previous.safetensors"
    save_supernet(previous, random_supernet(tiny_space()).float(), Provenance("tiny", "train_phase"))
    files = {**inputs, "previous": previous}
    broken = tmp_path / f"broken_{flag}.safetensors"
    broken.write_bytes(damaged(files[flag].read_bytes(), kind))
    files[flag] = broken
    stage = Stage("train_phase", files, tmp_path / "out", previous=files["previous"], epochs=0.5)
    with pytest.raises(ArtifactError, match=rf"{re.escape(str(broken))} (is|holds) .*(rerun|expected)") as caught:
        stage.run()
    assert "\n" not in str(caught.value)
    assert stage.nothing_declared_is_there()


@pytest.mark.parametrize("flag", ["teacher", "train", "val"])
def test_missing_input_is_named_with_its_remedy(inputs, tmp_path, flag):
    missing = tmp_path / "nowhere.safetensors"
    stage = Stage("train_phase", {**inputs, flag: missing}, tmp_path)
    with pytest.raises(ArtifactError, match=r"nowhere.safetensors (does not exist|cannot be read).* rerun the stage"):
        stage.run()


def test_previous_phase_of_another_space_is_refused(inputs, tmp_path):
    previous = tmp_path / "previous.safetensors"
    space = tiny_space(width=[0.25, 1])
    save_supernet(previous, random_supernet(space).float(), Provenance("tiny", "train_phase"))
    with pytest.raises(ArtifactError, match=r"previous.safetensors is a supernet of space tiny, not of this run's"):
        Stage("train_phase", inputs, tmp_path, previous=previous).run()


# Inputs and outputs of the stages.


def test_phase_starts_from_the_teacher_or_from_the_previous_phase(inputs, tmp_path):
    space = tiny_space()
    still = {"epochs": 1 / 6, "lr": 1e-12, "weight_decay": 0}
    stage = Stage("train_phase", inputs, tmp_path / "first", **still)
    stage.run()
    net, _ = load_supernet(stage.outputs[0], space)
    teacher, _, arch, _ = load_static(inputs["teacher"], kind="teacher")
    assert arch == space.largest
    for name, parameter in extract(net, space.largest).named_parameters():
        assert parameter.isclose(teacher.get_parameter(name), atol=1e-6).all()
    fresh = Stage("train_phase", inputs, tmp_path / "fresh", warm_start="random", **still)
    fresh.run()
    assert not load_supernet(fresh.outputs[0], space)[0].head.weight.isclose(net.head.weight).all()
    following = Stage("train_phase", inputs, tmp_path / "next", previous=fresh.outputs[0], **still)
    following.run()
    after, before = (load_supernet(each.outputs[0], space)[0] for each in (following, fresh))
    assert after.head.weight.isclose(before.head.weight, atol=1e-6).all()


def test_written_files_carry_their_provenance(whole, inputs):
    header, table = read_header(whole.outputs[0]), read_metadata(whole.outputs[1])
    for provenance in (header["provenance"], table):
        assert (provenance["run"], provenance["stage"], provenance["seed"]) == ("tiny", "train_phase", 0)
        assert set(provenance["inputs"]) == {"train.safetensors", "val.safetensors", "teacher.safetensors"}
    history = whole.history()
    assert set(history["arch"]) == {"smallest", "middle", "largest"}
    assert sum(history["best"]) == 3
    assert set(history["phase"]) == {"all"}


def test_strange_choice_of_a_phase_names_the_key(inputs, tmp_path):
    with pytest.raises(UserError, match=r"train_phase.all: width \[0.7\] is not in space tiny"):
        Stage("train_phase", inputs, tmp_path, width=[0.7]).run()


def test_space_for_other_images_is_refused(inputs, tmp_path):
    config = tiny_config(space=SMALL_SPACES[1])
    files = {**{key: inputs[key] for key in ("train", "val")}, "teacher": tmp_path / "t", "history": tmp_path / "h"}
    flags = [text for flag, path in files.items() for text in (f"--{flag}", str(path))]
    with pytest.raises(UserError, match=r"space tiny_deep is for 3x8x8 images.* 3 classes.* the data are 1x8x8 of 3"):
        train_teacher.main(["--settings", job_settings(config, "train_teacher"), "--threads", "1", *flags])


def test_teacher_is_taken_from_a_file(inputs, tmp_path):
    stage = Stage("train_teacher", inputs, tmp_path, source="file", file=str(inputs["teacher"]))
    stage.run()
    assert stage.checksum() == read_header(inputs["teacher"])["checksum"]
    assert len(read_table(stage.outputs[1])) == 0
    space = tiny_space(classes=5)
    net = extract(random_supernet(space).float().eval(), space.largest)
    save_static(tmp_path / "five.safetensors", net, space=space, arch=space.largest, kind="teacher")
    with pytest.raises(ConfigError, match=r"five.safetensors is for 1x8x8 images of 5 classes; this run has .* of 3"):
        Stage("train_teacher", inputs, tmp_path, source="file", file=str(tmp_path / "five.safetensors")).run()


def test_control_is_measured_on_val_and_test_under_every_attack(inputs, tmp_path):
    attacks = [{"name": "a", "num_steps": 2}, {"name": "b", "objective": "margin", "num_steps": 1, "restarts": 2}]
    control = {key: value for key, value in CONFIG["train_teacher"].items() if key != "attack"}
    config = tiny_config(train_control={**control, "epochs": 6, "lr": 0.1}, verify_front={"attacks": attacks})
    files = {key: inputs[key] for key in ("train", "val", "test")}
    names = {"control": "control.safetensors", "table": "table.parquet", "history": "history.parquet"}
    files |= {key: tmp_path / name for key, name in names.items()}
    flags = [text for flag, path in files.items() for text in (f"--{flag}", str(path))]
    train_control.main(["--settings", job_settings(config, "train_control"), "--threads", "1", *flags])
    table = read_table(files["table"])
    assert list(zip(table.split, table.attack, strict=True)) == [
        (split, attack) for split in ("val", "test") for attack in ("a", "b", "worst")
    ]
    worst = table[table.attack == "worst"].set_index("split").robust_acc
    assert all(worst[row.split] <= row.robust_acc <= row.clean_acc for row in table.itertuples())
    assert table.clean_acc.min() > 0.8
    assert {path.name for path in tmp_path.iterdir()} == {*names.values(), "costs.parquet"}
    _, _, arch, _ = load_static(files["control"], kind="control")
    assert arch == tiny_space().largest
