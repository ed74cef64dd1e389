"""Comparison of two runs' measured archs: hypervolumes by hand, intervals over images, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from export_runs import arguments
from helpers import random_supernet, save_stripes, tiny_config, tiny_space

from proard.artifacts import ArtifactError, Provenance, read_table, write_table
from proard.artifacts.tables import PREDICTED
from proard.cli import main
from proard.config import UserError
from proard.nets import save_supernet
from proard.report.fronts import Outcomes, compare_outcomes, compare_tables, sampled_outcomes, verified_outcomes
from proard.space.sampling import identity_columns
from proard.stages import evaluate_archs, sample_archs, verify_front

ATTACK = {"num_steps": 2, "step_size": 0.05}
CONFIG = tiny_config(
    sample_archs={"num_archs": 8, "strata": 2},
    fit_predictor={"held_out": 2, "folds": 2},
    evaluate_archs={"archs_per_shard": 3, "num_images": 20, "attack": ATTACK},
    verify_front={"num_archs": 2, "attacks": [{"name": "pgd2", **ATTACK}, {"name": "cw2", "objective": "margin"}]},
)


def outcomes(macs: list[int], clean: list[int], robust: list[int], **facts: str) -> Outcomes:
    """Archs that classify the first of a hundred images correctly."""
    masks = [np.stack([np.arange(100) < count for count in counts]) for counts in (clean, robust)]
    return Outcomes(np.asarray(macs), *masks, **{"images": "same", "threat": "same", **facts})


def test_hypervolume_by_hand():
    first, second = outcomes([1, 3], [60, 80], [20, 40]), outcomes([2], [80], [40])
    found = compare_outcomes(first, second, bootstraps=20)
    # Scaled by clean 60 to 80, robust 20 to 40, MACs 1 to 3: archs at (1, 1, 0) and (0, 0, 1), against (0, 0, 0.5).
    box = 1.1**3
    union = 0.1 * 0.1 * 1.1 + 1.1 * 1.1 * 0.1 - 0.1 * 0.1 * 0.1
    assert found.first[0] == pytest.approx(union / box)
    assert found.second[0] == pytest.approx(1.1 * 1.1 * 0.6 / box)
    assert found.difference[0] == pytest.approx(found.second[0] - found.first[0])
    assert found.num_archs == (2, 1)
    for value, low, high in (found.first, found.second, found.difference):
        assert low <= high
        assert np.isfinite([value, low, high]).all()


def test_a_run_against_itself_differs_by_nothing_and_a_better_one_shows():
    rng = np.random.default_rng(0)
    clean, robust = rng.random((2, 4, 500)) < np.array([0.7, 0.4])[:, None, None]
    base = Outcomes(np.arange(1, 5), clean, robust & clean, "a", "b")
    same = compare_outcomes(base, base, bootstraps=50)
    assert same.difference == (0, 0, 0)
    better = Outcomes(base.macs, clean | (np.arange(500) < 60), (robust & clean) | (np.arange(500) < 60), "a", "b")
    found = compare_outcomes(base, better, bootstraps=200)
    assert 0 < found.difference[1] < found.difference[0] < found.difference[2]


@pytest.mark.parametrize("what", ["images", "threat"])
def test_runs_that_were_not_measured_alike_are_refused(what):
    with pytest.raises(UserError, match="measured with different"):
        compare_outcomes(outcomes([1], [5], [5]), outcomes([1], [5], [5], **{what: "other"}))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two runs of random supernets that were verified and sampled."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        data = folder / "prepare_data"
        images = save_stripes(data)
        supernet, front = folder / "train_phase" / "all" / "supernet.safetensors", folder / "search_front.parquet"
        space = tiny_space()
        save_supernet(
            supernet, random_supernet(space, seed=seed, dtype=torch.float32), Provenance("tiny", "train_phase")
        )
        genotypes = np.unique(space.sample(6, np.random.default_rng(3)), axis=0)
        scores = np.linspace(0, 1, len(genotypes))
        columns = {**identity_columns(space, genotypes), "predicted_clean_acc": scores, "predicted_robust_acc": scores}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        rows = [{**row, "found_by": name} for row in rows for name in ("nsga2", "random")]
        write_table(front, rows, PREDICTED, Provenance("tiny", "search_front"))
        shared = {"supernet": supernet, "train": images["train"], "val": images["val"], "cache": folder / "cache"}
        table = folder / "verify_front" / "front.parquet"
        verify_front.main(arguments("verify_front", CONFIG, front=front, test=images["test"], table=table, **shared))
        archs = folder / "archs.parquet"
        sample_archs.main(arguments("sample_archs", CONFIG, archs=archs))
        for shard in ("0000-0002", "0003-0005"):
            table = folder / "evaluate_archs" / shard / "table.parquet"
            evaluate_archs.main(arguments("evaluate_archs", CONFIG, archs=archs, shard=shard, table=table, **shared))
    return folders


def test_outcomes_are_those_of_the_tables_and_come_from_the_cache(runs):
    cached = {path: path.stat().st_mtime_ns for path in (runs[0] / "cache").rglob("*.json")}
    verified, sampled = verified_outcomes(runs[0]), sampled_outcomes(runs[0])
    assert {path: path.stat().st_mtime_ns for path in (runs[0] / "cache").rglob("*.json")} == cached
    table = read_table(runs[0] / "verify_front" / "front.parquet").query("split == 'test' and attack == 'worst'")
    table = table.drop_duplicates("arch")
    assert verified.macs.tolist() == table["macs"].tolist()
    assert verified.robust.mean(1).tolist() == table["robust_acc"].tolist()
    assert verified.clean.mean(1).tolist() == table["clean_acc"].tolist()
    assert sampled.clean.shape == (6, 20)


def test_the_command_prints_both_volumes_and_their_difference(runs, capsys):
    main(["fronts", str(runs[0]), str(runs[1])])
    text = capsys.readouterr().out
    assert "verified fronts, test, all attacks" in text
    assert "sampled, val" in text
    assert "second minus first" in text


def test_tables_alone_are_compared_split_by_split(runs, capsys):
    tables = [folder / "verify_front" / "front.parquet" for folder in runs]
    found = compare_tables([tables[0]], [tables[1]])
    assert set(zip(found["split"], found["attack"], strict=True)) == {
        (split, attack) for split in ("val", "test") for attack in ("pgd2", "cw2", "worst")
    }
    row = found.query("split == 'test' and attack == 'worst'").iloc[0]
    outcomes = [verified_outcomes(folder) for folder in runs]
    expected = compare_outcomes(*outcomes, bootstraps=2)
    assert row["first"] == pytest.approx(expected.first[0])
    assert row["second"] == pytest.approx(expected.second[0])
    means = [
        read_table(path).query("split == 'test' and attack == 'worst'").groupby("arch_id")["robust_acc"].first()
        for path in tables
    ]
    assert row["paired"] == len(means[0].index.intersection(means[1].index)) > 0
    assert row["robust_gain"] == pytest.approx((means[1] - means[0]).mean())
    main(["fronts", *(str(folder / "evaluate_archs" / "*" / "table.parquet") for folder in runs)])
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("val")]
    assert line[:4] == ["val", "pgd20", "20", "6"]
    assert line[6] == "6"


def test_tables_that_are_missing_or_measured_otherwise_are_refused(runs, tmp_path, capsys):
    table = runs[0] / "verify_front" / "front.parquet"
    with pytest.raises(SystemExit):
        main(["fronts", str(table), str(tmp_path / "no*.parquet")])
    assert "there is no table" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["fronts", str(runs[0]), str(table)])
    assert "name two runs or two tables" in capsys.readouterr().err
    sampled = runs[1] / "evaluate_archs" / "0000-0002" / "table.parquet"  # under another attack
    with pytest.raises(UserError, match="measured alike"):
        compare_tables([table], [sampled])


def test_a_run_without_its_supernet_or_tables_is_told_so(runs, tmp_path, capsys):
    with pytest.raises(ArtifactError, match="evaluate_archs"):
        sampled_outcomes(tmp_path)
    with pytest.raises(SystemExit):
        main(["fronts", str(runs[0]), str(tmp_path)])
    assert "does not exist" in capsys.readouterr().err
    other = tmp_path / "verify_front"
    other.mkdir()
    (other / "front.parquet").write_bytes((runs[0] / "verify_front" / "front.parquet").read_bytes())
    with pytest.raises(ArtifactError, match="no supernet that its tables were measured on"):
        verified_outcomes(tmp_path)
