"""Losses and inner objectives: logits in, numbers out; no model, no attack, no setting.

All KL divergences are summed over classes and averaged over images (natural units), whatever the number of classes.
"""

from importlib import import_module
from pkgutil import iter_modules

from proard.losses.absld import absld_loss, next_temperatures
from proard.losses.adr import adr_loss, annealed
from proard.losses.alignment import NORMS, gradient_gap, igdm_term, kdiga_term, loss_gradient
from proard.losses.distillation import (
    adaad_loss,
    alpha_loss,
    fast_edge_loss,
    iad_loss,
    kd_loss,
    rslad_loss,
    trust,
)
from proard.losses.divergence import alpha_divergence, kl_to_teacher, mix_logits, softened_kl
from proard.losses.ikl import ikl_loss
from proard.losses.inner import CrossEntropy, InnerObjective, KLBetweenNets, KLToTarget, Margin, TargetedMargin
from proard.losses.mtard import balanced_share, mtard_loss
from proard.losses.objectives import (
    INNER_OBJECTIVES,
    OBJECTIVES,
    Batch,
    Memory,
    Objective,
    scaled,
    with_igdm,
    with_kdiga,
)
from proard.losses.robust import HELPER_REACH, hat_loss, mart_loss, sat_loss, trades_loss

__all__ = [
    "HELPER_REACH",
    "INNER_OBJECTIVES",
    "NORMS",
    "OBJECTIVES",
    "Batch",
    "CrossEntropy",
    "InnerObjective",
    "KLBetweenNets",
    "KLToTarget",
    "Margin",
    "Memory",
    "Objective",
    "TargetedMargin",
    "absld_loss",
    "adaad_loss",
    "adr_loss",
    "alpha_divergence",
    "alpha_loss",
    "annealed",
    "balanced_share",
    "fast_edge_loss",
    "gradient_gap",
    "hat_loss",
    "iad_loss",
    "igdm_term",
    "ikl_loss",
    "kd_loss",
    "kdiga_term",
    "kl_to_teacher",
    "loss_gradient",
    "mart_loss",
    "mix_logits",
    "mtard_loss",
    "next_temperatures",
    "rslad_loss",
    "sat_loss",
    "scaled",
    "softened_kl",
    "trades_loss",
    "trust",
    "with_igdm",
    "with_kdiga",
]

for module in iter_modules(__path__, f"{__name__}."):  # each adds its objectives to OBJECTIVES
    import_module(module.name)
