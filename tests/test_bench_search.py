import numpy as np
import pytest

from proard.config import PRESETS
from proard.space import SearchSpace


def differences(preset="resnet_cifar", predictor="package", space=SearchSpace, **how):
    import bench_search

    problem = bench_search.make_problem(space(PRESETS[preset]), predictor, seed=0)
    return bench_search.equality(problem, count=60, **how)


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


class WrongCosts(SearchSpace):
    def costs(self, genotypes):
        return {"macs": super().costs(genotypes)["macs"] + genotypes[:, -1]}


class Unmasked(SearchSpace):
    def features(self, genotypes):
        canonical = self.canonical(genotypes)
        return np.concatenate([np.eye(count)[canonical[:, i]] for i, count in enumerate(self.choices)], axis=1)


@pytest.mark.parametrize(
    ("how", "named"),
    [({"space": WrongCosts}, "macs: 2"), ({"space": Unmasked}, "encodings: 1"), ({"again": 1}, "archives")],
    ids=["cost of the last unit", "code of absent blocks", "another draw"],
)
def test_a_wrong_table_or_search_is_noticed(how, named):
    import bench_search

    with pytest.raises(SystemExit, match=named):
        bench_search.require_equal(differences(predictor="published", **how))


def test_quality_is_relative_to_the_exact_front():
    import bench_search

    space = SearchSpace(PRESETS["resnet_digits"])
    small, large = bench_search.quality(space, [(10, 5), (100, 40)], seeds=1)
    assert small["archs"] == space.size
    assert 0 < small["last_population"] <= small["archive"] < large["archive"] <= 1 + 1e-12
    assert small["random"] < large["random"] <= 1 + 1e-12
