"""The search space: sizes, costs, genotypes, canonical form, features, sampling of choices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import SMALL_SPACES, TINY, TINY_DEEP, random_archs, random_images, random_supernet, tiny_space
from torch.utils.flop_counter import FlopCounterMode

from proard.config import PRESETS, ConfigError
from proard.nets import extract
from proard.space import Arch, Part, SearchSpace, parse_budget


def preset(name, **changes):
    return SearchSpace(PRESETS[name].model_copy(update=changes))


def cost(space, arch):
    spec = space.spec(arch)
    return spec.params, spec.macs


@pytest.mark.parametrize(
    ("classes", "end", "params", "macs"),
    [
        (10, "largest", 46.08, 2358.0),
        (10, "smallest", 5.22, 285.2),
        (100, "largest", 46.26, 2358.2),
    ],
)
def test_published_space_has_the_published_costs(classes, end, params, macs):
    space = preset("resnet_cifar", classes=classes)
    found_params, found_macs = cost(space, getattr(space, end))
    assert round(found_params / 1e6, 2) == params
    assert round(found_macs / 1e6, 1) == macs


def test_published_space_has_the_published_number_of_choices():
    assert float(f"{preset('resnet_cifar').size:.3e}") == 2.459e12


@pytest.mark.parametrize("name", ["resnet_micro", "resnet_digits"])
def test_small_presets_span_at_least_eightfold_macs(name):
    space = preset(name)
    assert space.spec(space.largest).macs >= 8 * space.spec(space.smallest).macs


@pytest.mark.parametrize("settings", SMALL_SPACES, ids=lambda entry: entry["name"])
@pytest.mark.parametrize("changes", [{}, {"image_size": 7}, {"image_size": 9, "stem": {"channels": 8, "stride": 2}}])
def test_cost_table_equals_the_spelled_out_network(settings, changes):
    space = tiny_space(settings, **changes)
    genotypes = space.sample(30, np.random.default_rng(0))
    genotypes[0], genotypes[1] = space.genotype(space.smallest), space.genotype(space.largest)
    costs = space.costs(genotypes)
    for row, genotype in enumerate(genotypes):
        spec = space.spec(space.arch(genotype))
        assert (costs["macs"][row], costs["params"][row]) == (spec.macs, spec.params)
        whole = Part.whole(spec)
        assert (costs["flash"][row], costs["sram"][row]) == (whole.flash, whole.sram)


def test_cost_table_of_the_presets_equals_the_spelled_out_network():
    for name in PRESETS:
        space = preset(name)
        genotypes = space.sample(20, np.random.default_rng(1))
        specs = [space.spec(space.arch(genotype)) for genotype in genotypes]
        costs = space.costs(genotypes)
        assert costs["macs"].tolist() == [spec.macs for spec in specs]
        assert costs["params"].tolist() == [spec.params for spec in specs]


@pytest.mark.parametrize(
    "space",
    [tiny_space(TINY), tiny_space(TINY_DEEP), tiny_space(TINY_DEEP, image_size=9), preset("resnet_micro")],
    ids=["tiny", "deep", "odd", "micro"],
)
def test_macs_and_params_equal_a_library_counter(space):
    net = random_supernet(space, dtype=torch.float32).eval()
    for arch in [space.smallest, space.largest, *random_archs(space, 4)]:
        static, spec = extract(net, arch), space.spec(arch)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            static(random_images(space, 1, dtype=torch.float32))
        assert counter.get_total_flops() == 2 * spec.macs
        assert sum(parameter.numel() for parameter in static.parameters()) == spec.params


def everything(space):
    return np.asarray(list(itertools.product(*map(range, space.choices))))


@pytest.mark.parametrize(
    "space",
    [
        tiny_space(TINY),
        tiny_space(TINY, depth=[0], expand=[1]),
        tiny_space(TINY_DEEP, units=[{"channels": 16, "blocks": 1}], depth=[0, 1, 2]),
        tiny_space(TINY_DEEP, units=[{"channels": 16, "blocks": 1}], depth=[1]),
    ],
    ids=["tiny", "width_only", "deep", "one_depth"],
)
def test_size_equals_enumeration(space):
    assert len(np.unique(space.canonical(everything(space)), axis=0)) == space.size


@pytest.mark.parametrize("settings", SMALL_SPACES, ids=lambda entry: entry["name"])
def test_decode_of_the_genotype_is_the_arch(settings):
    space = tiny_space(settings)
    for arch in random_archs(space, 50):
        assert space.arch(space.genotype(arch)) == arch
        assert Arch.from_json(arch.to_json()) == arch
        assert Arch.from_json(arch.to_json()).arch_id == arch.arch_id


def test_genes_of_absent_blocks_change_nothing():
    space = tiny_space()
    genotype = np.zeros(len(space.choices), dtype=int)  # depth 0: the second block of both units is absent
    first_expand = space.sections[2].start
    other = genotype.copy()
    other[[first_expand + 1, first_expand + 3]] = 1
    assert space.arch(genotype) == space.arch(other)
    assert space.arch(genotype).arch_id == space.arch(other).arch_id
    both = np.stack([genotype, other])
    assert np.array_equal(*space.canonical(both))
    assert np.array_equal(*space.features(both))
    assert len(set(space.costs(both)["macs"])) == 1
    assert np.array_equal(other[[first_expand + 1, first_expand + 3]], [1, 1]), "the caller's array is changed"


@pytest.mark.parametrize("settings", SMALL_SPACES, ids=lambda entry: entry["name"])
def test_archs_ids_and_features_are_one_to_one(settings):
    space = tiny_space(settings, units=settings["units"][:1])
    genotypes = np.unique(space.canonical(everything(space)), axis=0)
    archs = [space.arch(genotype) for genotype in genotypes]
    assert len({arch.arch_id for arch in archs}) == len(set(archs)) == len(genotypes)
    assert len(np.unique(space.features(genotypes), axis=0)) == len(genotypes)


def test_features_are_one_hot_and_empty_for_absent_blocks():
    space = tiny_space()
    small, large = (space.features(np.asarray([space.genotype(arch)]))[0] for arch in (space.smallest, space.largest))
    assert large.sum() == len(space.choices)
    assert small.sum() == len(space.choices) - 2  # one absent block in each unit
    assert set(np.unique([small, large])) == {0.0, 1.0}


def test_diagonal_runs_from_smallest_to_largest_in_rising_cost():
    space = preset("resnet_digits")
    diagonal = space.diagonal()
    macs = [space.spec(arch).macs for arch in diagonal]
    assert (diagonal[0], diagonal[-1]) == (space.smallest, space.largest)
    assert macs == sorted(set(macs))


def test_open_choices_restrict_samples_and_refuse_strange_values():
    space = preset("resnet_cifar")
    among = space.open_choices(depth=[2], expand=[0.35])
    archs = [space.arch(row) for row in space.sample(40, np.random.default_rng(0), among=among)]
    assert {value for arch in archs for value in arch.depth} == {2}
    assert {value for arch in archs for value in arch.expand} == {0.35}
    assert {value for arch in archs for value in arch.width} == {0.65, 0.8, 1.0}
    with pytest.raises(ValueError, match=r"width \[0.7\].*choices are \[0.65, 0.8, 1.0\]"):
        space.open_choices(width=[0.7])


def test_foreign_arch_is_refused():
    with pytest.raises(ValueError, match="is not of space tiny_deep"):
        tiny_space(TINY_DEEP).genotype(tiny_space(TINY).largest)


def test_budgets_are_read_and_nonsense_is_refused():
    assert parse_budget("macs=150M").limits == {"macs": 150e6}
    assert parse_budget("params=2.5K").limits == {"params": 2500}
    assert parse_budget("flash=1M,latency=0.25s").limits == {"latency": 250, "flash": 1e6}
    for text in (
        "flops=1M",
        "macs=M",
        "macs=1.M",
        "macs=-1M",
        "macs=1m2",
        "macs=0",
        "1e6",
        "macs=1e99",
        "macs=1M ",
        "latency=5",
        "latency=5M",
        "sram=5ms",
        "macs=1M,",
        "macs=1M,macs=2M",
        "latency=1ks",
    ):
        with pytest.raises(ConfigError, match="macs=150M or params=2M"):
            parse_budget(text)
