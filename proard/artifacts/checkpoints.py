"""State dicts that other people saved with torch: nothing but tensors is read, and nothing in the file is executed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from proard.artifacts.files import ArtifactError

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys under which training scripts keep the weights
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, of torch.compile, of a wrapping module
WAY_OUT = (
    "save tensors alone where it was trained: "
    "torch.save({name: value for name, value in model.state_dict().items()}, path)"
)


def read_state_dict(path: str) -> dict[str, Tensor]:
    """Weights in a checkpoint of `torch.save`.

    Parameters
    ----------
    path : str
        A state dict, alone or under one of the keys `state_dict`, `model_state_dict`, `model`, `net`. Names may carry
        the prefixes `module.`, `_orig_mod.` and `model.`, each any number of times and in any order.

    Returns
    -------
    dict of Tensor
        On the CPU, under names without these prefixes.

    Raises
    ------
    ArtifactError
        The file cannot be read, holds other objects than tensors (their class is named) or no state dict (its keys are
        named), or a tensor of it is not finite.
    """
    found = _loaded(path)
    keys = list(found) if isinstance(found, Mapping) else []
    while isinstance(found, Mapping) and not _is_state_dict(found):
        found = next((found[key] for key in WRAPPERS if isinstance(found.get(key), Mapping)), None)
    if found is None or not isinstance(found, Mapping):
        holds = f"its keys are {', '.join(map(str, keys[:10]))}{', …' if len(keys) > 10 else ''}" if keys else "no keys"
        raise ArtifactError(
            f"{path} holds no state dict, names with tensors, alone or under {', '.join(WRAPPERS)}: {holds}; {WAY_OUT}"
        )
    tensors: dict[str, Tensor] = {}
    for name, value in found.items():
        plain = _without_prefixes(name)
        if plain in tensors:
            raise ArtifactError(f"{path} holds {plain} twice, under different prefixes; {WAY_OUT}")
        tensors[plain] = value
    check_finite(path, tensors)
    return tensors


def check_finite(path: Any, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights with NaN or infinity.

    Raises
    ------
    ArtifactError
        Names the file and the first such tensor.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            wrong = int((~value.isfinite()).sum())
            raise ArtifactError(
                f"{path}: {name} has {wrong} of {value.numel()} values that are NaN or infinite; take a checkpoint "
                "from before the training diverged"
            )


def _loaded(path: str) -> Any:
    """What the unpickler for tensors makes of a file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # the unpickler raises whatever a foreign file makes it raise
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    stranger = re.search(r"GLOBAL ([\w.]+)", text)
    if stranger is None:
        raise ArtifactError(f"{path} is damaged or no checkpoint of tensors alone, as torch.save writes it; {WAY_OUT}")
    name = stranger[1]
    what = f"a numpy number or array ({name})" if name.startswith("numpy.") else f"an object of class {name}"
    raise ArtifactError(f"{path} is no checkpoint of tensors alone: it also holds {what}, which is not read; {WAY_OUT}")


def _is_state_dict(value: Mapping[Any, Any]) -> bool:
    """Whether these are names with tensors."""
    return bool(value) and all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())


def _without_prefixes(name: str) -> str:
    """A tensor's name as the network itself calls it."""
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name
