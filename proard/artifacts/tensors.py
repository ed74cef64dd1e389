"""Weights and images as safetensors, with provenance and a checksum of the contents in the header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from proard.artifacts.files import ArtifactError, atomic_path
from proard.artifacts.tables import Provenance

if TYPE_CHECKING:  # stages that run no network do not import torch, which takes seconds
    from torch import Tensor


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """Checksum of names, types, shapes and values of tensors."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        _update(digest, name, tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _arrays_checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Checksum of arrays, that of equal tensors."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        _update(digest, name, f"torch.{array.dtype}", array.shape, array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _update(digest: Any, name: str, dtype: Any, shape: Any, values: np.ndarray) -> None:
    """Add a tensor's name, type, shape and bytes to a checksum."""
    digest.update(f"{name} {dtype} {tuple(shape)}\n".encode())
    digest.update(values.data)


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], *, kind: str, provenance: Provenance | None = None, **extra: Any
) -> None:
    """Write tensors of any shapes atomically.

    Parameters
    ----------
    kind : str
        Kind of the file (`teacher`, `supernet`, `student`, `images`); `load_tensors` checks it.
    extra
        Further JSON values for the header.
    """
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = _header(kind, tensors_checksum(plain), provenance, extra)
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata=header)


def save_arrays(
    path: str | Path, arrays: Mapping[str, np.ndarray], *, kind: str, provenance: Provenance | None = None, **extra: Any
) -> None:
    """Write arrays as `save_tensors` writes equal tensors."""
    from safetensors.numpy import save_file

    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    header = _header(kind, _arrays_checksum(plain), provenance, extra)
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata=header)


def _header(kind: str, checksum: str, provenance: Provenance | None, extra: Mapping[str, Any]) -> dict[str, str]:
    """The header of a file."""
    header = {"kind": kind, "checksum": checksum, **extra}
    if provenance is not None:
        header["provenance"] = json.loads(provenance.to_json())
    return {"proard": json.dumps(header, sort_keys=True)}


def read_header(path: str | Path) -> dict[str, Any]:
    """Read the header of a file written by `save_tensors`; it is empty for other safetensors files.

    Raises
    ------
    ArtifactError
        The file is missing or is no complete safetensors file.
    """
    try:
        with safe_open(path, framework="np") as file:
            return json.loads((file.metadata() or {}).get("proard", "{}"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; rerun the stage that writes it") from None
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(
            f"{path} is truncated or no safetensors file ({error}); delete it and rerun its stage"
        ) from None


def load_tensors(path: str | Path, *, kind: str | tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and header of a file, and check its kind and checksum.

    Raises
    ------
    ArtifactError
        The file is missing, truncated, of another kind, or its contents do not match their checksum.
    """
    tensors, header = _read(path, kind, framework="pt")
    _check(path, tensors_checksum(tensors), header)
    return tensors, header


def load_arrays(path: str | Path, *, kind: str | tuple[str, ...]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file as `load_tensors` does, as arrays.

    Raises
    ------
    ArtifactError
        As there.
    """
    arrays, header = _read(path, kind, framework="np")
    _check(path, _arrays_checksum(arrays), header)
    return arrays, header


def _read(path: str | Path, kind: str | tuple[str, ...], *, framework: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Contents and header of a file of one of these kinds."""
    header = read_header(path)
    kinds = (kind,) if isinstance(kind, str) else kind
    if header.get("kind") not in kinds:
        raise ArtifactError(f"{path} contains {header.get('kind', 'foreign tensors')!r}, expected {' or '.join(kinds)}")
    with safe_open(path, framework=framework) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 - not a mapping


def _check(path: str | Path, found: str, header: Mapping[str, Any]) -> None:
    """Refuse contents of another checksum than the header's."""
    said = str(header.get("checksum"))
    if found != said:
        raise ArtifactError(
            f"{path} is damaged: its contents have checksum {found[:12]}, its header has {said[:12]}; "
            "delete it and rerun its stage"
        )
