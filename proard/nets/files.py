"""Networks on disk: safetensors files whose header names the space and the arch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from proard.artifacts import ArtifactError, Provenance, check_finite, load_tensors, save_tensors
from proard.config import Space
from proard.nets.deepmind import read_deepmind
from proard.nets.elastic import Supernet
from proard.nets.fixed import FixedNet
from proard.nets.subnet import StaticNet
from proard.nets.wide import read_trades
from proard.space import FixedArch, FixedSpace, NetArch, NetSpace, SearchSpace, read_space


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


def save_static(
    path: str | Path,
    net: StaticNet | FixedNet,
    *,
    space: NetSpace,
    arch: NetArch,
    kind: str,
    **extra: Any,
) -> None:
    """Write a static network (`teacher`, `control`) with the space and arch that describe its layers."""
    described = space.settings.model_dump(mode="json")
    save_tensors(path, net.state_dict(), kind=kind, space=described, arch=arch.to_json(), **extra)


def load_static(
    path: str | Path, *, kind: str | tuple[str, ...]
) -> tuple[StaticNet | FixedNet, NetSpace, NetArch, str]:
    """Read a static network: the network in evaluation mode, its space, its arch, the checksum of its weights.

    Raises
    ------
    ArtifactError
        The file is missing, damaged or of another kind, or holds weights that are not finite.
    """
    tensors, header = load_tensors(path, kind=kind)
    check_finite(path, tensors)
    space = read_space(header["space"])
    arch = space.read_arch(header["arch"])
    net = bare_network(space, arch)
    net.load_state_dict(tensors)
    return net.eval(), space, arch, header["checksum"]


def bare_network(space: NetSpace, arch: Any) -> StaticNet | FixedNet:
    """The static network of an arch; its weights and pixel normalisation must still be loaded."""
    return StaticNet(space.spec(arch)) if isinstance(space, SearchSpace) else bare_fixed(space)


def bare_fixed(space: NetSpace) -> FixedNet:
    """The network of a fixed space; its weights and pixel normalisation must still be loaded."""
    assert isinstance(space, FixedSpace)
    channels = space.settings.image_channels
    return FixedNet(space, mean=[0.0] * channels, std=[1.0] * channels)


def load_trades(path: str | Path, *, image_size: int) -> tuple[FixedNet, FixedSpace, FixedArch]:
    """Read a WideResNet checkpoint of TRADES' layout (see `read_trades`): network, space, arch."""
    settings, tensors = read_trades(str(path), image_size=image_size)
    space = FixedSpace(settings)
    net = bare_fixed(space)
    net.module.load_state_dict(tensors)
    return net.eval(), space, space.largest


def load_deepmind(path: str | Path, *, image_size: int, activation: str) -> tuple[FixedNet, FixedSpace, FixedArch]:
    """Read a ResNet checkpoint of DeepMind's layout (see `read_deepmind`): network, space, arch."""
    settings, tensors, (mean, std) = read_deepmind(str(path), image_size=image_size, activation=activation)
    space = FixedSpace(settings)
    net = FixedNet(space, mean=mean, std=std)
    net.module.load_state_dict(tensors)
    return net.eval(), space, space.largest
