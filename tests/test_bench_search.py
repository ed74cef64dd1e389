import numpy as np
import pytest

from proard.config import PRESETS
from proard.search import nsga2
from proard.space import SearchSpace


def differences(preset="resnet_cifar", predictor="package"):
    import bench_search

    problem = bench_search.make_problem(SearchSpace(PRESETS[preset]), predictor, seed=0)
    return bench_search.equality(problem, count=60)


@pytest.mark.parametrize("preset", ["resnet_cifar", "resnet_digits"])
def test_loops_and_tables_agree_and_arrays_find_what_pymoos_objects_find(preset):
    import bench_search

    found = differences(preset)
    bench_search.require_equal(found)
    assert found["macs"] == found["encodings"] == found["archives"] == 0
    assert found["predictions"] < 1e-12


def test_published_predictor_passes_too():
    import bench_search

    bench_search.require_equal(differences(predictor="published"))


def test_a_wrong_cost_of_the_last_unit_is_noticed(monkeypatch):
    import bench_search

    costs = SearchSpace.costs
    monkeypatch.setattr(SearchSpace, "costs", lambda self, g: {"macs": costs(self, g)["macs"] + g[:, -1]})
    with pytest.raises(SystemExit, match="macs: 2"):
        bench_search.require_equal(differences(predictor="published"))


def test_a_code_that_keeps_absent_blocks_is_noticed(monkeypatch):
    import bench_search

    def unmasked(self, genotypes):
        canonical = self.canonical(genotypes)
        return np.concatenate([np.eye(count)[canonical[:, i]] for i, count in enumerate(self.choices)], axis=1)

    monkeypatch.setattr(SearchSpace, "features", unmasked)
    with pytest.raises(SystemExit, match="encodings: 1"):
        bench_search.require_equal(differences(predictor="published"))


def test_another_draw_is_noticed(monkeypatch):
    import sys

    import bench_search

    monkeypatch.setattr(sys.modules[nsga2.__module__], "CROSSOVER", 0.95)
    with pytest.raises(SystemExit, match="archives"):
        bench_search.require_equal(differences(predictor="published"))


def test_quality_is_relative_to_the_exact_front():
    import bench_search

    space = SearchSpace(PRESETS["resnet_digits"])
    small, large = bench_search.quality(space, [(10, 5), (100, 40)], seeds=1)
    assert small["archs"] == space.size
    assert 0 < small["last_population"] <= small["archive"] < large["archive"] <= 1 + 1e-12
    assert small["random"] < large["random"] <= 1 + 1e-12
