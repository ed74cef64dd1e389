"""Seconds per subnet label: plain evaluation against this package's, and how cheap a label may be.

Rows E0 to E2 measure the same subnets of one trained supernet: recalibration of batch norm, clean accuracy, PGD. Before
anything is timed, plain and package form must agree in float64: statistics, clean accuracy, robust accuracy in both
accountings. The sweep then labels at least 30 subnets over the range of MACs with fewer steps, images and recalibration
images, and with gradients in bfloat16, and says how these labels rank the subnets, beside full PGD-20.

    python benchmarks/bench_eval.py --supernet FILE --train FILE --val FILE
    python benchmarks/bench_eval.py      # trains a small supernet on digits first
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import NOISY, Timing, computed_here, machine, require_positive, table, time_interleaved, write_rows
from eval_rows import LEVERS, ROWS, Label, Problem, equality, make_problem, read, require_equal, train_small

from proard.config import Attack
from proard.data import ImageSet
from proard.nets import Supernet
from proard.predictor.quality import spearman
from proard.progress import Progress
from proard.space import Arch, SearchSpace
from proard.space.sampling import stratified_sample

RESULTS = Path(__file__).parent / "results" / "bench_eval.json"
DTYPES = computed_here(dict.fromkeys(("float32", "bfloat16")), rounded=["bfloat16"])
FULL = 20  # PGD steps of the label that cheap ones are compared with


def spread_archs(space: SearchSpace, count: int, *, seed: int) -> list[Arch]:
    """Archs over the whole range of MACs, cheapest first."""
    genotypes, _ = stratified_sample(space, count, strata=min(10, count), seed=seed)
    order = np.argsort(space.costs(genotypes)["macs"], kind="stable")
    return [space.arch(genotype) for genotype in genotypes[order]]


def timed_calls(problem: Problem, archs: Sequence[Arch]) -> dict[str, Callable[[int], None]]:
    """Per row, a call that measures every arch and keeps the seconds of its parts in `problem.parts`."""
    plain = problem.contiguous()

    def call(row: str) -> Callable[[int], None]:
        def run(number: int) -> None:
            for arch in archs:
                label = ROWS[row](plain if row == "E0" else problem, arch)
                if number >= 0:
                    problem.parts.setdefault(row, []).append(facts_of(label))

        return run

    return {row: call(row) for row in LEVERS}


def facts_of(label: Label) -> dict[str, float]:
    """Seconds by part, accuracies, input gradients per image."""
    counts = {"clean_acc": float(label.clean.float().mean()), "robust_acc": float(label.robust.float().mean())}
    return {**label.seconds, **counts, "gradients": label.gradients / len(label.clean)}


def sweep(
    supernet: Supernet,
    train: ImageSet,
    val: ImageSet,
    archs: Sequence[Arch],
    *,
    steps: Sequence[int],
    images: Sequence[int],
    recalibrations: Sequence[int],
    dtypes: Sequence[str],
    full: Problem,
    plain_archs: int,
) -> list[dict[str, Any]]:
    """Seconds and rank correlation of cheap labels; the first row is the full label itself.

    The full label's ratio to plain evaluation (E0, on the same images) is the median over `plain_archs` archs of the
    range; a cheap label's is that times its ratio to the full one, the median over all archs.
    """
    counts = sorted({min(number, len(val)) for number in images})
    cells = list(product(steps, counts, recalibrations, dtypes))
    problems = {
        cell: make_problem(
            supernet,
            train,
            val,
            recalibration=cell[2],
            images=cell[1],
            attack=full.attack.model_copy(update={"num_steps": cell[0], "dtype": cell[3]}),
            eps=full.eps,
            batch_size=full.batch_size,
            seed=full.seed,
        )
        for cell in cells
    }
    key = (full.attack.num_steps, len(full.images), len(full.recalibration), full.attack.dtype)
    problems = {key: full, **{cell: problem for cell, problem in problems.items() if cell != key}}
    baseline, compared = (
        full.contiguous(),
        set(np.linspace(0, len(archs) - 1, plain_archs).round().astype(int).tolist()),
    )
    seconds: dict[Any, list[float]] = {cell: [] for cell in problems}
    labels: dict[Any, list[float]] = {cell: [] for cell in problems}
    plain: dict[int, float] = {}
    progress = Progress("sweep", len(archs), "archs")
    for number, arch in enumerate(archs):
        if number in compared:
            plain[number] = sum(ROWS["E0"](baseline, arch).seconds.values())
        for cell, problem in problems.items():
            label = ROWS["E2"](problem, arch)
            seconds[cell].append(sum(label.seconds.values()))
            labels[cell].append(float(label.robust.float().mean()))
        progress.advance()
    progress.close()
    over_plain = statistics.median(plain[i] / seconds[key][i] for i in plain)
    rows = []
    for cell in problems:
        over_full = statistics.median(a / b for a, b in zip(seconds[key], seconds[cell], strict=True))
        rho = rank_correlation(labels[cell], labels[key])
        name = f"PGD-{cell[0]}, {cell[1]:,} images, {cell[2]:,} for recalibration, {cell[3]} gradients"
        rows.append(
            {
                "bench": "eval_sweep",
                "lever": name if rho is None else f"{name}: rank correlation {rho:.3f}",
                "steps": cell[0],
                "images": cell[1],
                "recalibration": cell[2],
                "dtype": cell[3],
                "archs": len(archs),
                "seconds_per_label": round(statistics.median(seconds[cell]), 5),
                "ratio_plain": round(over_plain * over_full, 3),
                "ratio_full": round(over_full, 3),
                "spearman": rho,
                "mean_robust_acc": round(statistics.mean(labels[cell]), 5),
            }
        )
    return rows


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rho; None where all labels are equal, as those of a supernet that learnt nothing."""
    rho = spearman(np.asarray(first), np.asarray(second))
    return None if np.isnan(rho) else round(rho, 5)


def main(argv: Sequence[str] | None = None) -> None:
    """Check, time, print, and write one JSON line per row where asked."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.supernet:
        supernet, train, val = read(args.supernet, args.train, args.val)
    else:
        with tempfile.TemporaryDirectory() as folder:
            supernet, train, val = train_small(Path(folder), epochs=args.epochs, seed=args.seed)
    attack = Attack(num_steps=FULL, step_size=args.eps / 4)
    options = {"eps": args.eps, "seed": args.seed}
    few = attack.model_copy(update={"num_steps": 5})
    archs = spread_archs(supernet.space, max(args.archs, len(supernet.space.diagonal())), seed=args.seed)
    places = np.linspace(0, 1, args.timed_archs) if args.timed_archs > 1 else np.array([0.5])
    picked = [archs[i] for i in (places * (len(archs) - 1)).round().astype(int)]
    small = make_problem(supernet, train, val, recalibration=120, images=60, attack=few, batch_size=40, **options)
    differences = equality(small, picked[:2])
    require_equal(differences)
    print(f"plain and package form agree; statistics to {differences['statistics']:.1e}", flush=True)

    full = make_problem(
        supernet, train, val, recalibration=args.recalibration, images=args.images, attack=attack, **options
    )
    facts = machine()
    timings, spread = time_interleaved(timed_calls(full, picked), rounds=args.rounds, label="labels")
    run = {
        "space": supernet.space.settings.name,
        "supernet": "given" if args.supernet else "digits, trained here",
        "archs": [{"arch_id": arch.arch_id, "macs": supernet.space.spec(arch).macs} for arch in picked],
        "images": len(full.images),
        "recalibration": len(full.recalibration),
        "num_steps": FULL,
        "eps": args.eps,
        "rounds": args.rounds,
        "labels": args.labels,
        "seed": args.seed,
        "baseline_spread": round(spread, 4),
        "noisy": spread > NOISY,
        "differences": differences,
        "machine": facts,
    }
    rows = [_json_row(row, timing, full, args) | run for row, timing in timings.items()]
    print(_report(rows, run), flush=True)
    if args.archs:
        swept = sweep(
            supernet,
            train,
            val,
            archs,
            steps=args.sweep_steps,
            images=args.sweep_images,
            recalibrations=args.sweep_recalibration,
            dtypes=args.sweep_dtypes,
            full=full,
            plain_archs=args.timed_archs,
        )
        print(_sweep_report(swept, FULL))
        rows += [row | {"machine": facts, "space": run["space"], "eps": args.eps} for row in swept]
    if args.json:
        write_rows(args.json, rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--supernet", metavar="FILE", help="supernet.safetensors; without it one is trained on digits")
    parser.add_argument("--train", metavar="FILE", help="train.safetensors of its run")
    parser.add_argument("--val", metavar="FILE", help="val.safetensors of its run")
    parser.add_argument("--epochs", type=int, default=8, help="of teacher and supernet, where one is trained")
    parser.add_argument("--eps", type=float, help="radius in pixel units; 8/255, or 0.15 on digits; steps are eps/4")
    parser.add_argument("--images", type=int, default=1000, help="val images of the full label, at most all")
    parser.add_argument("--recalibration", type=int, default=1000, help="train images that reset batch norm")
    parser.add_argument("--timed-archs", type=int, default=3, help="subnets of the ladder, and of the sweep's baseline")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count; medians are over them")
    parser.add_argument("--archs", type=int, default=30, help="subnets of the sweep; 0 leaves it out")
    parser.add_argument("--sweep-steps", nargs="+", type=int, default=[5, 7, 10])
    parser.add_argument("--sweep-images", nargs="+", type=int, default=[250, 500, 1000])
    parser.add_argument("--sweep-recalibration", nargs="+", type=int, default=[250, 1000])
    parser.add_argument("--sweep-dtypes", nargs="+", choices=["float32", "bfloat16"], default=list(DTYPES))
    parser.add_argument("--labels", type=int, default=2000, help="subnets of the predicted hours")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of archs and noise")
    parser.add_argument("--json", nargs="?", const=str(RESULTS), metavar="FILE", help=f"default {RESULTS.name}")
    parser.add_argument("--quick", action="store_true", help="1 epoch, 60 images, 6 archs: shows that it runs")
    args = parser.parse_args(argv)
    given = [args.supernet, args.train, args.val]
    if any(given) and not all(given):
        parser.error("--supernet, --train and --val go together: all three, or none to train on digits")
    if args.eps is None:
        args.eps = 8 / 255 if args.supernet else 0.15
    if args.quick:
        args.epochs, args.images, args.recalibration, args.timed_archs, args.rounds = 1, 60, 120, 1, 2
        args.archs, args.sweep_steps, args.sweep_images, args.sweep_recalibration = 6, [5], [40], [120]
    require_positive(parser, args, "images", "recalibration", "timed_archs", "rounds", "threads", "epochs")
    return args


def _json_row(row: str, timing: Timing, problem: Problem, args: argparse.Namespace) -> dict[str, Any]:
    """Collect what is particular to a row of the ladder."""
    parts, seconds = problem.parts[row], timing.seconds / args.timed_archs
    mean = {name: statistics.mean(part[name] for part in parts) for name in ("clean_acc", "robust_acc", "gradients")}
    split = {name: statistics.median(part.get(name, 0.0) for part in parts) for name in PARTS}
    return {
        "bench": "eval",
        "row": row,
        "lever": LEVERS[row],
        "baseline": "plain PGD",
        "ratio_total": round(timing.ratio_total, 4),
        "ratio_previous": round(timing.ratio_previous, 4),
        "seconds_per_label": round(seconds, 5),
        **{f"seconds_{name}": round(value, 5) for name, value in split.items()},
        "alive": round(mean["gradients"] / FULL, 4),
        "clean_acc": round(mean["clean_acc"], 5),
        "robust_acc": round(mean["robust_acc"], 5),
        "hours_for_labels": round(args.labels * seconds / 3600, 4),
    }


PARTS = ("materialise", "recalibrate", "attack")


def _report(rows: Sequence[dict[str, Any]], run: dict[str, Any]) -> str:
    """Compose the ladder and what it was measured on."""
    header = ("row", "total", "over previous", "s/label", *PARTS, "alive", "robust", f"h for {run['labels']}", "lever")
    cells = [
        (
            row["row"],
            f"{row['ratio_total']:.2f}",
            f"{row['ratio_previous']:.2f}",
            f"{row['seconds_per_label']:.3f}",
            *(f"{row[f'seconds_{part}']:.3f}" for part in PARTS),
            f"{row['alive']:.2f}",
            f"{row['robust_acc']:.3f}",
            f"{row['hours_for_labels']:.2f}",
            row["lever"],
        )
        for row in rows
    ]
    macs = ", ".join(f"{arch['macs'] / 1e6:.2f} M" for arch in run["archs"])
    return "\n".join(
        [
            table(header, cells),
            "",
            f"{run['space']} ({run['supernet']}), subnets of {macs} MACs, {run['images']} images, "
            f"PGD-{run['num_steps']}, {run['recalibration']} recalibration images, medians of {run['rounds']} rounds",
            ", ".join(f"{key} {value}" for key, value in run["machine"].items()),
            f"baseline timed twice: spread {run['baseline_spread']:.1%}"
            + (" - NOISY, do not quote these ratios" if run["noisy"] else ""),
        ]
    )


def _sweep_report(rows: Sequence[dict[str, Any]], full_steps: int) -> str:
    """Compose the table of cheap labels, dearest first."""
    header = (
        "steps",
        "images",
        "recalibration",
        "gradients",
        "s/label",
        "over plain",
        "over full",
        "mean robust",
        "Spearman",
    )
    cells = [
        (
            str(row["steps"]),
            str(row["images"]),
            str(row["recalibration"]),
            row["dtype"],
            f"{row['seconds_per_label']:.4f}",
            f"{row['ratio_plain']:.1f}",
            f"{row['ratio_full']:.2f}",
            f"{row['mean_robust_acc']:.3f}",
            "-" if row["spearman"] is None else f"{row['spearman']:.3f}",
        )
        for row in sorted(rows, key=lambda row: -row["seconds_per_label"])
    ]
    return "\n".join(
        [
            "",
            table(header, cells),
            f"{rows[0]['archs']} subnets over the range of MACs; Spearman's rho of robust accuracy "
            f"with PGD-{full_steps} on {rows[0]['images']} images after {rows[0]['recalibration']} "
            "recalibration images,",
            "of which a cheap label's images are the first",
        ]
    )


if __name__ == "__main__":
    main()
