"""State dicts saved with torch by others: only tensors are read, and nothing in the file is executed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from proard.artifacts.files import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys under which training scripts store the weights
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, of torch.compile, of a wrapping module
WAY_OUT = (
    "save only tensors where it was trained: "
    "torch.save({name: value for name, value in model.state_dict().items()}, path)"
)


def read_state_dict(path: str) -> dict[str, Tensor]:
    """Read the weights in a checkpoint of `torch.save`.

    Parameters
    ----------
    path : str
        A state dict, alone or under one of the keys `state_dict`, `model_state_dict`, `model`, `net`. Names may have
        the prefixes `module.`, `_orig_mod.` and `model.`, any number of times and in any order.

    Returns
    -------
    dict of Tensor
        Tensors on the CPU, by name without these prefixes.

    Raises
    ------
    ArtifactError
        The file cannot be read, contains objects other than tensors (the message names their class) or no state dict
        (the message names its keys), or has a tensor with values that are not finite.
    """
    found = _loaded(path)
    keys = list(found) if isinstance(found, Mapping) else []
    while isinstance(found, Mapping) and not _is_state_dict(found):
        found = next((found[key] for key in WRAPPERS if isinstance(found.get(key), Mapping)), None)
    if found is None or not isinstance(found, Mapping):
        holds = f"its keys are {', '.join(map(str, keys[:10]))}{', …' if len(keys) > 10 else ''}" if keys else "no keys"
        raise ArtifactError(
            f"{path} has no state dict (names with tensors), alone or under {', '.join(WRAPPERS)}: {holds}; {WAY_OUT}"
        )
    tensors: dict[str, Tensor] = {}
    for name, value in found.items():
        plain = _without_prefixes(name)
        if plain in tensors:
            raise ArtifactError(f"{path} contains {plain} twice, with different prefixes; {WAY_OUT}")
        tensors[plain] = value
    check_finite(path, tensors)
    return tensors


def matched(path: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, names: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint in float32, as a network's state dict has them.

    Parameters
    ----------
    tensors, wanted : mapping of str to Tensor
        Of the file, and of the network; batch norm's counters of batches may be missing in the file, and are 0 then.
    names : str
        Whose names the file should have, for the message.

    Raises
    ------
    ArtifactError
        A tensor is missing, unknown or has another shape; the message names the first.
    """
    import torch

    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing, strange = sorted(set(wanted) - set(tensors) - counters), sorted(set(tensors) - set(wanted))
    if missing or strange:
        what = f"lacks {missing[0]}" if missing else f"holds {strange[0]}"
        raise ArtifactError(f"{path} {what}; expected the names of {names}")
    for name, value in tensors.items():
        if value.shape != wanted[name].shape:
            raise ArtifactError(f"{path}: {name} has shape {tuple(value.shape)}, expected {tuple(wanted[name].shape)}")
    zeros = {name: torch.zeros((), dtype=torch.int64) for name in counters}
    return {**zeros, **{name: value.float() if value.ndim else value for name, value in tensors.items()}}


def check_finite(path: Any, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights with NaN or infinity.

    Raises
    ------
    ArtifactError
        A tensor has such values; the message names the file and the first such tensor.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            wrong = int((~value.isfinite()).sum())
            raise ArtifactError(
                f"{path}: {name} has {wrong} of {value.numel()} values that are NaN or infinite; use a checkpoint "
                "from before the training diverged"
            )


def _loaded(path: str) -> Any:
    """The content of a file, read by torch's unpickler for tensors."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # the unpickler may raise any error on a foreign file
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    stranger = re.search(r"GLOBAL ([\w.]+)", text)
    if stranger is None:
        raise ArtifactError(f"{path} is damaged or no checkpoint of torch.save with only tensors; {WAY_OUT}")
    name = stranger[1]
    what = f"a numpy number or array ({name})" if name.startswith("numpy.") else f"an object of class {name}"
    raise ArtifactError(
        f"{path} is no checkpoint of tensors alone: it also contains {what}, which is not read; {WAY_OUT}"
    )


def _is_state_dict(value: Mapping[Any, Any]) -> bool:
    """Whether this mapping has only names and tensors."""
    from torch import Tensor

    return bool(value) and all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())


def _without_prefixes(name: str) -> str:
    """A tensor's name in the network, without prefixes."""
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name
