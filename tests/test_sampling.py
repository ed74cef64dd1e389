"""Which archs are measured, and the table their shards are merged into."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from proard import artifacts
from proard.artifacts import FOOTPRINT, MEASURED, ArtifactError, Provenance
from proard.config import PRESETS, UserError, job_settings, load
from proard.space import SearchSpace
from proard.space.sampling import (
    anchor_archs,
    enumerate_genotypes,
    genotype_blocks,
    identity_columns,
    shard_names,
    stratified_sample,
)
from proard.stages import merge_table, sample_archs

SPACE = SearchSpace(PRESETS["resnet_digits"])
SAMPLED = {"sample_archs": {"num_archs": 40, "strata": 5}, "fit_predictor": {"held_out": 8}}
CONFIG = {"run": "test", "space": "resnet_digits", **SAMPLED}


@pytest.mark.parametrize("preset", ["resnet_digits", "resnet_cifar"])
def test_sample_is_stratified_and_holds_the_anchors(preset):
    space = SearchSpace(PRESETS[preset])
    genotypes, stratum = stratified_sample(space, 60, strata=6, seed=0)
    rows = set(map(tuple, genotypes.tolist()))
    assert len(rows) == 60
    assert {space.genotype(arch) for arch in anchor_archs(space)} <= rows
    assert np.bincount(stratum, minlength=6).tolist() == [10] * 6
    log_macs = np.log(space.costs(genotypes)["macs"])
    edges = np.linspace(log_macs.min(), log_macs.max(), 7)
    np.testing.assert_array_less(log_macs, edges[stratum + 1] + 1e-9)
    np.testing.assert_array_less(edges[stratum] - 1e-9, log_macs)


def test_one_seed_one_sample_and_a_larger_one_contains_it():
    small, _ = stratified_sample(SPACE, 30, strata=5, seed=1)
    again, _ = stratified_sample(SPACE, 30, strata=5, seed=1)
    large, _ = stratified_sample(SPACE, 70, strata=5, seed=1)
    other, _ = stratified_sample(SPACE, 30, strata=5, seed=2)
    np.testing.assert_array_equal(small, again)
    assert set(map(tuple, small)) <= set(map(tuple, large))
    assert not np.array_equal(small, other)


def test_rows_are_shuffled():
    genotypes, _ = stratified_sample(SPACE, 60, strata=6, seed=0)
    log_macs = np.log(SPACE.costs(genotypes)["macs"])
    assert abs(np.corrcoef(np.arange(60), log_macs)[0, 1]) < 0.4


def test_whole_space_can_be_asked_for_and_no_more():
    tiny = SearchSpace(PRESETS["resnet_digits"].model_copy(update={"depth": (0,), "expand": (1.0,)}))
    genotypes, _ = stratified_sample(tiny, tiny.size, strata=4, seed=0)
    assert len(np.unique(genotypes, axis=0)) == tiny.size
    with pytest.raises(UserError, match=f"num_archs is {tiny.size + 1}.* only {tiny.size} archs"):
        stratified_sample(tiny, tiny.size + 1, strata=4, seed=0)
    with pytest.raises(UserError, match="at least 3"):
        stratified_sample(SPACE, 2, strata=2, seed=0)


def test_enumeration_lists_the_space_once():
    genotypes = enumerate_genotypes(SPACE.choices, SPACE.canonical)
    assert len(genotypes) == SPACE.size == len(np.unique(genotypes, axis=0))
    np.testing.assert_array_equal(genotypes, SPACE.canonical(genotypes))


@pytest.mark.parametrize("rows", [2, 37, 10**6])
def test_blocks_are_the_enumeration_cut_to_size_and_refused_branches_are_left_out(rows):
    everything = enumerate_genotypes(SPACE.choices, SPACE.canonical)
    macs = SPACE.costs(everything)["macs"]
    limit = np.quantile(macs, 0.1)
    asked = []

    def cheap(genotypes):
        asked.append(len(genotypes))
        return SPACE.costs(genotypes)["macs"] <= limit

    blocks = list(genotype_blocks(SPACE.choices, SPACE.canonical, keep=cheap, rows=rows))
    assert max(len(block) for block in blocks) <= max(rows, max(SPACE.choices))
    np.testing.assert_array_equal(np.concatenate(blocks), everything[macs <= limit])
    assert sum(asked) < len(everything)
    assert not list(genotype_blocks(SPACE.choices, SPACE.canonical, keep=lambda g: np.zeros(len(g), dtype=bool)))


def test_stage_writes_archs_with_identity(tmp_path):
    archs = run_sample(tmp_path)
    assert len(archs) == 40
    assert archs["arch_id"].is_unique
    assert set(np.unique(archs["stratum"])) == set(range(5))
    costs = SPACE.costs(np.stack(archs["genotype"]))
    np.testing.assert_array_equal(archs["macs"], costs["macs"])
    np.testing.assert_array_equal(archs["params"], costs["params"])
    assert archs[["flash", "sram"]].to_dict("list") == {name: costs[name].tolist() for name in ("flash", "sram")}
    assert archs["latency"].isna().all()  # no device is named
    assert artifacts.read_metadata(tmp_path / "archs.parquet")["stage"] == "sample_archs"


def test_merge_sorts_and_keeps_every_row(tmp_path):
    archs = run_sample(tmp_path)
    table = run_merge(tmp_path, [measured(archs.iloc[20:]), measured(archs.iloc[:20])])
    assert list(table.columns) == list(MEASURED)
    assert table["macs"].is_monotonic_increasing
    assert set(table["arch_id"]) == set(archs["arch_id"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda rows: rows.iloc[1:], "no row for {first}"),
        (lambda rows: pd.concat([rows, rows.iloc[:1]]), "more than one row for {first}"),
        (lambda rows: rows.assign(arch_id=["f" * 12, *rows["arch_id"][1:]]), "no row for {first}"),
        (lambda rows: pd.concat([rows, rows.iloc[:1].assign(arch_id="f" * 12)]), "does not list, ffffffffffff"),
        (lambda rows: rows.assign(eps=[0.1] + [0.2] * (len(rows) - 1)), "different threat models"),
        (lambda rows: rows.iloc[:0], "no row for"),
    ],
)
def test_merge_refuses_an_incomplete_table(tmp_path, damage, message):
    archs = run_sample(tmp_path)
    first = archs["arch_id"].iloc[0]
    with pytest.raises(ArtifactError, match=message.format(first=first)):
        run_merge(tmp_path, [damage(measured(archs.iloc[:20])), measured(archs.iloc[20:])])


def test_merge_refuses_shards_of_two_supernets_or_runs(tmp_path):
    archs = run_sample(tmp_path)
    shards = [measured(archs.iloc[:20]), measured(archs.iloc[20:])]
    one, two = ({"supernet.safetensors": digit * 64} for digit in "12")
    with pytest.raises(ArtifactError, match=r"different supernet\.safetensors"):
        run_merge(tmp_path, shards, inputs=[one, two])
    with pytest.raises(ArtifactError, match="of run 'other'"):
        run_merge(tmp_path, shards, run="other")


def test_shards_of_a_folder_are_found_by_their_rows(tmp_path):
    archs = run_sample(tmp_path)
    for name, rows in zip(shard_names(len(archs), 25), (archs.iloc[:25], archs.iloc[25:]), strict=True):
        path = tmp_path / "evaluate_archs" / name / "table.parquet"
        artifacts.write_table(path, measured(rows), MEASURED, Provenance("test", "evaluate_archs"))
    files = ["--archs", str(tmp_path / "archs.parquet"), "--table", str(tmp_path / "table.parquet")]
    command = ["--settings", job_settings(load(CONFIG), "merge_table"), *files, "--shards", str(path.parents[1])]
    merge_table.main([*command, "--per-shard", "25"])
    assert set(artifacts.read_table(tmp_path / "table.parquet")["arch_id"]) == set(archs["arch_id"])
    with pytest.raises(UserError, match="--per-shard says"):
        merge_table.main(command)
    with pytest.raises(ArtifactError, match=r"0000-0019/table\.parquet is no readable"):
        merge_table.main([*command, "--per-shard", "20"])


def run_sample(folder):
    """Run `sample_archs` and read its table."""
    config = load(CONFIG)
    sample_archs.main(["--settings", job_settings(config, "sample_archs"), "--archs", str(folder / "archs.parquet")])
    return artifacts.read_table(folder / "archs.parquet")


def measured(archs):
    """Rows as `evaluate_archs` writes them, with accuracies that do not matter."""
    rows = archs.drop(columns=["stratum", *FOOTPRINT])
    return rows.assign(split="val", attack="pgd20", norm="linf", eps=8 / 255, clean_acc=0.5, robust_acc=0.25)


def run_merge(folder, shards, *, inputs=({}, {}), run="test"):
    """Write shards, merge them and read the table."""
    paths = [folder / f"shard{index}.parquet" for index in range(len(shards))]
    for path, rows, files in zip(paths, shards, inputs, strict=True):
        provenance = replace(Provenance(run, "evaluate_archs"), inputs=files)
        artifacts.write_table(path, rows, MEASURED, provenance)
    settings = job_settings(load(CONFIG), "merge_table")
    files = ["--archs", str(folder / "archs.parquet"), "--table", str(folder / "table.parquet")]
    merge_table.main(["--settings", settings, "--shards", *map(str, paths), *files])
    return artifacts.read_table(folder / "table.parquet")


def test_identity_columns_name_equal_subnets_alike():
    depth, _, expand = SPACE.sections
    genotypes = np.zeros((2, len(SPACE.choices)), dtype=np.int64)
    genotypes[1, expand.stop - 1] = 1  # a block that depth 0 leaves out
    assert genotypes[1, depth].sum() == 0
    columns = identity_columns(SPACE, genotypes)
    assert columns["arch_id"][0] == columns["arch_id"][1]
    assert columns["genotype"][0] == columns["genotype"][1]
