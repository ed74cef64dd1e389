"""From measured archs to a predictor of clean and robust accuracy, with its quality on archs it has not seen."""

from proard.predictor.fitting import Fit, fit, held_out_rows, stratified_folds
from proard.predictor.model import TARGETS, Predictor, load, save
from proard.predictor.quality import HELD_OUT, QUALITY, kendall_tau, top_k_regret

__all__ = [
    "HELD_OUT",
    "QUALITY",
    "TARGETS",
    "Fit",
    "Predictor",
    "fit",
    "held_out_rows",
    "kendall_tau",
    "load",
    "save",
    "stratified_folds",
    "top_k_regret",
]
