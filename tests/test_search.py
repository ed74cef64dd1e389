"""NSGA-II and random search: same seed, same archive; nothing evaluated twice; the limit kept."""

from __future__ import annotations

import numpy as np
import pytest
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from proard import artifacts, predictor, search
from proard.artifacts import ArtifactError, Provenance
from proard.config import PRESETS, UserError, job_settings, load
from proard.search import Scale
from proard.space import SearchSpace
from proard.space.sampling import anchor_archs, enumerate_genotypes, stratified_sample
from proard.stages import search_front

SPACE = SearchSpace(PRESETS["resnet_micro"])
BUDGET = {"population": 40, "generations": 15}


def predict(genotypes):
    """A separable problem: each gene's choice adds to both accuracies, with weights of its own."""
    weights = np.random.default_rng(3).normal(0, 1, (sum(SPACE.choices), 2))
    return 1 / (1 + np.exp(-0.3 * (SPACE.features(genotypes) @ weights)))


def cost(genotypes):
    """MACs, of shape (n, 1)."""
    return SPACE.costs(genotypes)["macs"][:, None]


PROBLEM = (predict, cost, SPACE.choices, SPACE.canonical)


def run_both(*, seed=0, **settings):
    """NSGA-II, and random search at as many evaluations."""
    nsga2 = search.nsga2(*PROBLEM, **{**BUDGET, **settings}, seed=seed)
    per_generation = np.bincount(nsga2.generations)[1:]
    return nsga2, search.random(*PROBLEM, generations=per_generation, max_cost=settings.get("max_cost"), seed=seed)


def test_one_seed_one_archive():
    for first, again, other in zip(run_both(), run_both(), run_both(seed=1), strict=True):
        np.testing.assert_array_equal(first.genotypes, again.genotypes)
        np.testing.assert_array_equal(first.accuracies, again.accuracies)
        assert not np.array_equal(first.genotypes, other.genotypes)


def test_no_arch_is_evaluated_twice_and_populations_go_in_whole():
    calls = []

    def counting(genotypes):
        calls.append(np.array(genotypes))
        return predict(genotypes)

    archive = search.nsga2(counting, *PROBLEM[1:], **BUDGET, seed=0)
    evaluated = np.concatenate(calls)
    assert [len(call) for call in calls] == [BUDGET["population"]] * BUDGET["generations"]
    assert len(np.unique(SPACE.canonical(evaluated), axis=0)) == len(evaluated) == len(archive)
    np.testing.assert_array_equal(archive.genotypes, SPACE.canonical(archive.genotypes))


def test_both_searches_evaluate_equally_many():
    nsga2, random = run_both()
    assert len(nsga2) == len(random) == 600
    np.testing.assert_array_equal(np.bincount(nsga2.generations), np.bincount(random.generations))


@pytest.mark.parametrize("seed", [0, 1])
def test_nsga2_dominates_more_than_random(seed):
    nsga2, random = run_both(seed=seed)
    whole = search.exhaustive(*PROBLEM, up_to=SPACE.size)
    rows = search.history({"nsga2": nsga2, "random": random}, cost_names=["macs"], seed=seed, exhaustive=whole)
    curves = {name: [row["hypervolume"] for row in rows if row["search"] == name] for name in ("nsga2", "random")}
    assert all(np.diff(curve).min() >= 0 for curve in curves.values())
    best = rows[0]["exhaustive_hypervolume"]
    assert curves["random"][-1] < curves["nsga2"][-1] <= best
    assert all(row["relative_hypervolume"] == pytest.approx(row["hypervolume"] / best) for row in rows)


@pytest.mark.parametrize("factor", [1.0, 1.1, 3.0])
def test_cost_limit_is_kept(factor):
    smallest = cost(np.zeros((1, len(SPACE.choices)), dtype=np.int64))[0, 0]
    nsga2, random = run_both(max_cost=[factor * smallest], generations=5)
    assert nsga2.costs.max() <= factor * smallest
    assert random.costs.max() <= factor * smallest
    assert len(nsga2) == len(random) >= 1


def test_limit_below_the_smallest_arch_names_it():
    smallest = cost(np.zeros((1, len(SPACE.choices)), dtype=np.int64))[0, 0]
    with pytest.raises(UserError, match=f"smallest feasible cost is {smallest}$"):
        search.nsga2(*PROBLEM, **BUDGET, max_cost=[smallest - 1], seed=0)


def test_a_space_smaller_than_the_budget_is_searched_nearly_in_full():
    space = SearchSpace(PRESETS["resnet_digits"].model_copy(update={"depth": (0,), "expand": (0.5, 1.0)}))

    def flat(genotypes):
        return np.full((len(genotypes), 2), 0.5)

    archive = search.nsga2(
        flat,
        lambda genotypes: space.costs(genotypes)["macs"][:, None],
        space.choices,
        space.canonical,
        **BUDGET,
        seed=0,
    )
    assert 0.95 * space.size <= len(archive) <= space.size


@pytest.mark.parametrize("factor", [None, 2.0])
def test_exhaustive_front_is_that_of_all_affordable_archs(factor):
    genotypes = enumerate_genotypes(SPACE.choices, SPACE.canonical)
    limit = None if factor is None else [factor * cost(genotypes).min()]
    genotypes = genotypes if limit is None else genotypes[cost(genotypes)[:, 0] <= limit]
    objectives = np.column_stack([-predict(genotypes), cost(genotypes)])
    blocks = []
    whole = search.exhaustive(*PROBLEM, up_to=len(genotypes), max_cost=limit, on_block=lambda *b: blocks.append(b))
    assert whole.size == len(genotypes) == sum(archs for archs, _ in blocks)
    expected = NonDominatedSorting().do(objectives, only_non_dominated_front=True)
    np.testing.assert_array_equal(sorted_rows(whole.front.genotypes), sorted_rows(genotypes[expected]))
    np.testing.assert_allclose(whole.front.objectives, objectives[find(genotypes, whole.front.genotypes)], rtol=1e-12)
    assert whole.scale == Scale.of(objectives)


def test_a_space_too_large_is_not_enumerated_and_nothing_is_predicted():
    def forbidden(genotypes):
        raise AssertionError("predicted before the archs were counted")

    problem = (forbidden, *PROBLEM[1:])
    assert search.exhaustive(*problem, up_to=SPACE.size - 1) is None
    smallest = cost(np.zeros((1, len(SPACE.choices)), dtype=np.int64))[0, 0]
    assert search.exhaustive(*problem, up_to=SPACE.size, max_cost=[smallest - 1]) is None
    large = SearchSpace(PRESETS["resnet_cifar"])
    args = (forbidden, lambda genotypes: large.costs(genotypes)["macs"][:, None], large.choices, large.canonical)
    assert search.exhaustive(*args, up_to=100_000) is None


@pytest.mark.parametrize("ties", [False, True])
def test_front_merged_block_by_block_is_pymoos(ties):
    objectives = np.random.default_rng(0).normal(size=(2**12, 3))
    if ties:
        objectives = np.floor(2 * np.abs(objectives))
        objectives[objectives.sum(axis=1) < 4] += 10
    blocks, places = [], 2 ** np.arange(12)
    how = {"up_to": len(objectives), "rows": 600, "on_block": lambda archs, size: blocks.append(archs)}
    predict, cost = (lambda rows: -objectives[rows @ places, :2]), (lambda rows: objectives[rows @ places, 2:])
    found = search.exhaustive(predict, cost, [2] * 12, lambda genotypes: genotypes, **how)
    assert len(blocks) > 5
    front, *_ = NonDominatedSorting().do(objectives)
    assert sorted(found.front.genotypes @ places) == sorted(front)
    assert ties is (len(np.unique(objectives[front], axis=0)) < len(front))


def test_non_dominated_and_hypervolume_by_hand():
    points = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [0.6, 0.6], [0.0, 1.0]])
    assert search.non_dominated(points).tolist() == [0, 1, 2, 4]
    scale = Scale(best=(0.0, 0.0), worst=(1.0, 1.0), reference=1.0)
    assert search.hypervolume(points, scale) == pytest.approx(0.25)
    stretched = Scale(best=(0.0, 0.0), worst=(10.0, 1.0), reference=1.0)
    assert search.hypervolume(points * [10, 1], stretched) == pytest.approx(0.25)


# clean and robust accuracy, MACs, sram; what dominates the arch
BY_HAND = {
    "cheap in MACs": (0.8, 0.5, 10, 40),
    "more memory, else equal": (0.8, 0.5, 10, 50),  # "cheap in MACs"
    "small in memory": (0.8, 0.5, 12, 30),
    "less clean, else equal": (0.7, 0.5, 12, 30),  # "small in memory"
    "more of both costs": (0.8, 0.5, 12, 40),  # "cheap in MACs", "small in memory"
    "clean": (0.9, 0.4, 20, 60),
    "robust": (0.7, 0.6, 20, 60),
}
FRONTS = {  # of four objectives; without sram "small in memory" only costs more
    (2, 3): ["cheap in MACs", "small in memory", "clean", "robust"],
    (2,): ["cheap in MACs", "more memory, else equal", "clean", "robust"],
    (3,): ["small in memory", "clean", "robust"],
}


@pytest.mark.parametrize("columns", FRONTS)
def test_dominance_in_one_cost_and_in_two_by_hand(columns):
    values = np.asarray(list(BY_HAND.values()))
    problem = (
        lambda genotypes: values[genotypes[:, 0], :2],
        lambda genotypes: values[genotypes[:, 0]][:, list(columns)],
        [len(values)],
        lambda genotypes: genotypes,
    )
    front = search.exhaustive(*problem, up_to=len(values)).front
    assert [list(BY_HAND)[gene] for (gene,) in front.genotypes] == FRONTS[columns]
    everything = search.nsga2(*problem, population=4, generations=3)
    assert len(everything) == len(values)
    found = everything.genotypes[search.non_dominated(everything.objectives), 0]
    assert sorted(list(BY_HAND)[gene] for gene in found) == sorted(FRONTS[columns])
    np.testing.assert_array_equal(
        everything.objectives, (values * [-1, -1, 1, 1])[everything.genotypes[:, 0]][:, [0, 1, *columns]]
    )


def test_hypervolume_in_four_objectives_by_hand():
    scale = Scale(best=(0.0,) * 4, worst=(1.0,) * 4, reference=1.0)
    first, second = [0.5, 0.5, 0.5, 0.0], [0.0, 0.5, 0.5, 0.5]
    assert search.hypervolume(np.array([first]), scale) == pytest.approx(0.5**3)
    assert search.hypervolume(np.array([first, second]), scale) == pytest.approx(2 * 0.5**3 - 0.5**4)


def two_costs(genotypes):
    """MACs and sram."""
    costs = SPACE.costs(genotypes)
    return np.column_stack([costs["macs"], costs["sram"]])


def test_with_two_costs_the_limit_of_one_is_kept_and_the_other_is_free():
    smallest, largest = two_costs(np.asarray([SPACE.genotype(SPACE.smallest), SPACE.genotype(SPACE.largest)]))
    problem, limits = (predict, two_costs, SPACE.choices, SPACE.canonical), [2 * smallest[0], np.inf]
    found = search.nsga2(*problem, population=20, generations=5, max_cost=limits, seed=0)
    random = search.random(*problem, generations=[20] * 5, max_cost=limits, seed=0)
    whole = search.exhaustive(*problem, up_to=SPACE.size, max_cost=limits)
    for archive in (found, random, whole.front):
        assert archive.costs[:, 0].max() <= limits[0]
    assert len(found) == len(random) == 100
    assert max(found.costs[:, 1].max(), random.costs[:, 1].max()) == largest[1] > smallest[1]
    with pytest.raises(UserError, match=f"smallest feasible cost is {smallest[1]}$"):
        search.nsga2(*problem, **BUDGET, max_cost=[np.inf, smallest[1] - 1])


def test_history_after_a_generation_counts_the_archive_so_far():
    nsga2, random = run_both()
    rows = search.history({"nsga2": nsga2, "random": random}, cost_names=["macs"], seed=0)
    scale = Scale.of(np.concatenate([nsga2.objectives, random.objectives]))
    for row in (rows[4], rows[14]):
        so_far = nsga2.objectives[nsga2.generations <= row["generation"]]
        assert row["evaluations"] == len(so_far)
        assert row["hypervolume"] == pytest.approx(search.hypervolume(so_far, scale))


def test_stage_writes_archive_front_and_history(tmp_path):
    write_predictor(tmp_path)
    archive, front, history = run_stage(tmp_path)
    counts = archive["found_by"].value_counts()
    assert counts["nsga2"] == counts["random"] == 60
    anchors = archive[archive["found_by"] == "anchor"]
    assert set(anchors["arch_id"]) == {arch.arch_id for arch in anchor_archs(SPACE)}
    assert not archive.duplicated(["arch_id", "found_by"]).any()
    for name in ("nsga2", "random"):
        mine, best = archive[archive["found_by"] == name], front[front["found_by"] == name]
        rows = mine[["predicted_clean_acc", "predicted_robust_acc", "macs"]].to_numpy() * [-1, -1, 1]
        assert set(best["arch_id"]) == set(mine["arch_id"].iloc[search.non_dominated(rows)])
        assert history[history["search"] == name]["evaluations"].tolist() == [20, 40, 60]
    exact = archive[archive["found_by"] == "exhaustive"]
    assert set(exact["arch_id"]) == set(front.loc[front["found_by"] == "exhaustive", "arch_id"])
    rows = exact[["predicted_clean_acc", "predicted_robust_acc", "macs"]].to_numpy() * [-1, -1, 1]
    assert len(search.non_dominated(rows)) == len(exact) > 0
    assert 0 < history["relative_hypervolume"].min() <= history["relative_hypervolume"].max() <= 1


def test_stage_with_two_costs(tmp_path):
    write_predictor(tmp_path)
    limit = 6_000_000
    archive, front, history = run_stage(tmp_path, cost=["macs", "sram"], max_cost=[limit, None])
    columns = ["predicted_clean_acc", "predicted_robust_acc", "macs", "sram"]
    exact = archive[archive["found_by"] == "exhaustive"]
    volumes = {}
    for name in ("nsga2", "random", "exhaustive"):
        mine, best = archive[archive["found_by"] == name], front[front["found_by"] == name]
        objectives = mine[columns].to_numpy() * [-1, -1, 1, 1]
        assert set(best["arch_id"]) == set(mine["arch_id"].iloc[search.non_dominated(objectives)])
        assert best["macs"].max() <= limit
        assert best["macs"].is_monotonic_increasing
        volumes[name] = objectives
    scaled = front[front["found_by"] == "uniform"]
    small = [arch.arch_id for arch in SPACE.diagonal() if SPACE.spec(arch).macs <= limit]
    assert scaled["arch_id"].tolist() == small
    assert 0 < len(small) < len(SPACE.diagonal())
    in_macs_alone = search.non_dominated(volumes["exhaustive"][:, :3])
    assert len(in_macs_alone) < len(exact)  # some archs are on the front for their memory only
    whole = history.iloc[0]
    assert (whole["cost"], whole["second_cost"]) == ("macs", "sram")
    assert (whole["cost_worst"], whole["cost_best"]) >= (exact["macs"].max(), exact["macs"].min())
    assert whole["second_cost_best"] <= exact["sram"].min() < exact["sram"].max() <= whole["second_cost_worst"]
    ends = [[-whole["clean_acc_best"], -whole["robust_acc_best"], whole["cost_best"], whole["second_cost_best"]]]
    ends += [[-whole["clean_acc_worst"], -whole["robust_acc_worst"], whole["cost_worst"], whole["second_cost_worst"]]]
    scale = Scale(*(tuple(end) for end in ends))
    for name in ("nsga2", "random"):
        last = history[history["search"] == name].iloc[-1]
        assert last["evaluations"] == 60
        assert last["hypervolume"] == pytest.approx(search.hypervolume(volumes[name], scale))
        assert 0 < last["relative_hypervolume"] < 1
    smallest = SPACE.tables.cheapest("sram")
    assert archive.loc[archive["found_by"] == "anchor", "sram"].min() == SPACE.costs(smallest[None])["sram"][0]


def test_one_cost_in_a_list_is_that_cost_alone(tmp_path):
    write_predictor(tmp_path)
    alone, listed = (list(run_stage(tmp_path, cost=cost, enumerate_up_to=0)) for cost in ("flash", ["flash"]))
    for frame, other in zip(alone, listed, strict=True):
        assert frame.equals(other)
    assert listed[2]["second_cost"].isna().all()


def test_stage_leaves_enumeration_out_where_it_is_told_to(tmp_path):
    write_predictor(tmp_path)
    archive, front, history = run_stage(tmp_path, enumerate_up_to=0)
    assert set(archive["found_by"]) == {"nsga2", "random", "anchor"}
    assert set(front["found_by"]) == {"nsga2", "random", "uniform"}
    assert history[["exhaustive_hypervolume", "relative_hypervolume"]].isna().all(axis=None)


def test_stage_refuses_a_predictor_of_another_table_or_space(tmp_path):
    write_predictor(tmp_path)
    with pytest.raises(ArtifactError, match="another space"):
        run_stage(tmp_path, space="resnet_cifar")
    (tmp_path / "table.parquet").write_bytes(b"measured again")
    with pytest.raises(ArtifactError, match="was not fitted on"):
        run_stage(tmp_path)


def sorted_rows(genotypes):
    """In lexicographic order."""
    return genotypes[np.lexsort(genotypes.T[::-1])]


def find(genotypes, wanted):
    """Row of each wanted genotype."""
    rows = {genotype.tobytes(): row for row, genotype in enumerate(genotypes)}
    return [rows[genotype.tobytes()] for genotype in wanted]


def write_predictor(folder):
    """Write a predictor and the file that stands for its table."""
    (folder / "table.parquet").write_bytes(b"measured")
    genotypes, _ = stratified_sample(SPACE, 40, strata=4, seed=0)
    model = predictor.Predictor("ridge", SPACE, SPACE.features(genotypes), predict(genotypes), seed=0)
    inputs = {"table.parquet": artifacts.sha256(folder / "table.parquet")}
    predictor.save(folder / "predictor.safetensors", model, Provenance("test", "fit_predictor", inputs=inputs))


def run_stage(folder, space="resnet_micro", **settings):
    """Run `search_front` and read its tables."""
    settings = {"population": 20, "generations": 3, **settings}
    config = load({"run": "test", "space": space, "search_front": settings})
    files = {name: str(folder / f"{name}.parquet") for name in ("table", "archive", "front", "history")}
    flags = [part for name, path in files.items() for part in (f"--{name}", path)]
    flags += ["--predictor", str(folder / "predictor.safetensors"), "--threads", "1"]
    search_front.main(["--settings", job_settings(config, "search_front"), *flags])
    return (artifacts.read_table(files[name]) for name in ("archive", "front", "history"))
