"""Put the shards' measurements into one table and check that it is complete: shards' table.parquet -> table.parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from proard import artifacts
from proard.artifacts import MEASURED, ArtifactError
from proard.config import UserError
from proard.space.sampling import shard_names
from proard.stages.common import parse_arguments, run

SHARED_INPUTS = ("supernet.safetensors", "train.safetensors", "val.safetensors")  # the same files for every shard
THREAT = ["norm", "eps"]
ACCURACIES = ("clean_acc", "robust_acc")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    job = parse_arguments(
        __doc__,
        argv,
        stage="merge_table",
        reads=["archs"],
        lists=["shards"],
        writes=["table"],
        optional=["per_shard"],
        runs_networks=False,
    )
    archs = artifacts.read_table(job.files.archs, columns=["arch_id"])
    paths = shard_files(job.files.shards, job.files.per_shard, len(archs))
    check_origin(paths, job.config.run)
    shards = [artifacts.read_table(path, columns=MEASURED) for path in paths]
    table = merge(shards, list(archs["arch_id"]))
    inputs = {path: artifacts.sha256(path) for path in paths}  # by path: all shards have one file name
    provenance = job.provenance(job.files.archs)
    provenance = replace(provenance, inputs={**provenance.inputs, **inputs})
    artifacts.write_table(job.files.table, table, MEASURED, provenance)
    accuracy = [f"{name} {100 * table[name].min():.1f} to {100 * table[name].max():.1f} %" for name in ACCURACIES]
    print(f"{len(table)} rows of {len(archs)} archs from {len(shards)} shards; " + ", ".join(accuracy))
    job.record_costs()


def shard_files(named: Sequence[str], per_shard: str | None, num_archs: int) -> list[str]:
    """The shards' tables: those that were named, or those in one folder, of `per_shard` archs each.

    Raises
    ------
    UserError
        A folder was named without `per_shard`.
    """
    if len(named) != 1 or not Path(named[0]).is_dir():
        return list(named)
    if per_shard is None or not per_shard.isdigit() or per_shard == "0":
        raise UserError(f"--shards {named[0]} is a folder; --per-shard says how many archs each shard in it has")
    return [f"{named[0]}/{name}/table.parquet" for name in shard_names(num_archs, int(per_shard))]


def merge(shards: Sequence[pd.DataFrame], arch_ids: Sequence[str]) -> pd.DataFrame:
    """Concatenate measured rows, sorted by MACs.

    Parameters
    ----------
    shards : sequence of DataFrame
        Rows with the columns of `artifacts.MEASURED`.
    arch_ids : sequence of str
        The archs that must occur, once per attack and split.

    Raises
    ------
    ArtifactError
        An arch is missing, measured twice or not asked for, or the threat model differs between rows.
    """
    table = pd.concat([shard[list(MEASURED)] for shard in shards if len(shard)] or shards, ignore_index=True)
    if table.empty:
        raise ArtifactError("the shards hold no rows; rerun evaluate_archs")
    threats = table[THREAT].drop_duplicates()
    if len(threats) > 1:
        found = " and ".join(f"{row.norm} {row.eps:.4f}" for row in threats.itertuples())
        raise ArtifactError(f"the shards were measured under different threat models, {found}; rerun evaluate_archs")
    for (attack, split), rows in table.groupby(["attack", "split"]):
        found = rows["arch_id"]
        where = f"attack {attack} on {split}"
        _refuse(f"{where}: no row for", set(arch_ids) - set(found), "rerun evaluate_archs for their shard")
        _refuse(f"{where}: more than one row for", set(found[found.duplicated()]), "their shards overlap")
        _refuse(f"{where}: rows for archs that archs.parquet does not list,", set(found) - set(arch_ids), "old shards")
    return table.sort_values(["macs", "arch_id", "attack", "split"], ignore_index=True)


def check_origin(paths: Sequence[str], run_name: str) -> None:
    """Refuse shards of another run, and shards that were measured on different supernets or images.

    Raises
    ------
    ArtifactError
        Names the shard, or the two shards and the input in which they differ.
    """
    first: dict[str, tuple[str, str]] = {}
    for path in paths:
        metadata = artifacts.read_metadata(path)
        if metadata.get("run", run_name) != run_name:
            raise ArtifactError(f"{path} is of run {metadata['run']!r}, expected {run_name!r}; rerun evaluate_archs")
        inputs = metadata.get("inputs", {})
        for name in SHARED_INPUTS:
            if name not in inputs:
                continue
            checksum, other = first.setdefault(name, (inputs[name], path))
            if checksum != inputs[name]:
                raise ArtifactError(
                    f"{other} and {path} were measured on different {name} ({checksum[:12]} and {inputs[name][:12]}); "
                    "rerun evaluate_archs for the older one"
                )


def _refuse(what: str, arch_ids: set[str], way_out: str) -> None:
    """Raise if any archs are left, naming the first few."""
    if arch_ids:
        names = sorted(arch_ids)
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise ArtifactError(f"{what} {', '.join(names[:8])}{more}; {way_out}")


if __name__ == "__main__":
    run(main)
