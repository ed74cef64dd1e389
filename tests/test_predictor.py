"""The predictor ranks archs it has not seen, and its file gives the same predictions again."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from proard import artifacts, predictor
from proard.artifacts import MEASURED, ArtifactError, Provenance
from proard.config import PRESETS, FitPredictor, UserError, job_settings, load
from proard.predictor.estimators import GaussianProcess
from proard.predictor.quality import bootstrap_interval, kendall_tau, noise_ceiling, spearman
from proard.space import SearchSpace
from proard.space.sampling import identity_columns, stratified_sample
from proard.stages import fit_predictor

SPACE = SearchSpace(PRESETS["resnet_digits"])
MODELS = ("ridge", "gp", "forest", "boosting", "mlp")
QUICK = FitPredictor(models=("ridge", "gp"), held_out=20, folds=3, bootstraps=20)


def accuracies(genotypes):
    """Clean and robust accuracy that add up over genes, of shape (n, 2); robust is flatter and has other weights."""
    features = SPACE.features(genotypes)
    rises = np.concatenate([np.arange(1, count + 1) / count for count in SPACE.choices])
    weights = rises[:, None] * np.random.default_rng(5).uniform(0.5, 1.5, (len(rises), 2))
    return np.array([0.6, 0.3]) + np.array([0.03, 0.02]) * (features @ weights - 6)


def labelled(count, *, noise=0.0, seed=0):
    """Genotypes, targets and targets on image halves, with independent noise on each half."""
    genotypes, _ = stratified_sample(SPACE, count, strata=8, seed=seed)
    halves = accuracies(genotypes)[:, :, None] + np.random.default_rng(seed).normal(0, noise, (count, 2, 2))
    return genotypes, halves.mean(axis=2), halves


@pytest.mark.parametrize("model", MODELS)
def test_every_model_ranks_an_additive_function(model):
    genotypes, targets, _ = labelled(100)
    settings = FitPredictor(models=(model,), held_out=30, folds=2, bootstraps=5)
    fit = predictor.fit(genotypes, targets, SPACE, settings, seed=0)
    least = 0.7 if model == "forest" else 0.85
    assert all(row["kendall_tau"] > least for row in fit.quality)


def test_chosen_model_recovers_an_additive_function():
    genotypes, targets, _ = labelled(120)
    fit = predictor.fit(genotypes, targets, SPACE, QUICK, seed=0)
    chosen = [row for row in fit.quality if row["chosen"]]
    assert {row["model"] for row in chosen} == {fit.predictor.name}
    assert all(row["kendall_tau"] > 0.9 for row in chosen)
    unseen = SPACE.sample(200, np.random.default_rng(9))
    for column in range(2):
        found = predictor.kendall_tau(fit.predictor.predict(unseen)[:, column], accuracies(unseen)[:, column])
        assert found > 0.9


def test_best_cross_validated_tau_is_chosen():
    genotypes, targets, _ = labelled(80, noise=0.01)
    fit = predictor.fit(genotypes, targets, SPACE, QUICK, seed=0)
    robust = {row["model"]: row for row in fit.quality if row["target"] == "robust_acc"}
    assert fit.predictor.name == max(robust, key=lambda name: robust[name]["cv_tau"])


@pytest.mark.parametrize("model", MODELS)
def test_genes_of_absent_blocks_do_not_matter(model):
    genotypes, targets, _ = labelled(40)
    fitted = predictor.Predictor(model, SPACE, SPACE.features(genotypes), targets, seed=0)
    shallow = np.zeros((2, len(SPACE.choices)), dtype=np.int64)
    shallow[1, -1] = 1  # the last block of a unit at depth 0
    first, second = fitted.predict(shallow)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("model", MODELS)
def test_matrix_products_predict_what_the_pipeline_does(model):
    genotypes, targets, _ = labelled(40, noise=0.02)
    fitted = predictor.Predictor(model, SPACE, SPACE.features(genotypes), targets, seed=2)
    unseen = SPACE.features(SPACE.sample(200, np.random.default_rng(1)))
    expected = fitted.pipeline.predict(unseen)
    assert np.ptp(expected, axis=0).min() > 0.01
    np.testing.assert_allclose(fitted.dense(unseen), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_loading_gives_equal_predictions(tmp_path, model):
    genotypes, targets, _ = labelled(40, noise=0.02)
    saved = predictor.Predictor(model, SPACE, SPACE.features(genotypes), targets, seed=3)
    predictor.save(tmp_path / "predictor.safetensors", saved)
    loaded = predictor.load(tmp_path / "predictor.safetensors")
    unseen = SPACE.sample(50, np.random.default_rng(1))
    assert loaded.name == model
    assert loaded.space.settings == SPACE.settings
    np.testing.assert_array_equal(loaded.predict(unseen), saved.predict(unseen))


def test_a_predictor_that_cannot_be_reproduced_is_refused(tmp_path):
    genotypes, targets, _ = labelled(40, noise=0.02)
    saved = predictor.Predictor("boosting", SPACE, SPACE.features(genotypes), targets, seed=3)
    saved.name = "ridge"  # whose predictions are others
    predictor.save(tmp_path / "predictor.safetensors", saved)
    with pytest.raises(ArtifactError, match="rerun fit_predictor"):
        predictor.load(tmp_path / "predictor.safetensors")


def test_predictions_are_fractions():
    genotypes, targets, _ = labelled(40)
    extreme = np.where(targets > np.median(targets, axis=0), 1.0, 0.0)
    fitted = predictor.Predictor("ridge", SPACE, SPACE.features(genotypes), extreme, seed=0)
    predictions = fitted.predict(SPACE.sample(500, np.random.default_rng(0)))
    assert predictions.shape == (500, 2)
    assert predictions.min() >= 0
    assert predictions.max() <= 1


def test_split_and_folds_are_stratified():
    macs = np.random.default_rng(0).permutation(np.arange(100))
    held_out = predictor.held_out_rows(macs, 20, seed=0)
    assert sorted(macs[held_out] // 5) == list(range(20))
    folds = predictor.stratified_folds(macs, 5, seed=0)
    for start in range(0, 100, 5):
        assert set(folds[(macs >= start) & (macs < start + 5)]) == set(range(5))


def test_noise_ceiling_falls_with_noise_and_quality_stays_beneath_its_truth():
    ceilings = []
    for noise in (0.0, 0.02, 0.06):
        genotypes, targets, halves = labelled(80, noise=noise)
        settings = FitPredictor(models=("ridge",), held_out=30, folds=2, bootstraps=30)
        row = predictor.fit(genotypes, targets, SPACE, settings, seed=0, halves=halves).quality[1]
        ceilings.append(row["noise_ceiling"])
        assert row["noise_ceiling_low"] <= row["noise_ceiling"] <= row["noise_ceiling_high"]
        assert row["tau_over_ceiling"] == pytest.approx(row["kendall_tau"] / row["noise_ceiling"])
    assert ceilings[0] == pytest.approx(1)
    assert ceilings[0] > ceilings[1] > ceilings[2]


def test_noise_ceiling_is_what_a_predictor_without_error_reaches():
    rng = np.random.default_rng(1)
    truth = rng.normal(0, 1, 20_000)
    first, second = (truth + rng.normal(0, 1.5, len(truth)) for _ in range(2))
    reached = kendall_tau(truth, (first + second) / 2)
    assert noise_ceiling(first, second) == pytest.approx(reached, abs=0.01)
    assert noise_ceiling(first, second) > kendall_tau(first, second) + 0.2  # two halves agree far less
    assert noise_ceiling(truth, truth) == pytest.approx(1)
    assert noise_ceiling(truth, -truth) == 0
    assert np.isnan(noise_ceiling(truth, np.ones(len(truth))))


def test_statistics_agree_with_scipy_and_their_definitions():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 20, 60).astype(float)
    second = first + rng.normal(0, 5, 60).round()
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    low, high = bootstrap_interval(spearman, first, second, draws=100, seed=0)
    assert low < spearman(first, second) < high
    measured = np.array([0.5, 0.9, 0.7, 0.1])
    assert predictor.top_k_regret(measured, np.array([0.9, 0.1, 0.8, 0.2]), 1) == pytest.approx(0.4)
    assert predictor.top_k_regret(measured, np.array([0.9, 0.1, 0.8, 0.2]), 2) == pytest.approx(0.2)
    assert predictor.top_k_regret(measured, measured, 1) == 0


def test_too_few_archs_is_one_clear_error():
    genotypes, targets, _ = labelled(40)
    with pytest.raises(UserError, match=r"40 archs.*held_out 40.*at least 55"):
        predictor.fit(genotypes, targets, SPACE, FitPredictor(), seed=0)


def test_stage_writes_quality_and_held_out_rows(tmp_path, capsys):
    write_measurements(tmp_path / "table.parquet", labelled(60, noise=0.01))
    quality, held_out = run_stage(tmp_path)
    assert len(quality) == 4
    assert quality["chosen"].sum() == 2
    assert quality["noise_ceiling_all"].notna().all()
    assert len(held_out) == 20
    measured, predicted = held_out["robust_acc"], held_out["predicted_robust_acc"]
    chosen = quality[quality["chosen"] & (quality["target"] == "robust_acc")]
    assert stats.kendalltau(measured, predicted).statistic == pytest.approx(chosen["kendall_tau"].item())
    assert "label-noise ceiling" in capsys.readouterr().out


def test_stage_refuses_a_table_of_another_space(tmp_path):
    write_measurements(tmp_path / "table.parquet", labelled(60))
    with pytest.raises(ArtifactError, match="not of space resnet_micro"):
        run_stage(tmp_path, space="resnet_micro")


def write_measurements(path, labels):
    """Write a merged table."""
    genotypes, targets, halves = labels
    columns = identity_columns(SPACE, genotypes)
    for column, name in enumerate(predictor.TARGETS):
        columns[name] = targets[:, column].tolist()
        columns[f"{name}_half_a"], columns[f"{name}_half_b"] = halves[:, column].T.tolist()
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    rows = [{**row, "attack": "pgd20", "split": "val"} for row in rows]
    artifacts.write_table(path, rows, MEASURED, Provenance("test", "merge_table"))


def run_stage(folder, space="resnet_digits"):
    """Run `fit_predictor` and read its tables."""
    config = load({"run": "test", "space": space, "fit_predictor": QUICK.model_dump()})
    files = {name: str(folder / f"{name}.parquet") for name in ("table", "quality", "held-out")}
    files["predictor"] = str(folder / "predictor.safetensors")
    flags = [part for name, path in files.items() for part in (f"--{name}", path)]
    fit_predictor.main(["--settings", job_settings(config, "fit_predictor"), "--threads", "1", *flags])
    return artifacts.read_table(files["quality"]), artifacts.read_table(files["held-out"])


def test_a_gaussian_process_of_many_rows_is_conditioned_on_a_part_of_them():
    rng = np.random.default_rng(0)
    X = rng.uniform(size=(120, 2))
    y = X @ [1.0, -2.0]
    whole, part = (GaussianProcess(optimise_on=30, condition_on=rows).fit(X, y) for rows in (120, 60))
    assert (len(whole.model_.X_train_), len(part.model_.X_train_)) == (120, 60)
    assert np.unique(part.model_.X_train_, axis=0).shape == (60, 2)
    np.testing.assert_allclose(part.predict(X), y, atol=0.05)
