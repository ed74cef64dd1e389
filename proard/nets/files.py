"""Networks on disk: safetensors whose header says which space and arch they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from proard.artifacts import ArtifactError, Provenance, load_tensors, save_tensors
from proard.config import Space
from proard.nets.elastic import Supernet
from proard.nets.subnet import StaticNet
from proard.space import Arch, SearchSpace


def save_supernet(path: str | Path, net: Supernet, provenance: Provenance, **extra: Any) -> None:
    """Write a supernet's weights with its space."""
    space = net.space.settings.model_dump(mode="json")
    save_tensors(path, net.state_dict(), kind="supernet", provenance=provenance, space=space, **extra)


def load_supernet(path: str | Path, space: SearchSpace) -> tuple[Supernet, str]:
    """Read a supernet of this space, and the checksum of its weights.

    Raises
    ------
    ArtifactError
        The file is missing or damaged, or of another space.
    """
    tensors, header = load_tensors(path, kind="supernet")
    if Space.model_validate(header["space"]) != space.settings:
        raise ArtifactError(
            f"{path} is a supernet of space {header['space'].get('name')}, not of this run's {space.settings.name} "
            "as it is configured now; rerun train_phase or restore the space"
        )
    net = Supernet(space, mean=tensors["mean"], std=tensors["std"])
    net.load_state_dict(tensors)
    return net, header["checksum"]


def save_static(path: str | Path, net: StaticNet, *, space: SearchSpace, arch: Arch, kind: str, **extra: Any) -> None:
    """Write a static network (`teacher`, `control`) with the space and arch that describe its layers."""
    described = space.settings.model_dump(mode="json")
    save_tensors(path, net.state_dict(), kind=kind, space=described, arch=arch.to_json(), **extra)


def load_static(path: str | Path, *, kind: str | tuple[str, ...]) -> tuple[StaticNet, SearchSpace, Arch, str]:
    """Read a static network: the network in evaluation mode, its space, its arch, the checksum of its weights."""
    tensors, header = load_tensors(path, kind=kind)
    space, arch = SearchSpace(Space.model_validate(header["space"])), Arch.from_json(header["arch"])
    net = StaticNet(space.spec(arch))
    net.load_state_dict(tensors)
    return net.eval(), space, arch, header["checksum"]
