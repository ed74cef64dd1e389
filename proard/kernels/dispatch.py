"""Selection of the implementation: the fused kernel on a GPU with Triton, the reference implementation elsewhere."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from proard.kernels import plain
from proard.kernels.switch import in_use


def fused_for(device: torch.device) -> ModuleType | None:
    """The fused kernels of the attack step; None if they cannot run or are switched off."""
    return proven(device) if device.type == "cuda" and in_use("fused") else None


@cache
def proven(device: torch.device) -> ModuleType | None:
    """The fused kernels, if their results on this GPU equal the reference; otherwise None, with a warning."""
    try:
        kernels = import_module("proard.kernels.fused")
        kernels.prove(device)
    except Exception as error:  # no Triton, no C compiler for its launcher, an unknown GPU: fallback to the reference
        warnings.warn(f"fused kernels are not used on {device}: {type(error).__name__}: {error}", stacklevel=2)
        return None
    return kernels


def pgd_update_(adv: Tensor, gradient: Tensor, low: Tensor, high: Tensor, *, step_size: float) -> Tensor:
    """One step of an attack: the gradient's sign, the step, the projection into the bounds.

    Parameters
    ----------
    adv : Tensor
        Iterate in [0, 1]; changed in place and returned.
    gradient : Tensor of the shape of `adv`
        May be overwritten.
    low, high : Tensor of the shape of `adv`
        Bounds of every pixel: ball and pixel range.
    step_size : float
        In pixel units; pixels with a zero gradient do not change.
    """
    fused = fused_for(adv.device)
    if fused is not None and fused.fits(adv, gradient, low, high):
        return fused.pgd_update_(adv, gradient, low, high, step_size=step_size)
    return plain.pgd_update_(adv, gradient, low, high, step_size=step_size)


def softmax_difference(logits: Tensor, target: Tensor) -> Tensor:
    """softmax(logits) - target: the gradient of cross-entropy and of KL(target || softmax) with respect to the logits.

    Parameters
    ----------
    logits : Tensor of shape (batch, classes)
        Any floating type; computed in float32, or in float64 for float64.
    target : Tensor of shape (batch, classes) or (batch,)
        Probabilities, or labels (int64) in place of one-hot rows.

    Returns
    -------
    Tensor of shape (batch, classes)
        In the type of `logits`.
    """
    fused = fused_for(logits.device)
    if fused is not None and logits.dtype is not torch.float64:
        return fused.softmax_difference(logits, target)
    return plain.softmax_difference(logits, target)
