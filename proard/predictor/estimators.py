"""The regressors that are compared, by their name in the settings; one-hot features in, several targets out."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin, TransformerMixin
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import BaggingRegressor, GradientBoostingRegressor, RandomForestRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from sklearn.linear_model import RidgeCV
from sklearn.multioutput import MultiOutputRegressor
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from proard.space import SearchSpace


class Levels(TransformerMixin, BaseEstimator):
    """Append to one-hot features the level of every gene and the mean level of every elastic dim.

    The level is (choice index + 1) / (number of choices), and 0 where the block is left out. It contains the
    order of the choices, which one-hot features do not.

    Parameters
    ----------
    choices : tuple of int
        Number of choices of every gene.
    dims : tuple of (int, int)
        First gene and end of every elastic dim.
    """

    def __init__(self, choices: tuple[int, ...], dims: tuple[tuple[int, int], ...]) -> None:
        self.choices = choices
        self.dims = dims

    def fit(self, X: np.ndarray, y: np.ndarray | None = None) -> Levels:
        """Return self; there is nothing to fit."""
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        """One-hot features of shape (n, sum of choices), widened by (genes + dims) columns."""
        weights = np.zeros((sum(self.choices), len(self.choices)))
        start = 0
        for gene, count in enumerate(self.choices):
            weights[start : start + count, gene] = np.arange(1, count + 1) / count
            start += count
        levels = X @ weights  # (n, genes)
        means = [levels[:, first:end].mean(axis=1, keepdims=True) for first, end in self.dims if end > first]
        return np.concatenate([X, levels, *means], axis=1)


class GaussianProcess(RegressorMixin, BaseEstimator):
    """One target: Matern 5/2 kernel with one length scale, and white noise.

    Parameters
    ----------
    seed : int
        Seed of the choice of rows, where not all are used.
    optimise_on : int
        Largest number of rows for optimising the hyper-parameters; time is cubic in it.
    condition_on : int
        Largest number of rows in the posterior; memory is quadratic in it: 128 MB for 4,000, 80 GB for 100,000.

    References
    ----------
    Rasmussen and Williams, Gaussian Processes for Machine Learning, MIT Press 2006, sections 2.2 and 5.4.1.
    """

    def __init__(self, seed: int = 0, optimise_on: int = 500, condition_on: int = 4000) -> None:
        self.seed = seed
        self.optimise_on = optimise_on
        self.condition_on = condition_on

    def fit(self, X: np.ndarray, y: np.ndarray) -> GaussianProcess:
        """Maximise the marginal likelihood on `optimise_on` rows, then condition on `condition_on` rows, at most."""
        kernel = ConstantKernel(1.0, (1e-2, 1e3)) * Matern(3.0, (0.3, 1e3), nu=2.5) + WhiteKernel(0.1, (1e-5, 2.0))
        order = np.random.default_rng(self.seed).permutation(len(X))
        part = order[: self.optimise_on]
        self.model_ = GaussianProcessRegressor(kernel, normalize_y=True, random_state=self.seed)
        self.model_.fit(X[part], y[part])
        if len(part) < len(X):
            rows = np.sort(order[: self.condition_on])
            self.model_ = GaussianProcessRegressor(self.model_.kernel_, optimizer=None, normalize_y=True)
            self.model_.fit(X[rows], y[rows])
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Posterior mean, of shape (n,)."""
        return self.model_.predict(X)


def build(name: str, space: SearchSpace, *, seed: int) -> Pipeline:
    """Make an unfitted pipeline from one-hot features of shape (n, sum of choices) to targets of shape (n, targets).

    Parameters
    ----------
    name : str
        `ridge` (all pairwise interactions, penalty by leave-one-out), `gp`, `forest`, `boosting` or `mlp`.
    seed : int
        Seed of everything random in the model; fitting twice gives equal models.
    """
    levels = Levels(tuple(space.choices), tuple((part.start, part.stop) for part in space.sections))
    if name == "ridge":
        pairs = PolynomialFeatures(2, interaction_only=True, include_bias=False)
        return make_pipeline(pairs, RidgeCV(np.logspace(-2, 4, 25), alpha_per_target=True))
    if name == "gp":
        return make_pipeline(levels, StandardScaler(), MultiOutputRegressor(GaussianProcess(seed)))
    if name == "forest":
        return make_pipeline(levels, RandomForestRegressor(300, max_features=0.5, random_state=seed))
    if name == "boosting":
        boosting = GradientBoostingRegressor(
            n_estimators=300, learning_rate=0.05, max_depth=3, subsample=0.7, max_features=0.5, random_state=seed
        )
        return make_pipeline(levels, MultiOutputRegressor(boosting))
    if name == "mlp":
        network = MLPRegressor(hidden_layer_sizes=(64,), alpha=10.0, solver="lbfgs", max_iter=500, random_state=seed)
        ensemble = BaggingRegressor(network, n_estimators=5, bootstrap=False, random_state=seed)
        return make_pipeline(
            levels, StandardScaler(), TransformedTargetRegressor(ensemble, transformer=StandardScaler())
        )
    raise ValueError(f"no model is called {name!r}")


def describe(pipeline: Pipeline) -> dict[str, Any]:
    """Hyper-parameters of the last step of a fitted pipeline, as JSON values."""
    model = pipeline[-1]
    if isinstance(model, RidgeCV):
        return {"alpha": [float(alpha) for alpha in np.atleast_1d(model.alpha_)]}
    if isinstance(model, MultiOutputRegressor) and isinstance(model.estimators_[0], GaussianProcess):
        return {"kernel": [str(single.model_.kernel_) for single in model.estimators_]}
    parameters = model.get_params(deep=True)
    return {key: value for key, value in parameters.items() if isinstance(value, (bool, int, float, str))}
