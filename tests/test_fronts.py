"""Comparison of measured archs of two runs or two searches: hypervolumes by hand, intervals over images, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from export_runs import arguments
from helpers import random_supernet, save_stripes, tiny_config, tiny_space

from proard import predictor
from proard.artifacts import ArtifactError, Provenance, read_metadata, read_table, sha256, write_table
from proard.artifacts.tables import PREDICTED
from proard.cli import main
from proard.config import UserError, searched_costs
from proard.nets import save_supernet
from proard.report.fronts import compare_fronts, compare_searches, compare_tables, sampled_tables
from proard.search import Scale, hypervolume
from proard.space.sampling import identity_columns
from proard.stages import evaluate_archs, sample_archs, search_front, verify_front

SEARCHED = ("archive", "front", "history")
ATTACK = {"num_steps": 2, "step_size": 0.05}
CONFIG = tiny_config(
    sample_archs={"num_archs": 8, "strata": 2},
    fit_predictor={"held_out": 2, "folds": 2},
    evaluate_archs={"archs_per_shard": 3, "num_images": 20, "attack": ATTACK},
    verify_front={"num_archs": 2, "attacks": [{"name": "pgd2", **ATTACK}, {"name": "cw2", "objective": "margin"}]},
)


def measured(macs: list[int], clean: list[int], robust: list[int], **facts: Any) -> pd.DataFrame:
    """Archs that classify the first of a hundred images correctly."""
    clean_masks, robust_masks = ([np.arange(100) < count for count in counts] for counts in (clean, robust))
    accuracies = {"clean_acc": np.divide(clean, 100), "robust_acc": np.divide(robust, 100)}
    frame = pd.DataFrame({"macs": macs, "clean": clean_masks, "robust": robust_masks, **accuracies})
    return frame.assign(num_images=100, **{"image_set": "same", **facts})


def from_masks(clean: np.ndarray, robust: np.ndarray) -> pd.DataFrame:
    """Archs of 1, 2, 3, … MACs with outcomes of shape (archs, images)."""
    facts = {"macs": range(1, len(clean) + 1), "clean": list(clean), "robust": list(robust)}
    accuracies = {"clean_acc": clean.mean(1), "robust_acc": robust.mean(1)}
    return pd.DataFrame({**facts, **accuracies}).assign(num_images=clean.shape[1], image_set="same")


def test_hypervolume_by_hand():
    first, second = measured([1, 3], [60, 80], [20, 40]), measured([2], [80], [40])
    found = compare_fronts(first, second, bootstraps=20)
    # Scaled by clean 60 to 80, robust 20 to 40, MACs 1 to 3: archs at (1, 1, 0) and (0, 0, 1), against (0, 0, 0.5).
    box = 1.1**3
    union = 0.1 * 0.1 * 1.1 + 1.1 * 1.1 * 0.1 - 0.1 * 0.1 * 0.1
    assert found.first.value == pytest.approx(union / box)
    assert found.second.value == pytest.approx(1.1 * 1.1 * 0.6 / box)
    assert found.difference.value == pytest.approx(found.second.value - found.first.value)
    assert found.num_archs == (2, 1)
    for value, low, high in (found.first, found.second, found.difference):
        assert low <= high
        assert np.isfinite([value, low, high]).all()


def test_a_set_against_itself_differs_by_nothing_and_a_better_one_shows():
    rng = np.random.default_rng(0)
    clean, robust = rng.random((2, 4, 500)) < np.array([0.7, 0.4])[:, None, None]
    base = from_masks(clean, robust & clean)
    assert compare_fronts(base, base, bootstraps=50).difference == (0, 0, 0)
    better = from_masks(clean | (np.arange(500) < 60), (robust & clean) | (np.arange(500) < 60))
    found = compare_fronts(base, better, bootstraps=200).difference
    assert 0 < found.low < found.value < found.high


def test_a_difference_of_few_images_is_within_the_interval():
    clean = np.ones((3, 60), bool)
    clean[0, :20] = False
    robust = np.random.default_rng(1).random((3, 60)) < 0.4
    other = robust.copy()
    other[:, :3] = ~other[:, :3]
    found = compare_fronts(from_masks(clean, robust), from_masks(clean, other), bootstraps=400).difference
    assert found.low < 0 < found.high


@pytest.mark.parametrize("facts", [{"image_set": "other"}, {"image_set": None}])
def test_without_outcomes_on_the_same_images_there_is_no_interval(facts):
    found = compare_fronts(measured([1, 3], [5, 6], [5, 6]), measured([2], [5], [5], **facts))
    assert found.difference.value == found.second.value - found.first.value
    assert np.isnan([found.first.low, found.second.high, found.difference.low]).all()


def searched(**points: list[tuple[int, int, int]]) -> pd.DataFrame:
    """Rows of verify_front from a search's (clean, robust, macs)."""
    parts = []
    for name, archs in points.items():
        clean, robust, macs = (list(values) for values in zip(*archs, strict=True))
        parts.append(measured(macs, clean, robust, found_by=name))
    return pd.concat(parts, ignore_index=True).assign(split="test", attack="worst")


def test_two_searches_by_hand_and_one_alone():
    # Scaled to their range, the points are (0, 0, 0) and (1, 1, 1): volumes 1.1^3 and 0.1^3 of a box of 1.1^3.
    (found,) = compare_searches(searched(nsga2=[(80, 50, 10)], random=[(60, 30, 20)]), bootstraps=200)
    assert found.second.value == pytest.approx(1.0)
    assert found.first.value == pytest.approx((0.1 / 1.1) ** 3)
    assert 0 < found.difference.low < found.difference.high
    assert (found.split, found.attack, found.num_images, found.num_archs) == ("test", "worst", 100, (1, 1))
    assert compare_searches(searched(nsga2=[(80, 50, 10)])) == []
    assert compare_searches(searched(random=[(80, 50, 10)])) == []


def test_uniform_scaling_is_compared_with_as_many_archs_of_the_nearest_cost():
    table = searched(
        nsga2=[(60, 30, 10), (70, 35, 80), (72, 36, 20), (75, 40, 1000), (90, 60, 400)],
        random=[(60, 30, 20)],
        uniform=[(50, 20, 12), (55, 25, 90)],
    )
    random, uniform = compare_searches(table, bootstraps=200)
    assert (random.other, uniform.other) == ("random", "uniform")
    assert (random.num_archs, uniform.num_archs) == ((1, 1), (2, 2))
    alone = pd.concat([table[table["found_by"] == "uniform"], table.iloc[[0, 1]]])
    (pair,) = compare_searches(alone, bootstraps=200)
    assert pair.second.value == pytest.approx(uniform.second.value)
    assert pair.first.value == pytest.approx(uniform.first.value)
    # Two comparisons at once: wider intervals.
    assert (pair.comparisons, uniform.comparisons) == (1, 2)
    assert uniform.difference.low < pair.difference.low < pair.difference.high < uniform.difference.high


def test_two_searches_in_two_costs_by_hand():
    table = searched(nsga2=[(80, 50, 10)], random=[(60, 30, 20), (60, 30, 10)]).assign(sram=[100, 200, 300])
    (found,) = compare_searches(table, costs=("macs", "sram"), bootstraps=20)
    # Scaled to their range: (0, 0, 0, 0) of NSGA-II, (1, 1, 1, 0.5) and (1, 1, 0, 1) of random search.
    union = 0.1**2 * (0.1 * 0.6 + 1.1 * 0.1 - 0.1 * 0.1)
    assert found.second.value == pytest.approx(1.0)
    assert found.first.value == pytest.approx(union / 1.1**4)
    assert found.costs == ("macs", "sram")
    assert found.difference.low <= found.difference.value <= found.difference.high


def test_archs_to_verify_are_spread_over_every_cost_of_the_search():
    macs, sram = (values.ravel() for values in np.meshgrid(2 ** np.arange(5), 2 ** np.arange(5)))
    front = pd.DataFrame({"macs": macs, "sram": sram})
    front = pd.concat([front.assign(found_by=name) for name in ("nsga2", "random")], ignore_index=True)
    both = verify_front.pick(front, 5, costs=("macs", "sram"))
    for name in ("nsga2", "random"):
        rows = both[both["found_by"] == name]
        assert rows["macs"].tolist() == rows["sram"].tolist() == [1, 2, 4, 8, 16]
    assert verify_front.pick(front, 5).groupby("found_by")["macs"].apply(list).tolist() == [[1, 2, 4, 8, 16]] * 2
    scaled = pd.DataFrame({"macs": [1, 3, 16], "sram": [1, 3, 16], "found_by": "uniform"})
    three = verify_front.pick(pd.concat([front, scaled], ignore_index=True), 5).groupby("found_by")["macs"].apply(list)
    assert three.tolist() == [[1, 2, 4, 8, 16], [1, 2, 4, 8, 16], [1, 3, 16]]
    two = verify_front.pick(pd.concat([front, scaled], ignore_index=True), 2).groupby("found_by")["macs"].apply(list)
    assert two.tolist() == [[1, 16]] * 3


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


def test_a_search_in_two_costs_is_verified_and_compared_in_both(runs, tmp_path):
    config = tiny_config(
        search_front={"cost": ["params", "sram"], "population": 8, "generations": 2},
        verify_front=CONFIG.verify_front.model_dump(),
    )
    space, folder = tiny_space(), runs[0]
    genotypes = space.sample(30, np.random.default_rng(0))
    accuracies = np.random.default_rng(1).random((30, 2))
    table, files = tmp_path / "table.parquet", {name: tmp_path / f"{name}.parquet" for name in SEARCHED}
    table.write_bytes(b"measured")
    model = predictor.Predictor("ridge", space, space.features(genotypes), accuracies, seed=0)
    made_by = Provenance("tiny", "fit_predictor", inputs={"table.parquet": sha256(table)})
    predictor.save(tmp_path / "predictor.safetensors", model, made_by)
    fitted = {"table": table, "predictor": tmp_path / "predictor.safetensors"}
    search_front.main(arguments("search_front", config, **fitted, **files))
    images = {split: folder / "prepare_data" / f"{split}.safetensors" for split in ("train", "val", "test")}
    supernet = folder / "train_phase" / "all" / "supernet.safetensors"
    verified = tmp_path / "verified.parquet"
    flags = {"supernet": supernet, "front": files["front"], "table": verified, **images}
    verify_front.main(arguments("verify_front", config, **flags))
    rows, front = read_table(verified), read_table(files["front"])
    costs = searched_costs(read_metadata(files["front"])["settings"])
    assert costs == ("params", "sram")
    for name in ("nsga2", "random"):
        measured_archs = set(rows.loc[rows["found_by"] == name, "arch_id"])
        assert len(measured_archs) == config.verify_front.num_archs
        assert measured_archs <= set(front.loc[front["found_by"] == name, "arch_id"])
    found, uniform = compare_searches(rows, costs=costs, bootstraps=50)
    scaled = set(rows.loc[rows["found_by"] == "uniform", "arch_id"])
    assert scaled == {arch.arch_id for arch in space.diagonal()}
    assert uniform.num_archs == (len(scaled), min(len(scaled), config.verify_front.num_archs))
    worst = rows[(rows["split"] == "test") & (rows["attack"] == "worst")]
    points = {name: objectives(worst[worst["found_by"] == name], costs) for name in ("random", "nsga2")}
    scale = Scale.of(np.concatenate(list(points.values())))
    assert found.first.value == pytest.approx(hypervolume(points["random"], scale))
    assert found.second.value == pytest.approx(hypervolume(points["nsga2"], scale))
    assert found.difference.low <= found.difference.high


def objectives(rows: pd.DataFrame, costs: tuple[str, ...]) -> np.ndarray:
    """What is minimised, of shape (archs, 4)."""
    return np.column_stack([-rows["clean_acc"], -rows["robust_acc"], rows[list(costs)]])


def test_outcomes_of_the_table_give_its_accuracies(runs):
    table = read_table(runs[0] / "verify_front" / "front.parquet", columns=["clean", "robust", "image_set"])
    for kind in ("clean", "robust"):
        assert [mask.mean() for mask in table[kind]] == table[f"{kind}_acc"].tolist()
    assert table.groupby("split")["image_set"].nunique().tolist() == [1, 1]
    assert table["image_set"].nunique() == 2
    assert (table["image_set"].str.len() == 64).all()


def test_the_command_prints_both_volumes_and_their_difference(runs, capsys):
    main(["fronts", str(runs[0]), str(runs[1])])
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines() if line.startswith(("test", "val"))]
    assert [line[:2] for line in lines] == [["test", "worst"], ["val", "pgd20"]]
    assert "second minus first" in text
    assert text.count(" to ") >= 10  # intervals of both volumes, their difference and both gains, and the words below


def test_tables_alone_are_compared_split_by_split(runs, capsys):
    tables = [folder / "verify_front" / "front.parquet" for folder in runs]
    found = compare_tables([tables[0]], [tables[1]])
    assert set(zip(found["split"], found["attack"], strict=True)) == {
        (split, attack) for split in ("val", "test") for attack in ("pgd2", "cw2", "worst")
    }
    row = found.query("split == 'test' and attack == 'worst'").iloc[0]
    rows = [read_table(path).query("split == 'test' and attack == 'worst'").drop_duplicates("arch") for path in tables]
    expected = compare_fronts(*rows)
    assert (row["first"], row["first_low"], row["first_high"]) == pytest.approx(expected.first)
    assert (row["difference"], row["difference_low"], row["difference_high"]) == pytest.approx(expected.difference)
    means = [
        read_table(path).query("split == 'test' and attack == 'worst'").groupby("arch_id")["robust_acc"].first()
        for path in tables
    ]
    assert row["paired"] == len(means[0].index.intersection(means[1].index)) > 0
    assert row["robust_gain"] == pytest.approx((means[1] - means[0]).mean())
    assert row["robust_gain_low"] <= row["robust_gain"] <= row["robust_gain_high"]
    main(["fronts", *(str(folder / "evaluate_archs" / "*" / "table.parquet") for folder in runs)])
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("val")]
    assert line[:4] == ["val", "pgd20", "20", "6"]
    assert line[7] == "6"  # archs in both


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


def test_a_run_without_its_tables_is_told_so(runs, tmp_path, capsys):
    with pytest.raises(ArtifactError, match="evaluate_archs"):
        sampled_tables(tmp_path)
    with pytest.raises(SystemExit):
        main(["fronts", str(runs[0]), str(tmp_path)])
    assert "does not exist" in capsys.readouterr().err
