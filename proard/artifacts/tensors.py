"""Weights and images as safetensors, with provenance and a checksum of the contents in the header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from proard.artifacts.files import ArtifactError, atomic_path
from proard.artifacts.tables import Provenance


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """Checksum of names, types, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"kind": kind, "checksum": tensors_checksum(plain), **extra}
    if provenance is not None:
        header["provenance"] = json.loads(provenance.to_json())
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={"proard": json.dumps(header, sort_keys=True)})


def read_header(path: str | Path) -> dict[str, Any]:
    """Read the header of a file written by `save_tensors`; it is empty for other safetensors files.

    Raises
    ------
    ArtifactError
        The file is missing or is no complete safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
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
    header = read_header(path)
    kinds = (kind,) if isinstance(kind, str) else kind
    if header.get("kind") not in kinds:
        raise ArtifactError(f"{path} contains {header.get('kind', 'foreign tensors')!r}, expected {' or '.join(kinds)}")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    found = tensors_checksum(tensors)
    said = str(header.get("checksum"))
    if found != said:
        raise ArtifactError(
            f"{path} is damaged: its contents have checksum {found[:12]}, its header has {said[:12]}; "
            "delete it and rerun its stage"
        )
    return tensors, header
