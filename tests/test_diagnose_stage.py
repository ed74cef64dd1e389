"""The stage diagnose, and the comparison of diagnoses: the contents of tables and figures, and where they are shown."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import TINY, random_supernet, save_stripes, tiny_config, tiny_space
from synthetic_run import SyntheticRun

from proard.artifacts import ArtifactError, Provenance, read_metadata, read_table, save_tensors
from proard.config import COMPARED, ConfigError, Threat, job_settings, load
from proard.data import load_split
from proard.evaluation import Conditions, SubnetMeter
from proard.evaluation.tables import BOUND, PAIRS, RADII, SUMMARY
from proard.export import StudentFacts, save_student
from proard.nets import extract, fold, load_supernet, save_static, save_supernet
from proard.report.diagnosis import bound_figure, certified_curve, radius_figure
from proard.stages import compare_experiment, diagnose
from proard.stages import report as report_stage

QUICK = {
    "num_images": 6,
    "shares": [0.5, 1],
    "num_steps": 3,
    "restarts": 1,
    "clever": {"num_images": 3, "num_maxima": 10, "num_samples": 2},
    "smoothing": {"num_images": 3, "sigmas": [0.1, 0.3], "num_choose": 20, "num_certify": 60, "alpha": 0.01},
}
NETWORKS = {
    "exported": {"budget": "macs=60K"},
    "trained": {"file": "student.safetensors"},
    "smallest": {"arch": "smallest"},
    "written_out": {"arch": {"depth": [1, 0], "width": [0.5, 1, 1], "expand": [1, 0.5, 0.5, 0]}},
}
TABLES = {"bound": BOUND, "radii": RADII, "summary": SUMMARY}


def config_of(name, **changes):
    networks = [] if name == "teacher" else [{"name": name, **NETWORKS[name]}]
    return tiny_config(diagnose={**QUICK, "networks": networks, **changes})


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A teacher, a supernet, an exported student, a network trained by itself, and images."""
    folder, space = tmp_path_factory.mktemp("inputs"), tiny_space()
    paths = {name: folder / f"{name}.safetensors" for name in ("teacher", "supernet", "exported", "trained")}
    nets = [random_supernet(space, seed=seed, dtype=torch.float32) for seed in range(3)]
    made_by = Provenance("tiny", "test")
    for name, seed, kind in (("teacher", 0, "teacher"), ("trained", 1, "trained_student")):
        net = extract(nets[seed], space.largest)
        save_static(paths[name], net, space=space, arch=space.largest, kind=kind, provenance=made_by)
    save_supernet(paths["supernet"], nets[2], made_by)
    facts = StudentFacts(
        "tiny", "macs=60K", space, space.smallest, ("a", "b", "c"), Threat(), "digits", "none", made_by
    )
    save_student(paths["exported"], fold(extract(nets[2], space.smallest)), facts)
    return paths | save_stripes(folder)


def flags_of(name, files, folder):
    """Files that the rule would name for this network."""
    flags = {"teacher": files["teacher"], "test": files["test"]}
    if "arch" in NETWORKS.get(name, {}):
        flags |= {"supernet": files["supernet"], "train": files["train"]}
    elif name != "teacher":
        flags["weights"] = files[name]
    return flags | {table: folder / f"{table}.parquet" for table in TABLES}


def run_stage(stage, settings, flags):
    words = ["--settings", settings, "--seed", "3", "--device", "cpu", "--threads", "1"]
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    stage.main(words)


def diagnosed(name, files, folder, **changes):
    run_stage(diagnose, job_settings(config_of(name, **changes), "diagnose"), flags_of(name, files, folder))
    return {table: read_table(folder / f"{table}.parquet", columns=columns) for table, columns in TABLES.items()}


@pytest.fixture(scope="module")
def tables(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnose")
    return folder, {name: diagnosed(name, files, folder / name) for name in ("teacher", *NETWORKS)}


@pytest.fixture(scope="module")
def compared(tables) -> Path:
    folder, _ = tables
    read = {"bounds": "bound", "all_radii": "radii", "diagnoses": "summary"}
    flags = {
        flag: [folder / who / f"{table}.parquet" for who in ("teacher", *NETWORKS)] for flag, table in read.items()
    }
    flags |= {"outcomes": [], "budgets": [], "table": folder / "table.parquet"}
    flags |= {name: folder / file for name, file in COMPARED["diagnoses"].items()}
    run_stage(compare_experiment, job_settings(config_of("teacher"), "compare_experiment"), flags)
    return folder


def test_rows_cover_every_image_radius_and_method(tables):
    _, found = tables
    for name, by_table in found.items():
        bound, radii = by_table["bound"], by_table["radii"]
        assert set(bound["network"]) == set(radii["network"]) == {name}
        assert sorted(bound.groupby("eps").size().items()) == [(0.05, 6), (0.1, 6)]
        assert list(bound.loc[bound["eps"] == 0.1, "image"]) == list(range(6))
        counts = radii.groupby(["method", "norm", "sigma"], dropna=False)["image"].apply(list)
        assert len(counts) == 4
        assert all(images == [0, 1, 2] for images in counts)
        assert bound["slack"].min() > -1e-9
        assert (radii["radius"] <= radii["limit"] + 1e-12).all()
        assert (radii.loc[radii["abstained"], "radius"] == 0).all()
        assert not radii.loc[radii["abstained"], "correct"].any()


def test_the_teacher_beside_itself_differs_by_nothing(tables):
    _, found = tables
    bound = found["teacher"]["bound"]
    assert (bound[["loss_gap", "alignment", "left", "gap_l1"]] == 0).all(axis=None)
    np.testing.assert_allclose(bound["right"], 2 * bound["teacher_linearity"])
    other = found["trained"]["bound"]
    assert (other["loss_gap"] > 0).all()
    np.testing.assert_allclose(other["teacher_loss"], bound["teacher_loss"])


def test_the_networks_are_those_that_were_listed(tables, files):
    _, found = tables
    space = tiny_space()
    archs = {"teacher": space.largest, "trained": space.largest, "exported": space.smallest, "smallest": space.smallest}
    for name, arch in archs.items():
        row = found[name]["bound"].iloc[0]
        assert (row["arch_id"], row["macs"], row["params"]) == (
            arch.arch_id,
            space.spec(arch).macs,
            space.spec(arch).params,
        )
    test, config = load_split(files["test"]).first(6), config_of("smallest")
    supernet, checksum = load_supernet(files["supernet"], space)
    conditions = Conditions(config.threat, config.measurement, 3)
    meter = SubnetMeter(supernet, checksum=checksum, train=load_split(files["train"]), conditions=conditions)
    pixels = test.images.permute(0, 3, 1, 2).double() / 255
    logits = diagnose.in_float64(meter.student(space.smallest))(pixels)
    loss = torch.nn.functional.cross_entropy(logits, test.labels, reduction="none")
    rows = found["smallest"]["bound"].query("eps == 0.1")
    np.testing.assert_allclose(rows["student_loss"], loss.numpy(), rtol=1e-6)
    assert list(rows["student_correct"]) == (logits.argmax(1) == test.labels).tolist()


def test_networks_are_computed_in_float64_with_their_own_weights_folded_or_not(files):
    folded = diagnose.load_network(str(files["trained"]), "cpu").net
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for net in (folded, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))):
        logits = diagnose.in_float64(net)(images.double())
        assert logits.dtype is torch.float64
        torch.testing.assert_close(logits.float(), net(images), rtol=1e-4, atol=1e-5)
        assert net(images).dtype is torch.float32
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_a_network_s_rows_are_the_same_every_time_and_for_every_batch_size(files, tables, tmp_path):
    config = config_of("trained").model_copy(
        update={"measurement": config_of("trained").measurement.model_copy(update={"batch_size": 2})}
    )
    run_stage(diagnose, job_settings(config, "diagnose"), flags_of("trained", files, tmp_path))
    before = tables[1]["trained"]
    again = read_table(tmp_path / "bound.parquet")
    pd.testing.assert_frame_equal(again, before["bound"], rtol=1e-4, atol=1e-6)
    clever = [rows[rows["method"] == "clever"] for rows in (read_table(tmp_path / "radii.parquet"), before["radii"])]
    np.testing.assert_allclose(clever[0]["radius"], clever[1]["radius"], rtol=1e-3)


def test_the_summary_averages_the_rows(tables):
    _, found = tables
    bound, radii, summary = (found["trained"][table] for table in TABLES)
    at = summary[(summary["eps"] == 0.1)].set_index("quantity")
    for name in ("loss_gap", "alignment", "right", "left"):
        assert at.loc[name, "value"] == pytest.approx(bound.loc[bound["eps"] == 0.1, name].mean())
        assert at.loc[name, "low"] <= at.loc[name, "value"] <= at.loc[name, "high"]
    assert dict(at["kind"].loc[["alignment", "left", "student_linearity", "student_robust"]]) == {
        "alignment": "exact",
        "left": "lower bound",
        "student_linearity": "lower bound",
        "student_robust": "upper bound",
    }
    smoothed = radii[(radii["method"] == "smoothing") & (radii["sigma"] == 0.1)]
    row = summary[(summary["quantity"] == "smoothing_radius") & (summary["sigma"] == 0.1)].iloc[0]
    assert row["value"] == pytest.approx(smoothed["radius"].where(smoothed["correct"], 0).mean())
    assert (row["kind"], row["num_images"]) == ("certificate", 3)


def test_radii_may_be_left_out(files, tmp_path):
    none = {"num_images": 0}
    found = diagnosed("trained", files, tmp_path, clever=none, smoothing=none)
    assert len(found["radii"]) == 0
    assert len(found["bound"]) == 12
    assert not found["summary"]["quantity"].str.contains("radius").any()
    assert radius_figure(found["radii"]) is None


def test_tables_carry_units_and_provenance(tables, compared):
    folder, _ = tables
    metadata = read_metadata(folder / "exported" / "radii.parquet")
    assert (metadata["stage"], metadata["seed"]) == ("diagnose", 3)
    assert set(metadata["inputs"]) == {"teacher.safetensors", "exported.safetensors", "test.safetensors"}
    assert metadata["units"]["lipschitz"].startswith("logits per pixel unit")
    assert all(read_metadata(compared / "pairs.parquet")["units"].values())


def test_pairs_are_of_students_at_every_radius(compared, tables):
    pairs = read_table(compared / "pairs.parquet", columns=PAIRS)
    assert len(pairs) == 6 * 2
    assert "teacher" not in {*pairs["first"], *pairs["second"]}
    assert set(pairs["gap"]) == {"gap_l1"}
    first, second = (tables[1][name]["bound"].query("eps == 0.1") for name in ("exported", "trained"))
    row = pairs[(pairs["first"] == "exported") & (pairs["second"] == "trained") & (pairs["eps"] == 0.1)].iloc[0]
    assert row["first_only"] == (first["student_robust"] & ~second["student_robust"]).sum()
    nearer = (first["gap_l1"] < second["gap_l1"]) + 0.5 * (first["gap_l1"] == second["gap_l1"])
    assert row["first_nearer"] == pytest.approx(nearer.mean())


def test_figures_stand_alone_and_are_the_same_every_time(compared):
    summary, radii = read_table(compared / "diagnosis.parquet"), read_table(compared / "radii.parquet")
    for name in ("bound", "radius"):
        assert ElementTree.fromstring((compared / f"{name}.svg").read_text()).tag.endswith("svg")
    figure = bound_figure(summary)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(NETWORKS)
    bars = [patch for patch in figure.axes[-1].patches if patch.get_y() < 0.5]  # of the first network, stacked
    expected = summary[(summary["network"] == "exported") & (summary["eps"] == 0.1)].set_index("quantity")["value"]
    assert sum(bar.get_width() for bar in bars) == pytest.approx(expected["right"])
    assert len([axis for axis in radius_figure(radii).axes if axis.get_visible()]) == 4
    assert bound_figure(summary[summary["network"] == "teacher"]) is None


def test_a_curve_counts_images_that_are_right_with_at_least_that_radius():
    rows = pd.DataFrame({"radius": [0.1, 0.3, 0.2, 0.0], "correct": [True, True, False, False], "limit": 0.5})
    grid, share = certified_curve(rows)
    np.testing.assert_allclose(grid, [0, 0.1, 0.3, 0.5])
    np.testing.assert_allclose(share, [0.5, 0.5, 0.25, 0])


def test_the_report_shows_the_diagnosis_where_there_is_one(compared, tmp_path):
    run = SyntheticRun(tmp_path)
    report_stage.main(run.flags())
    page = run.path("report", "report.html")
    assert 'id="diagnosis"' not in page.read_text()
    given = [("diagnosis-summary", "diagnosis"), ("diagnosis-radii", "radii"), ("diagnosis-pairs", "pairs")]
    report_stage.main(
        run.flags() + [word for flag, name in given for word in (f"--{flag}", str(compared / f"{name}.parquet"))]
    )
    section = re.search(r'<section id="diagnosis">.*?</section>', page.read_text(), re.DOTALL).group()
    assert section.count("<svg") == 2
    summary = read_table(compared / "diagnosis.parquet")
    right = summary[(summary["network"] == "trained") & (summary["eps"] == 0.1) & (summary["quantity"] == "right")]
    assert f"{right['value'].iloc[0]:.3f}" in section
    assert section.count("<tr>") == 1 + 5 + 1 + 6


# Errors of users.


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"networks": [{"name": "a"}]}, "diagnose.a: needs one of budget, file and arch; given: none"),
        ({"networks": [{"name": "a", "budget": "macs=1M", "arch": "largest"}]}, "given: budget, arch"),
        ({"networks": [{"name": "teacher", "arch": "largest"}]}, "the name teacher is reserved"),
        ({"networks": [{"name": "a", "arch": "largest"}] * 2}, "different names"),
        ({"shares": [1, 0.5]}, "ascending order"),
        ({"shares": [2]}, "diagnose.shares"),
        ({"clever": {"linf_radius": 8}}, "write 8/255"),
        ({"smoothing": {"alpha": 0.7}}, "less than 0.5"),
    ],
)
def test_settings_that_do_not_fit_are_refused(section, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        load({"run": "a", "diagnose": section})


def test_files_that_do_not_fit_are_named(files, tmp_path):
    settings = job_settings(config_of("trained"), "diagnose")
    flags = flags_of("trained", files, tmp_path)
    with pytest.raises(ConfigError, match=r"diagnose\.trained is read from a file: give --weights"):
        run_stage(diagnose, settings, {name: path for name, path in flags.items() if name != "weights"})
    with pytest.raises(ArtifactError, match=r"supernet\.safetensors holds 'supernet', expected student"):
        run_stage(diagnose, settings, {**flags, "weights": files["supernet"]})
    foreign = tmp_path / "foreign.safetensors"
    save_tensors(foreign, {"x": torch.zeros(2)}, kind="images")
    with pytest.raises(ArtifactError, match=r"foreign\.safetensors holds 'images'"):
        run_stage(diagnose, settings, {**flags, "weights": foreign})
    larger = tiny_space({**TINY, "image_size": 16})
    net = extract(random_supernet(larger, dtype=torch.float32), larger.smallest)
    other = tmp_path / "larger.safetensors"
    save_static(other, net, space=larger, arch=larger.smallest, kind="control", provenance=Provenance("tiny", "test"))
    with pytest.raises(
        ConfigError, match=r"larger\.safetensors is for 1x16x16 images of 3 classes; this run has 1x8x8"
    ):
        run_stage(diagnose, settings, {**flags, "weights": other})


def test_an_arch_outside_the_space_is_refused(files, tmp_path):
    listed = [{"name": "odd", "arch": {"depth": [0, 7], "width": [0.5, 1, 1], "expand": [1, 0, 1, 0]}}]
    config = tiny_config(diagnose={**QUICK, "networks": listed})
    with pytest.raises(ConfigError, match=r"diagnose\.odd\.arch: "):
        run_stage(diagnose, job_settings(config, "diagnose"), flags_of("smallest", files, tmp_path))


def test_diagnoses_of_different_teachers_are_not_paired(files, tables, tmp_path):
    folder, _ = tables
    flags = flags_of("exported", files, tmp_path) | {"teacher": tmp_path / "teacher.safetensors"}
    space = tiny_space()
    net = extract(random_supernet(space, seed=8, dtype=torch.float32), space.largest)
    save_static(
        flags["teacher"], net, space=space, arch=space.largest, kind="teacher", provenance=Provenance("tiny", "test")
    )
    run_stage(diagnose, job_settings(config_of("exported"), "diagnose"), flags)
    with pytest.raises(ArtifactError, match=r"another teacher\.safetensors"):
        compare_experiment.same_images([str(folder / "trained" / "bound.parquet"), str(tmp_path / "bound.parquet")])


def test_settings_of_a_job_name_one_network_and_no_other_stage_hears_of_it():
    config = load({"run": "a", "diagnose": {"networks": [{"name": "x", "arch": "largest"}]}})
    assert len(json.loads(job_settings(config, "diagnose"))["diagnose"]["networks"]) == 1
    plain = load({"run": "a"})
    for stage in ("report", "verify_front", "export_student", "train_phase"):
        assert job_settings(config, stage) == job_settings(plain, stage)
