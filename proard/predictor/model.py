"""A fitted predictor and its file, which holds the training data and settings; loading fits the same model again."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import sklearn
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

from proard.artifacts import ArtifactError, Provenance, load_arrays, save_arrays
from proard.config import Space, parse
from proard.predictor.dense import Dense, dense
from proard.predictor.estimators import build, describe
from proard.space import SearchSpace

TARGETS = ("clean_acc", "robust_acc")
ROWS_PER_CALL = 4096  # bounds the memory of kernels and of pairwise interactions
REPRODUCED = 1e-4  # fraction; far below the noise of a label, far above rounding


class Predictor:
    """Predicts clean and robust accuracy from genotypes.

    Parameters
    ----------
    name : str
        Model, as in the settings.
    space : SearchSpace
        Space of the genotypes.
    features : ndarray of shape (n, sum of choices)
        One-hot features of the measured archs.
    targets : ndarray of shape (n, 2)
        Measured `TARGETS`, fractions.
    seed : int
        Seed of everything random in the model.
    """

    def __init__(self, name: str, space: SearchSpace, features: np.ndarray, targets: np.ndarray, *, seed: int) -> None:
        self.name, self.space, self.seed = name, space, seed
        self.features, self.targets = np.array(features), np.array(targets)
        self.pipeline = fit_pipeline(name, space, features, targets, seed=seed)
        self.dense = dense(self.pipeline)

    def predict(self, genotypes: np.ndarray) -> np.ndarray:
        """Predicted `TARGETS` of genotypes of shape (n, genes): shape (n, 2), fractions in [0, 1].

        Equal subnets get equal predictions, whatever the genes of blocks that depth leaves out.
        """
        return _in_parts(self.dense, self.space.features(genotypes))


def fit_pipeline(name: str, space: SearchSpace, features: np.ndarray, targets: np.ndarray, *, seed: int) -> Pipeline:
    """Fit a model on one thread: the order of sums changes the last digits, and so an optimiser's path."""
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # ending at a bound or at the iteration limit is no error
        return build(name, space, seed=seed).fit(features, targets)


def predict_features(pipeline: Pipeline, features: np.ndarray) -> np.ndarray:
    """Predictions of a fitted pipeline, of shape (n, 2), clipped to [0, 1]."""
    return _in_parts(pipeline.predict, features)


def _in_parts(predict: Dense, features: np.ndarray) -> np.ndarray:
    """Predictions of shape (n, 2), clipped to [0, 1], `ROWS_PER_CALL` rows at a time."""
    starts = range(0, len(features), ROWS_PER_CALL)
    parts = [predict(features[start : start + ROWS_PER_CALL]) for start in starts]
    return np.clip(np.concatenate(parts), 0.0, 1.0) if parts else np.zeros((0, len(TARGETS)))


def save(path: str | Path, predictor: Predictor, provenance: Provenance | None = None) -> None:
    """Write features, targets, their predictions and the settings of the fit; no pickle."""
    arrays = {
        "features": predictor.features,
        "targets": predictor.targets,
        "predictions": predict_features(predictor.pipeline, predictor.features),
    }
    save_arrays(
        path,
        arrays,
        kind="predictor",
        provenance=provenance,
        model=predictor.name,
        learnt=describe(predictor.pipeline),
        seed=predictor.seed,
        space=predictor.space.settings.model_dump(mode="json"),
        scikit_learn=sklearn.__version__,
    )


def load(path: str | Path) -> Predictor:
    """Fit the predictor of a file again.

    Raises
    ------
    ArtifactError
        The file is missing, damaged or no predictor, or the model fitted here gives other predictions.
    """
    arrays, header = load_arrays(path, kind="predictor")
    space = SearchSpace(parse(Space, header["space"], where=f"space in {path}"))
    features, targets = arrays["features"], arrays["targets"]
    predictor = Predictor(header["model"], space, features, targets, seed=header["seed"])
    difference = np.abs(predict_features(predictor.pipeline, features) - arrays["predictions"]).max()
    if difference > REPRODUCED:
        raise ArtifactError(
            f"{path}: the model fitted again differs from the saved one by {difference:.2g} (it was fitted with "
            f"scikit-learn {header['scikit_learn']}, here is {sklearn.__version__}); rerun fit_predictor"
        )
    return predictor
