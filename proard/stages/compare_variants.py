"""Compare the variants: measurements and histories of all of them -> table.parquet, and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from proard import artifacts
from proard.artifacts import ArtifactError, load_tensors, read_metadata, read_table
from proard.artifacts.variants import COMPARED, VARIANT_MEASURED
from proard.config import UserError
from proard.data import load_split
from proard.evaluation.comparison import SUBNETS, accuracy_of, gain_over, image_weights
from proard.nets import load_static
from proard.report.svg import to_svg
from proard.report.variants import variants_figure
from proard.space import SearchSpace
from proard.stages.common import Job, parse_arguments, run
from proard.training import planned_work, within_budget

Key = tuple[str, int]  # variant and seed


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="compare_variants",
        reads=["train", "teacher"],
        lists=["tables", "outcomes", "histories"],
        writes=["table", "figure"],
    )
    files, settings = job.files, job.config.compare_variants
    variants, seeds = job.config.train_variant.variants, job.config.train_variant.seeds
    baseline = settings.baseline or next(iter(variants))
    tables = [read_table(path, columns=VARIANT_MEASURED) for path in files.tables]
    keys = [(str(table["variant"].iloc[0]), int(table["train_seed"].iloc[0])) for table in tables]
    check_complete(keys, [(name, seed) for name in variants for seed in seeds])
    outcomes = {key: load_tensors(path, kind="outcomes")[0] for key, path in zip(keys, files.outcomes, strict=True)}
    spent = spent_by(job, files.histories)
    check_equal_work(spent, settings.tolerance)
    rows: list[dict[str, Any]] = []
    for (split, attack), measured in pd.concat(tables).groupby(["split", "attack"], sort=False):
        right = {
            kind: {name: stacked(outcomes, name, seeds, f"{split}.{which}") for name in variants}
            for kind, which in (("clean", "clean"), ("robust", attack))
        }
        count = int(measured["num_images"].iloc[0])
        weights = image_weights(count, bootstraps=settings.bootstraps, seed=job.seed)
        for name in variants:
            facts = {"variant": name, "split": split, "attack": attack, "baseline": baseline, **spent[name]}
            facts |= {"num_seeds": len(seeds), "num_archs": measured["arch_id"].nunique(), "num_images": count}
            for subnet in SUBNETS:
                rows.append({**facts, "subnet": subnet, **statistics(right, name, baseline, weights, subnet)})
    inputs = {path: artifacts.sha256(path) for path in (*files.tables, *files.outcomes, *files.histories)}
    provenance = job.provenance(files.teacher)
    provenance = replace(provenance, inputs={**provenance.inputs, **inputs})
    artifacts.write_table(files.table, rows, COMPARED, provenance)
    table = read_table(files.table)
    figure = variants_figure(table)
    artifacts.write_text(files.figure, to_svg(figure, "Accuracy of each variant with 95 % intervals"))
    say(table)
    job.record_costs()


def stacked(outcomes: Mapping[Key, Mapping[str, Tensor]], variant: str, seeds: Sequence[int], which: str) -> np.ndarray:
    """Outcomes of a variant's trainings, of shape (seeds, archs, images)."""
    return np.stack([outcomes[variant, seed][which].numpy() for seed in seeds])


def check_complete(found: Sequence[Key], wanted: Sequence[Key]) -> None:
    """Refuse measurements that are missing, doubled, or of a variant that the config does not list.

    Raises
    ------
    ArtifactError
        Names the first few.
    """
    strange = sorted(set(found) ^ set(wanted)) + sorted({key for key in found if found.count(key) > 1})
    if strange:
        names = ", ".join(f"{name} seed {seed}" for name, seed in strange[:6])
        raise ArtifactError(f"measurements and config do not agree on {names}; rerun measure_variant for these")


def spent_by(job: Job, paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What one training of each variant took, all its phases together, mean over seeds."""
    space, images = SearchSpace(job.config.space), len(load_split(job.files.train))
    _, teacher_space, teacher_arch, _ = load_static(job.files.teacher, kind="teacher")
    teacher_macs = teacher_space.spec(teacher_arch).macs
    found: dict[str, list[dict[str, float]]] = {}
    for path in paths:
        last = read_table(path, columns=["phase", "forward_equivalents"]).iloc[-1]
        (variant,) = read_metadata(path)["settings"]["train_variant"]["variants"]
        phases = {phase.name: phase for phase in job.config.train_variant.variants[variant].phases}
        seed = int(last["seed"])
        phase = within_budget(space, phases[last["phase"]], images=images, seed=seed)
        work = planned_work(space, phase, images=images, seed=seed, teacher_macs=teacher_macs)
        found.setdefault(variant, []).append(
            {
                "steps": float(last["step"]),
                **{name: float(last[name]) for name in ("images", "forward_equivalents", "seconds")},
                "training_macs": work.macs * float(last["images"]),
            }
        )
    seeds, counts = len(job.config.train_variant.seeds), ("steps", "images", "forward_equivalents")
    totals = {name: (pd.DataFrame(rows).sum() / seeds).to_dict() for name, rows in found.items()}
    return {name: {**total, **{key: round(total[key]) for key in counts}} for name, total in totals.items()}


def check_equal_work(spent: Mapping[str, Mapping[str, Any]], tolerance: float) -> None:
    """Refuse to compare variants that took different numbers of gradient evaluations.

    Raises
    ------
    UserError
        Names the two farthest apart.
    """
    counts = {name: facts["forward_equivalents"] for name, facts in spent.items()}
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[most] > (1 + tolerance) * counts[least]:
        raise UserError(
            f"variant {most} took {counts[most]:,} forward-equivalents, {least} {counts[least]:,}: more than "
            f"compare_variants.tolerance, {tolerance:g}, apart; give both the same forward_equivalents, or raise it"
        )


def statistics(
    right: Mapping[str, Mapping[str, np.ndarray]], name: str, baseline: str, weights: np.ndarray, subnet: str
) -> dict[str, float]:
    """Accuracy and gain of one variant, clean and robust, with their intervals."""
    row = {}
    for kind, outcomes in right.items():
        found = {
            "acc": accuracy_of(outcomes[name], weights, subnet),
            "gain": gain_over(outcomes[name], outcomes[baseline], weights, subnet),
        }
        for what, value in found.items():
            row |= {f"{kind}_{what}": value.value, f"{kind}_{what}_low": value.low, f"{kind}_{what}_high": value.high}
    return row


def say(table: pd.DataFrame) -> None:
    """Print the mean subnet of each variant under the strictest attack on test."""
    rows = table[(table["split"] == "test") & (table["attack"] == "worst") & (table["subnet"] == "mean")]
    for _, row in rows.iterrows():
        print(
            f"{row['variant']:<20} mean of {row['num_archs']} subnets on test: clean {row['clean_acc']:.1%}, robust "
            f"{row['robust_acc']:.1%} ({row['robust_acc_low']:.1%} to {row['robust_acc_high']:.1%}); "
            f"{row['forward_equivalents']:,} forward-equivalents, {row['training_macs']:.3g} MACs"
        )


if __name__ == "__main__":
    run(main)
