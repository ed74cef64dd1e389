"""From times measured on a device to its latency table, judged on subnets that were not fitted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import kendalltau

from proard import __version__
from proard.artifacts import write_json
from proard.config import Space, UserError
from proard.latency.bench import FORMAT as BENCH_FORMAT
from proard.latency.bench import TIME
from proard.latency.kinds import RUNTIMES, kind_of
from proard.latency.plan import read_plan
from proard.space import LatencyTable, SearchSpace
from proard.space.latency import FORMAT

Array = NDArray[np.float64]
MODELS: dict[str, tuple[str, ...]] = {"table": ("table",), "macs": ("macs",), "both": ("table", "macs")}
MEGA = 1e6


@dataclass(frozen=True)
class Quality:
    """Errors on subnets that were not fitted.

    Attributes
    ----------
    mean_error : float
        Mean of |predicted - measured| / measured.
    p90_error : float
        Ninetieth percentile of the same.
    within_5, within_10 : float
        Share of the subnets with an error of at most 5 and 10 %.
    kendall : float
        Kendall's tau-b of predicted and measured.
    """

    mean_error: float
    p90_error: float
    within_5: float
    within_10: float
    kendall: float

    @classmethod
    def of(cls, predicted: Array, measured: Array) -> Quality:
        """Compare predictions with measurements, each of shape (n,)."""
        errors = np.abs(predicted - measured) / measured
        shares = [float((errors <= bound).mean()) for bound in (0.05, 0.1)]
        tau = float(kendalltau(predicted, measured).statistic)
        return cls(float(errors.mean()), float(np.percentile(errors, 90)), shares[0], shares[1], tau)


def fit(folder: str | Path, *, out: str | Path = "latency", name: str | None = None) -> tuple[Path, dict[str, Any]]:
    """Write `OUT/DEVICE.json` from the folder that came back from a device.

    Parameters
    ----------
    folder : str or Path
        Of `proard latency plan`, with the `bench.json` that `bench.py` wrote.
    out : str or Path
        Folder of the tables of all devices.
    name : str, optional
        Of the device; by default the name in `bench.json`, in lower case with hyphens, and `-executorch` and `-int8`
        for such files.

    Returns
    -------
    (Path, dict)
        The file and its content: among others `model`, and `quality` by model on the subnets that were not fitted.

    Raises
    ------
    UserError
        A file is missing, or the times are of other files than the manifest lists.

    Notes
    -----
    Three models are fitted by non-negative least squares of relative errors: a base and a factor of the sum of block
    times (`table`), a base and a slope over MACs (`macs`), a base and both. The one with the least leave-one-out error
    among the fitted subnets is used; the others choose nothing. A block's time is that of its file less that of a call.
    The noise is judged as if the first pass predicted the second.
    """
    manifest, checksum = read_plan(folder)
    bench = read_bench(Path(folder) / "bench.json")
    if bench.get("manifest_sha256") != checksum or set(bench["files"]) != set(manifest["files"]):
        raise UserError(f"{folder}/bench.json is of another plan than manifest.json; run bench.py again on the device")
    times = {file: entry[TIME] for file, entry in bench["files"].items()}
    kinds: dict[str, dict[str, Any]] = {"part": {}, "subnet": {}}
    for file, entry in manifest["files"].items():
        kinds.setdefault(entry["kind"], {})[file] = entry
    (call,) = kinds["call"]
    parts = {entry["key"]: max(times[file] - times[call], 0.0) for file, entry in kinds["part"].items()}
    kind = kind_of(manifest.get("runtime", RUNTIMES[0]), manifest["precision"])  # earlier versions had one runtime
    slug = re.sub(r"[^a-z0-9.]+", "-", bench["device"]["name"].lower()).strip("-.") or "device"
    device = name or "-".join((slug, *kind.words))
    subnets = kinds["subnet"]
    fitted = np.asarray([entry["fitted"] for entry in subnets.values()])
    measured = np.asarray([times[file] for file in subnets])
    features = block_sums(manifest, [entry["genotype"] for entry in subnets.values()], device=device, parts=parts)

    rows = {model: design(features, names) for model, names in MODELS.items()}
    errors = {model: left_out_error(matrix[fitted], measured[fitted]) for model, matrix in rows.items()}
    uses = min(errors, key=lambda model: errors[model])
    weights = {model: solve(matrix[fitted], measured[fitted]) for model, matrix in rows.items()}
    quality = {model: Quality.of(matrix[~fitted] @ weights[model], measured[~fitted]) for model, matrix in rows.items()}
    passes = np.asarray([[each[TIME] for each in bench["files"][file]["passes"]] for file in subnets])
    quality["noise"] = Quality.of(passes[~fitted, 0], passes[~fitted, 1])
    found = dict(zip(("base_ms", *MODELS[uses]), weights[uses].tolist(), strict=True))
    content = {
        "format": FORMAT,
        "version": __version__,
        "device": device,
        "precision": kind.precision,
        "file": kind.file,
        "space": manifest["space"]["name"],
        **{key: bench[key] for key in ("runtime", "threads", "batch_size", "before", "after")},
        "machine": bench["device"],
        "model": {
            "uses": uses,
            "base_ms": found["base_ms"],
            "factor": found.get("table", 0.0),
            "ms_per_mac": found.get("macs", 0.0) / MEGA,
        },
        "num_fitted": int(fitted.sum()),
        "num_unseen": int((~fitted).sum()),
        "unseen_ms": [float(measured[~fitted].min()), float(measured[~fitted].max())],
        "left_out_error": errors,
        "quality": {model: vars(each) for model, each in quality.items()},
        "noise": bench["noise"],
        "parts_ms": parts,
    }
    path = Path(out) / f"{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return path, content


def read_bench(path: Path) -> dict[str, Any]:
    """What `bench.py` wrote.

    Raises
    ------
    UserError
        The file is missing, or not of `bench.py`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != BENCH_FORMAT:
            raise ValueError(content["format"])
        return content
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); run bench.py on the device") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} was not written by bench.py ({error})") from None


def block_sums(
    manifest: Mapping[str, Any], genotypes: list[list[int]], *, device: str, parts: Mapping[str, float]
) -> dict[str, Array]:
    """Per subnet the sum of its blocks' times in ms (`table`) and its millions of MACs, by the search's code."""
    plain = LatencyTable(device, "table", 0.0, 1.0, 0.0, parts, {})
    costs = SearchSpace(Space.model_validate(manifest["space"]), plain).costs(np.asarray(genotypes))
    return {"table": costs["latency"], "macs": costs["macs"] / MEGA}


def design(features: Mapping[str, Array], names: tuple[str, ...]) -> Array:
    """A column of ones, and one per feature; of shape (subnets, 1 + features)."""
    return np.column_stack([np.ones(len(features["macs"])), *(features[name] for name in names)])


def solve(matrix: Array, measured: Array) -> Array:
    """Non-negative weights of least squared relative error."""
    return nnls(matrix / measured[:, None], np.ones(len(measured)))[0]


def left_out_error(matrix: Array, measured: Array) -> float:
    """Mean relative error of subnets, each predicted from a fit to the others."""
    errors = []
    for row in range(len(measured)):
        others = np.arange(len(measured)) != row
        predicted = float(matrix[row] @ solve(matrix[others], measured[others]))
        errors.append(abs(predicted - measured[row]) / measured[row])
    return float(np.mean(errors))
