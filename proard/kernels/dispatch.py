"""Selection of the implementation: the fused kernel on a GPU with Triton, the reference implementation elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from proard.kernels import plain
from proard.kernels.compiled import cache_folder
from proard.kernels.cudnn import CudnnEpilogues, NoEpilogues
from proard.kernels.switch import cpu_kernels, in_use

CHECK = 600  # seconds after which the check of the kernels is stopped


@dataclass(frozen=True)
class Fused:
    """The fused kernels of a device.

    Attributes
    ----------
    steps : module
        Attack updates and logit gradients.
    maps : module
        Passes over feature maps.
    norms : module
        Batch norm.
    product : module
        Matrix products with an epilogue.
    library : CudnnEpilogues or NoEpilogues
        Convolutions with an epilogue.
    types : tuple of torch.dtype
        Types of maps for which products and convolutions with an epilogue are used.
    """

    steps: ModuleType
    maps: ModuleType
    norms: ModuleType
    product: ModuleType
    library: CudnnEpilogues | NoEpilogues
    types: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)


def fused_for(device: torch.device) -> Fused | None:
    """The fused kernels; None if they cannot run or are switched off."""
    if not in_use("fused"):
        return None
    return proven(device) if device.type == "cuda" else cpu_kernels()


def all_fused(library: CudnnEpilogues | NoEpilogues, **how: Any) -> Fused:
    """The fused kernels, whether they can run or not; fails without Triton."""
    names = ("fused", "fused_maps", "fused_norm", "fused_product")
    steps, maps, norms, product = (import_module(f"proard.kernels.{name}") for name in names)
    return Fused(steps, maps, norms, product, library, **how)


@cache
def proven(device: torch.device) -> Fused | None:
    """The fused kernels, if a process of its own has found their results right on this GPU; else None, with a warning.

    A kernel that reads out of bounds takes its whole process down; here that is only the process of the check. Its
    result is kept in the user's cache folder for these kernels, this GPU and these versions.
    """
    try:
        found = checked(device)
        return all_fused(CudnnEpilogues() if found["cudnn"] else NoEpilogues())
    except Exception as error:  # no Triton, no C compiler for its launcher, an unknown GPU: fallback to the reference
        warnings.warn(f"fused kernels are not used on {device}: {type(error).__name__}: {error}", stacklevel=2)
        return None


def checked(device: torch.device, command: tuple[str, ...] = ()) -> dict[str, bool]:
    """Result of `python -m proard.kernels.prove DEVICE`, or of another command: run, or as kept from an earlier run.

    Raises
    ------
    RuntimeError
        The check has failed; the last line of its output says why.
    """
    triton = import_module("triton")
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    gpu = f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    versions = f"{gpu} {torch.__version__} {torch.backends.cudnn.version()} {triton.__version__}"
    kept = cache_folder() / f"kernels-{sha256(sources + versions.encode()).hexdigest()[:16]}.json"
    if not command and kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    own = command or (sys.executable, "-m", "proard.kernels.prove", str(device))
    done = subprocess.run(own, check=False, capture_output=True, encoding="utf-8", errors="replace", timeout=CHECK)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"their check ended with code {done.returncode}: {lines[-1] if lines else 'no output'}")
    found = json.loads(done.stdout.splitlines()[-1])
    if not command:
        keep(kept, json.dumps(found))
    return found


def keep(path: Path, text: str) -> None:
    """Write a file of the cache folder in one step; several processes may do so at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as scratch:
            scratch.write(text)
        os.replace(scratch.name, path)
    except OSError:  # a folder that cannot be written: every process checks for itself
        return


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
    if fused is not None and fused.steps.fits(adv, gradient, low, high):
        return fused.steps.pgd_update_(adv, gradient, low, high, step_size=step_size)
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
        return fused.steps.softmax_difference(logits, target)
    return plain.softmax_difference(logits, target)
