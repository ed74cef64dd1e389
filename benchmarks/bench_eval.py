"""Seconds per subnet label: plain evaluation against this package's, and the quality of cheap labels.

E0 to E2 measure the same subnets of one trained supernet; plain and package form must agree in float64 first. The sweep
labels subnets over the range of MACs with fewer steps, images and recalibration images, and with gradients in bfloat16,
and reports the rank correlation of these labels with full PGD-20.

    python benchmarks/bench_eval.py --supernet FILE --train FILE --val FILE
    python benchmarks/bench_eval.py      # trains a small supernet on digits first
"""

from __future__ import annotations

import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from common import Call, Options, Row, Timing, computed_here, ladder, machine, show, write_rows
from eval_rows import LEVERS, ROWS, Problem, equality, make_problem, read, require_equal, train_small

from proard.config import Attack
from proard.predictor.quality import spearman
from proard.progress import Progress
from proard.space import Arch, SearchSpace
from proard.space.sampling import stratified_sample

DTYPES = computed_here(dict.fromkeys(("float32", "bfloat16")), rounded=["bfloat16"])
FULL = 20  # PGD steps of the label that cheap ones are compared with
PARTS = ("materialise", "recalibrate", "attack")
COLUMNS = {"ratio_total": "total:.2f", "ratio_previous": "over previous:.2f", "seconds_per_label": "s/label:.3f"}
COLUMNS |= {f"seconds_{part}": f"{part}:.3f" for part in PARTS}
COLUMNS |= {"alive": "alive:.2f", "robust_acc": "robust:.3f", "hours_for_labels": "hours:.2f"}
SWEPT = {"seconds_per_label": "s/label:.4f", "ratio_plain": "over plain:.1f", "ratio_full": "over full:.2f"}
SWEPT |= {"mean_robust_acc": "mean robust:.3f", "spearman": "Spearman:.3f"}


def spread_archs(space: SearchSpace, count: int, *, seed: int) -> list[Arch]:
    """Archs over the whole range of MACs, cheapest first."""
    genotypes, _ = stratified_sample(space, count, strata=min(10, count), seed=seed)
    order = np.argsort(space.costs(genotypes)["macs"], kind="stable")
    return [space.arch(genotype) for genotype in genotypes[order]]


def spread_over(count: int, among: int) -> list[int]:
    """Indices spread evenly over the range, with both ends; a single one is the middle."""
    places = np.linspace(0, among - 1, count) if count > 1 else np.array([(among - 1) / 2])
    return places.round().astype(int).tolist()


def timed_calls(problem: Problem, archs: Sequence[Arch]) -> dict[str, Call]:
    """Per row, a call that measures every arch and keeps the seconds of its parts in `problem.parts`."""
    plain = problem.contiguous()

    def call(row: str, number: int) -> None:
        for arch in archs:
            label = ROWS[row](plain if row == "E0" else problem, arch)
            seen = {name: float(getattr(label, name).float().mean()) for name in ("clean", "robust")}
            facts = {**label.seconds, **seen, "gradients": label.gradients / len(label.clean)}
            problem.parts.setdefault(row, []).extend([facts] if number >= 0 else [])

    return {row: partial(call, row) for row in LEVERS}


def sweep(
    problem_of: Callable[..., Problem],
    archs: Sequence[Arch],
    cells: Sequence[tuple[int, int, int, str]],
    full: Problem,
    *,
    plain_archs: int,
) -> list[Row]:
    """Seconds and rank correlation of cheap labels; the first row is the full label itself.

    `cells` are steps, images, recalibration images and type; `problem_of` makes a label's problem. The full label's
    ratio to plain evaluation (E0, on the same images) is the median over `plain_archs` archs of the range; a cheap
    label's is that times its ratio to the full one, the median over all archs.
    """
    key = (full.attack.num_steps, len(full.images), len(full.recalibration), full.attack.dtype)
    problems = {key: full}
    for steps, images, recalibration, dtype in cells:
        attack = full.attack.model_copy(update={"num_steps": steps, "dtype": dtype})
        made = problem_of(recalibration=recalibration, images=images, attack=attack)
        problems.setdefault((steps, len(made.images), recalibration, dtype), made)
    baseline, compared = full.contiguous(), spread_over(plain_archs, len(archs))
    plain, found = {}, {cell: [] for cell in problems}
    progress = Progress("sweep", len(archs), "archs")
    for number, arch in enumerate(archs):
        if number in compared:
            plain[number] = sum(ROWS["E0"](baseline, arch).seconds.values())
        for cell, problem in problems.items():
            label = ROWS["E2"](problem, arch)
            found[cell].append((sum(label.seconds.values()), float(label.robust.float().mean())))
        progress.advance()
    progress.close()
    seconds, labels = ({cell: np.asarray(pairs)[:, place] for cell, pairs in found.items()} for place in (0, 1))
    over_plain, rows = np.median([plain[i] / seconds[key][i] for i in plain]), []
    for cell in problems:
        over_full, rho = np.median(seconds[key] / seconds[cell]), spearman(labels[cell], labels[key])
        rho = None if np.isnan(rho) else round(rho, 5)  # all labels are equal: the supernet is untrained
        name = f"PGD-{cell[0]}, {cell[1]:,} images, {cell[2]:,} for recalibration, {cell[3]} gradients"
        row = {"bench": "eval_sweep", "lever": name if rho is None else f"{name}: rank correlation {rho:.3f}"}
        row |= dict(zip(("steps", "images", "recalibration", "dtype"), cell, strict=True)) | {"archs": len(archs)}
        row |= {"seconds_per_label": round(float(np.median(seconds[cell])), 5), "spearman": rho}
        row |= {"ratio_plain": round(float(over_plain * over_full), 3), "ratio_full": round(float(over_full), 3)}
        rows.append(row | {"mean_robust_acc": round(float(labels[cell].mean()), 5)})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Check, time, print, and write one JSON line per row with `--json`."""
    args = parse(argv)
    if args.supernet:
        supernet, *data = read(args.supernet, args.train, args.val)
    else:
        with tempfile.TemporaryDirectory() as folder:
            supernet, *data = train_small(Path(folder), epochs=args.epochs, seed=args.seed)
    space, attack = supernet.space, Attack(num_steps=FULL, step_size=args.eps / 4)

    def problem_of(attack: Attack = attack, **how: int) -> Problem:
        return make_problem(supernet, *data, attack=attack, eps=args.eps, seed=args.seed, **how)

    few = attack.model_copy(update={"num_steps": 5})
    archs = spread_archs(space, max(args.archs, len(space.diagonal())), seed=args.seed)
    picked = [archs[place] for place in spread_over(args.timed_archs, len(archs))]
    differences = equality(problem_of(few, recalibration=120, images=60, batch_size=40), picked[:2])
    require_equal(differences)
    print(f"plain and package form agree; statistics to {differences['statistics']:.1e}", flush=True)

    full, facts = problem_of(recalibration=args.recalibration, images=args.images), {"machine": machine()}
    facts |= {"space": space.settings.name, "eps": args.eps}
    counts = {"images": len(full.images), "recalibration": len(full.recalibration), "num_steps": FULL}
    run = facts | counts | {"supernet": "given" if args.supernet else "digits, trained here", "labels": args.labels}
    run |= {"archs": [{"arch_id": arch.arch_id, "macs": space.spec(arch).macs} for arch in picked]}
    run |= {"seed": args.seed, "differences": differences}
    title = f"labels on {run['space']} ({run['supernet']}), "
    title += ", ".join(f"{key} {value}" for key, value in counts.items()) + f", hours for {args.labels} labels"
    how = {"rounds": args.rounds, "baseline": "plain PGD", "facts": run, "own": partial(facts_of, full, args)}
    rows = ladder("eval", timed_calls(full, picked), LEVERS, COLUMNS, title=title, **how)
    if args.archs:
        cells = product(args.sweep_steps, args.sweep_images, args.sweep_recalibration, args.sweep_dtypes)
        swept = sweep(problem_of, archs, list(cells), full, plain_archs=args.timed_archs)
        swept = [row | facts for row in swept]
        title = f"{len(archs)} subnets over the range of MACs; Spearman's rho of robust accuracy with the first label"
        show(title, sorted(swept, key=lambda row: -row["seconds_per_label"]), SWEPT)
        rows += swept
    write_rows(args.json, rows)


def facts_of(problem: Problem, args: Namespace, row: str, timing: Timing) -> Row:
    """Facts of one row of the ladder."""
    parts, seconds = problem.parts[row], timing.seconds / args.timed_archs
    mean = {name: statistics.mean(part[name] for part in parts) for name in ("clean", "robust", "gradients")}
    split = {name: statistics.median(part.get(name, 0.0) for part in parts) for name in PARTS}
    times = {"seconds_per_label": seconds, **{f"seconds_{name}": value for name, value in split.items()}}
    times |= {"clean_acc": mean["clean"], "robust_acc": mean["robust"]}
    rounded = {name: round(value, 5) for name, value in times.items()} | {"alive": round(mean["gradients"] / FULL, 4)}
    return rounded | {"hours_for_labels": round(args.labels * seconds / 3600, 4)}


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    quick = {"epochs": 1, "images": 60, "recalibration": 120, "timed_archs": 1, "rounds": 2, "archs": 6}
    options = Options(
        __doc__,
        "eval",
        quick=quick | {"sweep_steps": [5], "sweep_images": [40], "sweep_recalibration": [120]},
        threads=(1, "of torch"),
        zero=["archs", "labels"],
        supernet=(None, "supernet.safetensors; without it one is trained on digits", str),
        train=(None, "train.safetensors of its run", str),
        val=(None, "val.safetensors of its run", str),
        epochs=(8, "of teacher and supernet, if one is trained"),
        eps=(None, "radius in pixel units; 8/255, or 0.15 on digits; steps are eps/4", float),
        images=(1000, "val images of the full label, at most all"),
        recalibration=(1000, "train images that reset batch norm"),
        timed_archs=(3, "subnets of the ladder, and of the sweep's baseline"),
        rounds=(3, "rounds that count; medians are over them"),
        archs=(30, "subnets of the sweep; 0 leaves it out"),
        sweep_steps=([5, 7, 10], "PGD steps of cheap labels"),
        sweep_images=([250, 500, 1000], "their images"),
        sweep_recalibration=([250, 1000], "their recalibration images"),
        sweep_dtypes=(list(DTYPES), "types of their gradients", ["float32", "bfloat16"]),
        labels=(2000, "subnets of the predicted hours"),
    )
    args = options.read(argv)
    given = [args.supernet, args.train, args.val]
    if any(given) and not all(given):
        options.error("--supernet, --train and --val go together: all three, or none to train on digits")
    args.eps = args.eps or (8 / 255 if args.supernet else 0.15)
    return args


if __name__ == "__main__":
    main()
