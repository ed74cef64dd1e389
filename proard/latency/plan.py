"""The folder for a device: block files, whole subnets, the timing program, and a manifest with checksums."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from proard import __version__
from proard.artifacts import write_json
from proard.config import UserError, load, read_file
from proard.latency import bench
from proard.latency.graphs import random_weights
from proard.latency.kinds import RUNTIMES, kind_of, writers
from proard.progress import Progress
from proard.space import Part, SearchSpace
from proard.space.sampling import identity_columns, stratified_sample
from proard.space.tables import parts_of

FORMAT = "proard latency plan 2"
SUBNETS, FEWEST_SUBNETS, STRATA = 40, 12, 10


def plan(
    config: str | Path, folder: str | Path, *, int8: bool = False, runtime: str = RUNTIMES[0], seed: int = 0
) -> dict[str, Any]:
    """Write all that a device needs to be timed for the space of a config.

    Parameters
    ----------
    config : str or Path
        Config file of a run.
    folder : str or Path
        Written; it must not hold files of another plan.
    int8 : bool
        Write int8 files, as of `quantize_student` or `executorch_student`; otherwise float32 files.
    runtime : str
        That runs the files: `onnxruntime` or `executorch`.
    seed : int
        Of the choice of subnets, their halves, and all weights.

    Returns
    -------
    dict
        The manifest, as in `manifest.json`.

    Raises
    ------
    UserError
        The folder is not empty, the space has too few subnets to fit and to test, or ExecuTorch is missing.
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
    kind = kind_of(runtime, "int8" if int8 else "float32")
    write_part, write_call = writers(kind)
    call = f"call{kind.suffix}"
    files: dict[str, dict[str, Any]] = {call: {"kind": "call"}}
    content = {call: write_call()}
    parts = {part.key: part for part in parts_of(space)}
    progress = Progress("plan", len(parts) + count, "files", start_up=1)
    for key, part in parts.items():
        name = f"parts/{key}{kind.suffix}"
        files[name], content[name] = {"kind": "part", "key": key}, write_part(part, random_weights(seed))
        progress.advance()
    identity = identity_columns(space, genotypes)
    for row, genotype in enumerate(genotypes):
        name = f"subnets/{row:02d}{kind.suffix}"
        content[name] = write_part(Part.whole(space.spec(space.arch(genotype))), random_weights(seed))
        facts = {column: identity[column][row] for column in ("arch_id", "genotype", "macs")}
        files[name] = {"kind": "subnet", "fitted": bool(fitted[row]), **facts}
        progress.advance()
    progress.close()
    for name, data in content.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
        files[name]["sha256"] = hashlib.sha256(data).hexdigest()
    shutil.copyfile(bench.__file__, out / "bench.py")
    manifest = {
        "format": FORMAT,
        "version": __version__,
        "runtime": kind.runtime,
        "precision": kind.precision,
        "seed": seed,
        "space": space.settings.model_dump(mode="json"),
        "files": files,
    }
    write_json(out / "manifest.json", manifest)
    return manifest


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
