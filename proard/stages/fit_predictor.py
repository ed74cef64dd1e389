"""Fit the accuracy and robustness predictor: table.parquet -> predictor.safetensors, quality and held_out.parquet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from proard import artifacts, predictor
from proard.artifacts import MEASURED, ArtifactError
from proard.predictor import HELD_OUT, QUALITY, TARGETS
from proard.predictor.fitting import num_fits
from proard.progress import Progress
from proard.space import SearchSpace
from proard.space.sampling import identity_columns
from proard.stages.common import parse_arguments, run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="fit_predictor",
        reads=["table"],
        writes=["predictor", "quality", "held_out"],
        runs_networks=False,
    )
    settings, space = job.config.fit_predictor, SearchSpace(job.config.space)
    table = artifacts.read_table(job.files.table, columns=MEASURED)
    genotypes = genotypes_of(table, space, job.files.table)
    halves = [table[[f"{name}_half_a", f"{name}_half_b"]].to_numpy(dtype=float) for name in TARGETS]
    progress = Progress("fit_predictor", num_fits(settings), "fits")
    fit = predictor.fit(
        genotypes,
        table[list(TARGETS)].to_numpy(),
        space,
        settings,
        seed=job.seed,
        halves=np.stack(halves, axis=1),
        on_fit=progress.advance,
    )
    progress.close()
    provenance = job.provenance(job.files.table)
    held_out = table.iloc[fit.held_out][["arch_id", "macs", *TARGETS]].assign(
        model=fit.predictor.name,
        seed=job.seed,
        **{f"predicted_{name}": fit.held_out_predictions[:, column] for column, name in enumerate(TARGETS)},
    )
    predictor.save(job.files.predictor, fit.predictor, provenance)
    artifacts.write_table(job.files.quality, fit.quality, QUALITY, provenance)
    artifacts.write_table(job.files.held_out, held_out, HELD_OUT, provenance)
    print(summary(fit.quality))
    job.record_costs()


def genotypes_of(table: pd.DataFrame, space: SearchSpace, path: str) -> np.ndarray:
    """Genotypes of a table's rows, of shape (n, genes).

    Raises
    ------
    ArtifactError
        The table is of another space, or has more than one row per arch.
    """
    settings = table[["attack", "split"]].drop_duplicates()
    if len(settings) != 1 or table["arch_id"].duplicated().any():
        found = ", ".join(f"{row.attack} on {row.split}" for row in settings.itertuples())
        raise ArtifactError(f"{path} holds {found or 'no rows'}; expected one row per arch, under one attack and split")
    genotypes = list(table["genotype"])
    lengths_fit = all(len(genotype) == len(space.choices) for genotype in genotypes)
    stacked = np.stack(genotypes) if lengths_fit else np.zeros((0, 0))
    if (
        not lengths_fit
        or np.any((stacked < 0) | (stacked >= space.choices))
        or identity_columns(space, stacked)["arch_id"] != list(table["arch_id"])
    ):
        raise ArtifactError(f"{path} is not of space {space.settings.name}; rerun sample_archs and what follows")
    return stacked.astype(np.int64)


def summary(quality: Sequence[dict[str, Any]]) -> str:
    """The quality rows as text for a terminal, accuracies in points of percent."""
    lines = []
    for target in TARGETS:
        rows = [row for row in quality if row["target"] == target]
        first = rows[0]
        ceiling = first.get("noise_ceiling", float("nan"))
        lines.append(
            f"{target}: fitted on {first['num_train']} archs, judged on {first['num_held_out']} held-out archs; "
            f"label-noise ceiling of tau {ceiling:.2f}"
        )
        titles = f"{'cv tau':>8}{'tau':>7}{'95 %':>14}{'/ceiling':>10}{'rho':>7}{'R2':>7}{'RMSE':>7}{'regret':>8}"
        lines.append(f"  {'model':10}{titles}")
        for row in rows:
            share = np.nan if row["tau_over_ceiling"] is None else row["tau_over_ceiling"]
            lines.append(
                f"{'*' if row['chosen'] else ' '} {row['model']:10}{row['cv_tau']:8.3f}{row['kendall_tau']:7.3f}"
                f"{row['kendall_tau_low']:7.2f}-{row['kendall_tau_high']:<6.2f}{share:10.2f}"
                f"{row['spearman']:7.3f}{row['r2']:7.3f}{100 * row['rmse']:7.2f}{100 * row['top_k_regret']:8.2f}"
            )
    lines.append("* chosen: best mean cross-validated tau of robust_acc; RMSE and regret in points of percent")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
