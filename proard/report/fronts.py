"""Two runs' measured fronts against each other: hypervolumes on one scale, with intervals over the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from proard.artifacts import ArtifactError, read_metadata, read_table, sha256
from proard.config import RunConfig, UserError, parse
from proard.data import load_split
from proard.evaluation import SubnetMeter
from proard.evaluation.comparison import image_weights
from proard.nets import load_supernet
from proard.search import Scale, hypervolume
from proard.space import Arch, SearchSpace


@dataclass(frozen=True)
class Outcomes:
    """Which images each arch of a run has right.

    Attributes
    ----------
    macs : ndarray of shape (archs,)
    clean, robust : ndarray of shape (archs, images), bool
        Robust: under every attack.
    images, threat : str
        What must agree between two runs: checksum of the images; threat model, accounting and attacks.
    """

    macs: np.ndarray
    clean: np.ndarray
    robust: np.ndarray
    images: str
    threat: str

    def objectives(self, weights: np.ndarray | None = None) -> np.ndarray:
        """(-clean, -robust, macs) of every arch, of shape (archs, 3); `weights` count how often each image occurs."""
        shares = np.full(self.clean.shape[1], 1.0) if weights is None else weights
        accuracies = [mask @ shares / shares.sum() for mask in (self.clean.astype(float), self.robust.astype(float))]
        return np.column_stack([-accuracies[0], -accuracies[1], self.macs])


@dataclass(frozen=True)
class FrontComparison:
    """Hypervolumes of two sets of measured archs and of their difference, second less first: value, low, high."""

    first: tuple[float, float, float]
    second: tuple[float, float, float]
    difference: tuple[float, float, float]
    num_archs: tuple[int, int]
    num_images: int


def compare_outcomes(first: Outcomes, second: Outcomes, *, bootstraps: int = 1000, seed: int = 0) -> FrontComparison:
    """Hypervolume in clean accuracy, robust accuracy and MACs, on the scale that both runs' archs span together.

    The intervals are the 2.5th to 97.5th percentile over redraws of the images, the same for both runs. They say
    nothing about other archs or other seeds of the training.

    Raises
    ------
    UserError
        The runs were not measured on the same images under the same attacks.
    """
    for name, what in (("images", "images"), ("threat", "attacks")):
        if getattr(first, name) != getattr(second, name):
            raise UserError(f"the two runs were measured with different {what}; give both the same data and settings")
    count = first.clean.shape[1]
    scale = Scale.of(np.concatenate([first.objectives(), second.objectives()]))
    redraws = image_weights(count, bootstraps=bootstraps, seed=seed)
    volumes = np.asarray([[hypervolume(run.objectives(row), scale) for run in (first, second)] for row in redraws])
    values = [hypervolume(run.objectives(), scale) for run in (first, second)]
    columns = [volumes[:, 0], volumes[:, 1], volumes[:, 1] - volumes[:, 0]]
    intervals = [tuple(np.percentile(column, [2.5, 97.5]).tolist()) for column in columns]
    found = [(value, *interval) for value, interval in zip([*values, values[1] - values[0]], intervals, strict=True)]
    return FrontComparison(*found, num_archs=(len(first.macs), len(second.macs)), num_images=count)


def verified_outcomes(run_folder: str | Path) -> Outcomes:
    """Outcomes of the archs that `verify_front` measured, on test under all of its attacks."""
    table = Path(run_folder) / "verify_front" / "front.parquet"
    return measured_outcomes(run_folder, [table], stage="verify_front", split="test")


def sampled_outcomes(run_folder: str | Path) -> Outcomes:
    """Outcomes of the archs that `evaluate_archs` measured, on val under its attack.

    Raises
    ------
    ArtifactError
        The run has none.
    """
    tables = sorted((Path(run_folder) / "evaluate_archs").glob("*/table.parquet"))
    if not tables:
        raise ArtifactError(f"{run_folder} holds no evaluate_archs/SHARD/table.parquet; run that stage")
    return measured_outcomes(run_folder, tables, stage="evaluate_archs", split="val")


def measured_outcomes(run_folder: str | Path, tables: Sequence[Path], *, stage: str, split: str) -> Outcomes:
    """Outcomes of measured archs, from the run's cache; what it has lost is measured again.

    Parameters
    ----------
    tables : sequence of path
        Tables of one stage; their provenance says with which settings, supernet and images they were measured.
    """
    folder = Path(run_folder)
    rows = pd.concat([read_table(path, columns=["arch", "split", "num_images"]) for path in tables])
    rows = rows[rows["split"] == split].drop_duplicates("arch")
    metadata = read_metadata(tables[0])
    config = parse(RunConfig, metadata["settings"])
    attacks = config.verify_front.attacks if stage == "verify_front" else (config.evaluate_archs.attack,)
    supernet, checksum = load_supernet(_same_file(folder, metadata["inputs"]), SearchSpace(config.space))
    data = folder / "prepare_data"
    images = load_split(data / f"{split}.safetensors").first(int(rows["num_images"].iloc[0]))
    meter = SubnetMeter(
        supernet,
        checksum=checksum,
        train=load_split(data / "train.safetensors"),
        threat=config.threat,
        measurement=config.measurement,
        seed=int(metadata["seed"]),
        cache=folder / "cache",
    )
    space, macs, clean, robust = SearchSpace(config.space), [], [], []
    for text in rows["arch"]:
        entries = list(meter.measure(Arch.from_json(text), images, attacks).values())
        macs.append(space.spec(Arch.from_json(text)).macs)
        clean.append(entries[0]["clean"])
        robust.append(np.logical_and.reduce([entry["robust"] for entry in entries]))
    threat = " ".join([str(config.threat), config.measurement.accounting, *(str(attack) for attack in attacks)])
    return Outcomes(np.asarray(macs), np.stack(clean), np.stack(robust), images.checksum, threat)


def _same_file(folder: Path, inputs: dict[str, str]) -> Path:
    """The supernet that a table was measured on."""
    wanted = inputs.get("supernet.safetensors")
    for path in sorted(folder.glob("train_phase/*/supernet.safetensors")):
        if sha256(path) == wanted:
            return path
    raise ArtifactError(f"{folder}/train_phase holds no supernet that its tables were measured on; rerun verify_front")
