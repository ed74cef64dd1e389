"""All checks, in the order in which a run would fail."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from proard.config import ConfigError, RunConfig, UserError, load, read_file
from proard.doctor import cluster, here
from proard.doctor.finding import Finding, failure

PROFILES = ("{name}/profile.yaml", "workflow/profiles/{name}/profile.yaml")  # from the repository's root


def checkup(
    *,
    profile: str | None = "slurm",
    configs: Sequence[str | Path] = (),
    directory: str | Path = ".",
    jobs: bool = True,
    patience: float = 180.0,
) -> Iterator[Finding]:
    """Check common causes of failure of a first run.

    Parameters
    ----------
    profile : str, optional
        Snakemake's profile, a name or a folder; None checks this machine only.
    configs : sequence of path
        Config files of a run, whose needs are compared with the machine; later files override earlier ones.
    directory : path
        Snakemake's working folder, which holds `results/`.
    jobs : bool
        Whether to submit test jobs that check the nodes.
    patience : float
        Seconds to wait for each of them.

    Yields
    ------
    Finding
        As each check ends.

    Raises
    ------
    UserError
        There is no such profile, or it cannot be read.
    """
    results = Path(directory) / "results"
    yield here.python()
    yield from here.packages()
    run = None
    if configs:
        try:
            run = load(merged([read_file(path) for path in configs]))
            yield Finding("config", f"run {run.run}: {', '.join(map(str, configs))}")
        except ConfigError as error:
            yield failure("config", str(error), "config/README.md lists the keys")
    yield here.torch_and_gpu()
    yield here.arithmetic()
    yield here.file_system(results)
    yield here.room(results, run)
    if profile is not None:
        yield from on_cluster(profile, run, results, jobs=jobs, patience=patience)


def on_cluster(profile: str, run: RunConfig | None, results: Path, *, jobs: bool, patience: float) -> Iterator[Finding]:
    """The checks that need SLURM; they stop if its commands are missing."""
    where = find_profile(profile)
    settings = read_file(where)
    if settings.get("executor") != "slurm":
        yield Finding("profile", f"{where} submits no jobs: executor is {settings.get('executor', 'local')}")
        return
    reached = cluster.controller()
    yield reached
    if reached.fails:
        return
    for finding in (here.environment(), cluster.status_of_jobs(settings, where), cluster.arrays(settings, run, where)):
        if finding is not None:
            yield finding
    for kind, resources in cluster.requested_resources(settings).items():
        accepted = cluster.acceptance(kind, resources, where)
        yield accepted
        if jobs and not accepted.fails:
            yield from cluster.job(kind, resources, results, patience=patience)


def find_profile(name: str) -> Path:
    """File of a profile, as Snakemake finds it from this folder."""
    tried = [Path(pattern.format(name=name)) for pattern in PROFILES]
    for path in tried:
        if path.is_file():
            return path
    raise UserError(f"no profile {name}: neither {tried[0]} nor {tried[1]}; run this from the repository's root")


def merged(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Config files merged key by key, as Snakemake does it."""
    result: dict[str, Any] = {}
    for config in configs:
        for key, value in config.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged([result[key], value]) if both else value
    return result
