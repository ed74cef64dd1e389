"""The quick start end to end, stage by stage; with `--plain`, its training stages in plain form beside it.

Without `--plain` the whole workflow runs in a temporary folder and the seconds of its stages are read from Snakemake's
benchmark records (`--results FOLDER`: of a run that is there already). Nothing is compared then, so nothing is checked.

`--plain` compares the training stages alone, cut to a few epochs: data, seeds and recipe are the quick start's, one
process, interleaved. Losses of both forms must agree within 2 % and validation accuracies within two standard errors.

    python benchmarks/bench_pipeline.py --help
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from common import NOISY, Timing, machine, table, time_interleaved, write_rows

from proard.artifacts import read_table
from proard.config import RunConfig, job_settings, load
from proard.stages import prepare_data, train_phase, train_teacher

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "bench_pipeline.json"
SAME_LOSS = 0.02
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Run or read the quick start; compare its training stages where asked."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    rows = compared(args) if args.plain else stages(args)
    if args.json:
        write_rows(args.json, rows)
    cells = [(row["row"], *(f"{row[key]:.2f}" if key in row else "-" for key in ("ratio_plain",))) for row in rows]
    seconds = [f"{row['seconds']:.1f}" for row in rows]
    header = ("stage", "/plain", "seconds", "what")
    print(table(header, [(*c, s, row["lever"]) for c, s, row in zip(cells, seconds, rows, strict=True)]))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "config" / "quickstart.yaml"))
    parser.add_argument("--results", metavar="FOLDER", help="read the records of this run, as in results/quickstart")
    parser.add_argument("--plain", action="store_true", help="compare the training stages with their plain form")
    parser.add_argument("--epochs", type=int, default=2, help="of every training stage under --plain")
    parser.add_argument("--rounds", type=int, default=3, help="under --plain; medians are over them")
    parser.add_argument("--threads", type=int, default=2, help="cores of the workflow, threads under --plain")
    parser.add_argument("--json", nargs="?", const=str(RESULTS), metavar="FILE", help=f"default {RESULTS.name}")
    parser.add_argument("--quick", action="store_true", help="--plain with one epoch, one round: shows that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.plain, args.epochs, args.rounds = True, 1, 1
    return args


# --- the whole workflow --------------------------------------------------------------------------------------------


def stages(args: argparse.Namespace) -> list[Row]:
    """One row per stage, and one for the whole run where it was started here."""
    if args.results:
        return stage_rows(Path(args.results))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflow" / "Snakefile")]
        command += ["--configfile", args.config, "--directory", folder, "--cores", str(args.threads)]
        start = time.perf_counter()
        if subprocess.run([*command, "--quiet", "all"], check=False).returncode:
            raise SystemExit("the workflow failed; its output above says where")
        wall = time.perf_counter() - start
        run = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))["run"]
        rows = stage_rows(Path(folder) / "results" / run)
    return [*rows, _row("whole run", wall, "wall clock, workflow's own time included", machine=machine())]


def stage_rows(results: Path) -> list[Row]:
    """Seconds of every stage from the records of a run.

    Raises
    ------
    SystemExit
        There are none.
    """
    folder = results / "benchmarks"
    found: dict[str, list[dict[str, str]]] = {}
    for path in sorted(folder.rglob("*.tsv")):
        with path.open(encoding="utf-8", newline="") as file:
            found.setdefault(path.relative_to(folder).parts[0].removesuffix(".tsv"), []).extend(
                csv.DictReader(file, delimiter="\t")
            )
    if not found:
        raise SystemExit(f"{folder} holds no benchmark records; run the workflow, or name another run with --results")
    rows = []
    for stage, jobs in found.items():
        memory = max((float(job["max_rss"]) for job in jobs if job.get("max_rss", "-") not in ("-", "NA")), default=0.0)
        label = f"{len(jobs)} jobs" if len(jobs) > 1 else "1 job"
        rows.append(_row(stage, sum(float(job["s"]) for job in jobs), f"{label}, at most {memory:.0f} MiB"))
    return rows


def _row(stage: str, seconds: float, lever: str, **more: Any) -> Row:
    """A row of the table."""
    return {"bench": "pipeline", "row": stage, "seconds": round(seconds, 2), "lever": lever, **more}


# --- training stages beside their plain form -----------------------------------------------------------------------


def compared(args: argparse.Namespace) -> list[Row]:
    """Time `train_teacher` and the first phase in both forms, after checking that they train the same."""
    config = cut(Path(args.config), args.epochs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [f"--{split}={folder / split}.safetensors" for split in ("train", "val", "test")]
        sections = job_settings(config, "prepare_data")
        prepare_data.main([f"--settings={sections}", *files, f"--manifest={folder}/manifest.json", "--device=cpu"])
        rows = []
        for stage, call in calls(config, folder, args.threads).items():
            call("plain")(-1)
            call("package")(-1)
            require_same(folder, stage)
            forms = {form: call(form) for form in ("plain", "package")}
            timings, spread = time_interleaved(forms, rounds=args.rounds, label=stage, plain="plain")
            rows += [_compared_row(stage, form, timing, spread, args) for form, timing in timings.items()]
    return rows


def cut(path: Path, epochs: int) -> RunConfig:
    """The run's configuration with short trainings that are validated once, at their end."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    teacher, phases = values["train_teacher"], values["train_phase"]
    for section in (teacher, phases):
        section["epochs"], section["warmup_epochs"] = epochs, 0
        section["validation"] = {**section["validation"], "every_epochs": epochs}
    first = {key: value for key, value in phases["phases"][0].items() if key != "epochs"}
    phases["phases"] = [first, *phases["phases"][1:]]
    return load(values)


def calls(config: RunConfig, folder: Path, threads: int) -> dict[str, Callable[[str], Callable[[int], None]]]:
    """Per stage and form, a call that trains once; each form has files of its own, the phase the package's teacher."""
    data = [f"--{split}={folder / split}.safetensors" for split in ("train", "val")]
    common = [*data, "--device=cpu", f"--threads={threads}", f"--seed={config.seed}"]
    phase = config.train_phase.phases[0].name

    def teacher(form: str) -> Callable[[int], None]:
        files = [f"--teacher={folder}/{form}-teacher.safetensors", f"--history={folder}/{form}-train_teacher.parquet"]
        return stage(train_teacher.main, form, [f"--settings={job_settings(config, 'train_teacher')}", *files])

    def first_phase(form: str) -> Callable[[int], None]:
        files = [f"--teacher={folder}/package-teacher.safetensors", f"--supernet={folder}/{form}.safetensors"]
        files += [f"--history={folder}/{form}-train_phase.parquet"]
        settings = job_settings(config, "train_phase", phase=phase)
        return stage(train_phase.main, form, [f"--settings={settings}", *files])

    def stage(run: Callable[[list[str]], None], form: str, flags: list[str]) -> Callable[[int], None]:
        from plain_training import plain_form

        def call(number: int) -> None:
            with plain_form() if form == "plain" else nullcontext():
                run([*common, *flags])

        return call

    return {"train_teacher": teacher, "train_phase": first_phase}


def require_same(folder: Path, stage: str) -> None:
    """Both forms' histories agree at their end.

    Raises
    ------
    SystemExit
        They do not; the text has the figures.
    """
    ends = [read_table(folder / f"{form}-{stage}.parquet").iloc[-1] for form in ("plain", "package")]
    losses = [float(end["loss"]) for end in ends]
    wrong = [f"loss {losses}"] if abs(losses[0] - losses[1]) > SAME_LOSS * losses[0] else []
    for column in ("val_clean_acc", "val_robust_acc"):
        shares = [float(end[column]) for end in ends]
        noise = 2 * (2 * shares[0] * (1 - shares[0]) / float(ends[0]["val_num_images"])) ** 0.5
        wrong += [f"{column} {shares}"] if not abs(shares[0] - shares[1]) <= noise + 1e-9 else []
    if wrong:
        raise SystemExit(f"{stage}: plain form and package train differently, nothing is timed: {', '.join(wrong)}")


def _compared_row(stage: str, form: str, timing: Timing, spread: float, args: argparse.Namespace) -> Row:
    """A row of the comparison."""
    return _row(
        f"{stage}, {form}",
        timing.seconds,
        f"{args.epochs} epochs and one validation",
        ratio_plain=round(timing.ratio_plain, 4),
        baseline_spread=round(spread, 4),
        noisy=spread > NOISY,
        config=json.dumps(Path(args.config).name),
        rounds=args.rounds,
        machine=machine(),
    )


if __name__ == "__main__":
    main()
