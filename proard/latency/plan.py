"""The folder for a device: block files, whole subnets, the timing program, and a manifest with checksums."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from proard import __version__
from proard.artifacts import write_json
from proard.config import UserError, load, read_file
from proard.latency import bench
from proard.latency.graphs import Weights, call_file, onnx_file, random_weights
from proard.space import Part, SearchSpace
from proard.space.sampling import identity_columns, stratified_sample
from proard.space.tables import parts_of

FORMAT = "proard latency plan 2"
SUBNETS, FEWEST_SUBNETS, STRATA = 40, 12, 10
CALL = "call.onnx"


def plan(config: str | Path, folder: str | Path, *, int8: bool = False, seed: int = 0) -> dict[str, Any]:
    """Write all that a device needs to be timed for the space of a config.

    Parameters
    ----------
    config : str or Path
        Config file of a run.
    folder : str or Path
        Written; it must not hold files of another plan.
    int8 : bool
        Write int8 files, as of `quantize_student`; otherwise float32 files, as of `export_student`.
    seed : int
        Of the choice of subnets, their halves, and all weights.

    Returns
    -------
    dict
        The manifest, as in `manifest.json`.

    Raises
    ------
    UserError
        The folder is not empty, or the space has too few subnets to fit and to test.
    """
    space, out = SearchSpace(load(read_file(config)).space), Path(folder)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; name a new folder")
    count = min(SUBNETS, space.size)
    if count < FEWEST_SUBNETS:
        raise UserError(f"space {space.settings.name} has {space.size} subnets; a latency table needs {FEWEST_SUBNETS}")
    genotypes, _ = stratified_sample(space, count, strata=STRATA, seed=seed)
    genotypes = genotypes[np.argsort(space.costs(genotypes)["macs"], kind="stable")]
    fitted = halves(count, seed)
    write = _int8_writer() if int8 else onnx_file
    files: dict[str, dict[str, Any]] = {CALL: {"kind": "call"}}
    content = {CALL: call_file()}
    for part in {part.key: part for part in parts_of(space)}.values():
        name = f"parts/{part.key}.onnx"
        files[name], content[name] = {"kind": "part", "key": part.key}, write(part, random_weights(seed))
    identity = identity_columns(space, genotypes)
    for row, genotype in enumerate(genotypes):
        name = f"subnets/{row:02d}.onnx"
        content[name] = write(Part.whole(space.spec(space.arch(genotype))), random_weights(seed))
        facts = {column: identity[column][row] for column in ("arch_id", "genotype", "macs")}
        files[name] = {"kind": "subnet", "fitted": bool(fitted[row]), **facts}
    for name, data in content.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
        files[name]["sha256"] = hashlib.sha256(data).hexdigest()
    shutil.copyfile(bench.__file__, out / "bench.py")
    manifest = {
        "format": FORMAT,
        "version": __version__,
        "precision": "int8" if int8 else "float32",
        "seed": seed,
        "space": space.settings.model_dump(mode="json"),
        "files": files,
    }
    write_json(out / "manifest.json", manifest)
    return manifest


def _int8_writer() -> Callable[[Part, Weights], bytes]:
    """The function that writes a part as an int8 file; its imports take seconds."""
    from proard.latency.int8 import int8_file

    return int8_file


def halves(count: int, seed: int) -> np.ndarray:
    """Which of `count` subnets, cheapest first, are fitted: the two ends, and of each pair of others one at random."""
    fitted = np.zeros(count, dtype=bool)
    inner = np.arange(1, count - 1)
    pairs = inner[: len(inner) // 2 * 2].reshape(-1, 2)
    fitted[pairs[np.arange(len(pairs)), np.random.default_rng(seed).integers(0, 2, len(pairs))]] = True
    fitted[pairs[np.random.default_rng(seed).integers(len(pairs))]] = False  # the ends take the place of one
    fitted[[0, count - 1]] = True
    return fitted


def read_plan(folder: str | Path) -> tuple[dict[str, Any], str]:
    """The manifest of a folder, and the checksum of its file.

    Raises
    ------
    UserError
        It is missing, or of another kind.
    """
    path = Path(folder) / "manifest.json"
    try:
        data = path.read_bytes()
        manifest = json.loads(data)
        if manifest["format"] != FORMAT:
            raise ValueError(manifest["format"])
        return manifest, hashlib.sha256(data).hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); proard latency plan writes it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no manifest of proard latency plan ({error})") from None
