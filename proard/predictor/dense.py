"""Fitted pipelines as a few matrix products, for searches that predict many thousands of archs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.compose import TransformedTargetRegressor
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import Pipeline

Dense = Callable[[np.ndarray], np.ndarray]  # features (n, sum of choices) -> targets (n, targets)


def dense(pipeline: Pipeline) -> Dense:
    """A function equal to a fitted pipeline's `predict` up to rounding.

    `mlp` and `ridge` are written out as matrix products: scikit-learn's checks and its table of pairwise products take
    far longer than the arithmetic. For other models it is `predict` itself.
    """
    model = pipeline[-1]
    if isinstance(model, RidgeCV):
        return _quadratic(model)
    if isinstance(model, TransformedTargetRegressor):
        return _networks(pipeline)
    return pipeline.predict


def _quadratic(model: RidgeCV) -> Dense:
    """Linear in the features and in their products: x.w + x.Qx + b per target."""
    targets, terms = model.coef_.shape
    size = int(np.sqrt(8 * terms + 1) - 1) // 2  # features; terms = size + size (size - 1) / 2
    products = np.zeros((targets, size, size))
    rows, columns = np.triu_indices(size, 1)  # the order of itertools.combinations
    products[:, rows, columns] = model.coef_[:, size:]
    products[:, np.arange(size), np.arange(size)] = model.coef_[:, :size]  # features are 0 or 1, their own squares
    products = np.concatenate(list(products), axis=1)  # (size, targets * size)

    def predict(features: np.ndarray) -> np.ndarray:
        inner = (features @ products).reshape(len(features), targets, size)
        return np.einsum("nts,ns->nt", inner, features) + model.intercept_

    return predict


def _networks(pipeline: Pipeline) -> Dense:
    """The mean of networks with one hidden layer: one network with all their hidden units side by side."""
    levels, scaler, model = pipeline
    ensemble, outputs = model.regressor_, model.transformer_
    size = sum(levels.choices)
    identity = levels.transform(np.eye(size))  # levels are linear: (size, widened)
    first, shift, last, bias = [], [], [], 0.0
    for network, columns in zip(ensemble.estimators_, ensemble.estimators_features_, strict=True):
        weight = np.zeros((identity.shape[1], network.coefs_[0].shape[1]))
        weight[columns] = network.coefs_[0]
        first.append(weight)
        shift.append(network.intercepts_[0])
        last.append(network.coefs_[1])
        bias = bias + network.intercepts_[1]
    weight = np.concatenate(first, axis=1) / scaler.scale_[:, None]
    first_weight = identity @ weight
    first_bias = np.concatenate(shift) - scaler.mean_ @ weight
    last_weight = np.concatenate(last) / len(first) * outputs.scale_
    last_bias = bias / len(first) * outputs.scale_ + outputs.mean_

    def predict(features: np.ndarray) -> np.ndarray:
        hidden = features @ first_weight + first_bias
        return np.maximum(hidden, 0, out=hidden) @ last_weight + last_bias

    return predict
