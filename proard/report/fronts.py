"""Compares two runs' measured fronts: hypervolumes on one scale, with intervals over the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from proard.artifacts import ArtifactError, read_metadata, read_table, sha256
from proard.config import RunConfig, UserError, parse
from proard.data import load_split
from proard.evaluation import Conditions, SubnetMeter
from proard.evaluation.comparison import image_weights
from proard.nets import load_supernet
from proard.search import Scale, hypervolume
from proard.space import Arch, SearchSpace


@dataclass(frozen=True)
class Outcomes:
    """Which images each arch of a run classifies correctly.

    Attributes
    ----------
    macs : ndarray of shape (archs,)
    clean, robust : ndarray of shape (archs, images), bool
        `robust`: correct under every attack.
    images, threat : str
        What must be equal in two runs: checksum of the images; threat model, accounting and attacks.
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
    """Hypervolumes of two sets of measured archs and their difference, second minus first: value, low, high."""

    first: tuple[float, float, float]
    second: tuple[float, float, float]
    difference: tuple[float, float, float]
    num_archs: tuple[int, int]
    num_images: int


def compare_outcomes(first: Outcomes, second: Outcomes, *, bootstraps: int = 1000, seed: int = 0) -> FrontComparison:
    """Hypervolume in clean accuracy, robust accuracy and MACs, on a scale from the range of both runs' archs.

    The intervals are the 2.5th to 97.5th percentile over resampled images, the same for both runs. They do not cover
    other archs or other seeds of the training.

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
    intervals = [np.percentile(column, [2.5, 97.5]).tolist() for column in columns]
    pairs = zip([*values, values[1] - values[0]], intervals, strict=True)
    one, other, difference = ((value, low, high) for value, (low, high) in pairs)
    return FrontComparison(one, other, difference, (len(first.macs), len(second.macs)), count)


def verified_outcomes(run_folder: str | Path) -> Outcomes:
    """Outcomes of the archs that `verify_front` measured, on test under all of its attacks."""
    table = Path(run_folder) / "verify_front" / "front.parquet"
    return measured_outcomes(run_folder, [table], stage="verify_front", split="test")


def sampled_outcomes(run_folder: str | Path) -> Outcomes:
    """Outcomes of the archs that `evaluate_archs` measured, on val under its attack.

    Raises
    ------
    ArtifactError
        The run has no such tables.
    """
    tables = sorted((Path(run_folder) / "evaluate_archs").glob("*/table.parquet"))
    if not tables:
        raise ArtifactError(f"{run_folder} holds no evaluate_archs/SHARD/table.parquet; run that stage")
    return measured_outcomes(run_folder, tables, stage="evaluate_archs", split="val")


def compare_tables(first: Sequence[Path], second: Sequence[Path]) -> pd.DataFrame:
    """Hypervolumes of two sets of measured archs from their tables alone, without their runs.

    Parameters
    ----------
    first, second : sequence of path
        Tables of measured archs, such as those of `verify_front`, `merge_table` or `select_student`.

    Returns
    -------
    DataFrame
        A row per split and attack that both have, measured on equally many images: `split`, `attack`, `num_images`;
        `first_archs`, `second_archs`; `first`, `second`, the hypervolumes on a scale from the range of both; `paired`,
        the number of archs in both, and `clean_gain`, `robust_gain`, the mean of their differences, second minus
        first, as fractions (NaN if no arch is in both).

    Raises
    ------
    UserError
        No rows of the two have equal threat, images and attack.
    """
    groups = [_measured_alike(paths) for paths in (first, second)]
    found = []
    for key in [key for key in groups[0] if key in groups[1]]:
        pair = [group[key].drop_duplicates("arch_id").set_index("arch_id") for group in groups]
        points = [np.column_stack([-rows["clean_acc"], -rows["robust_acc"], rows["macs"]]) for rows in pair]
        scale = Scale.of(np.concatenate(points))
        both = pair[0].index.intersection(pair[1].index)
        gains = pair[1].loc[both, ["clean_acc", "robust_acc"]] - pair[0].loc[both, ["clean_acc", "robust_acc"]]
        row = {**pair[0].iloc[0][["split", "attack", "num_images"]], "paired": len(both)}
        for name, rows, place in zip(("first", "second"), pair, points, strict=True):
            row |= {f"{name}_archs": len(rows), name: hypervolume(place, scale)}
        found.append(row | {"clean_gain": gains["clean_acc"].mean(), "robust_gain": gains["robust_acc"].mean()})
    if not found:
        raise UserError("nothing in the two was measured alike: the same split, images, threat and attack")
    return pd.DataFrame(found)


def _measured_alike(paths: Sequence[Path]) -> dict[tuple[str, ...], pd.DataFrame]:
    """Rows by what must be equal in two sets of tables; for the worst case this includes its attacks."""
    how = ["attack", "norm", "eps", "step_size", "num_steps", "restarts"]
    alike = ["split", "num_images", "accounting", *how]
    columns = [*alike, "arch_id", "macs", "clean_acc", "robust_acc"]
    rows = pd.concat([read_table(path, columns=columns) for path in paths], ignore_index=True)
    described = pd.Series([" ".join(map(str, row)) for row in rows[how].itertuples(index=False)])
    worst = rows["attack"] == "worst"
    attacks = described[~worst].groupby(rows.loc[~worst, "split"]).agg(lambda texts: " ".join(sorted(set(texts))))
    described[worst] = rows.loc[worst, "split"].map(attacks)
    return dict(list(rows.groupby(["split", "num_images", "accounting", "attack", described], sort=False)))


def measured_outcomes(run_folder: str | Path, tables: Sequence[Path], *, stage: str, split: str) -> Outcomes:
    """Outcomes of measured archs from the run's cache; what the cache lacks is measured again.

    Parameters
    ----------
    tables : sequence of path
        Tables of one stage; their provenance holds the settings, supernet and images of the measurement.
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
        conditions=Conditions(config.threat, config.measurement, int(metadata["seed"])),
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
    """File of the supernet that a table was measured on."""
    wanted = inputs.get("supernet.safetensors")
    for path in sorted(folder.glob("train_phase/*/supernet.safetensors")):
        if sha256(path) == wanted:
            return path
    raise ArtifactError(f"{folder}/train_phase holds no supernet that its tables were measured on; rerun verify_front")
