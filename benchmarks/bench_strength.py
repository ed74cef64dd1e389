"""How strong the measuring attacks are, what they cost, and which cheap one ranks subnets as the strong ones do.

First the students of a run on its test images, under each list of attacks in turn, with `--noises` seeds of the start
noise: robust images, gradients and seconds. With `--autoattack` the standard AutoAttack stands beside them (package
pyautoattack; it attacks every image).
Then `--archs` subnets over the range of MACs on val: robust accuracy under cheap attacks, their rank correlation with
the worst case of the default list, and seconds.

    python benchmarks/bench_strength.py --results results/quickstart --autoattack
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from bench_eval import spread_archs
from common import Options, Row, machine, show, write_rows
from eval_rows import read

from proard.config import Attack, Measurement, Threat
from proard.config.attacks import STRONG
from proard.data import ImageSet, load_split, to_float
from proard.evaluation import Conditions, measure
from proard.export import load_student
from proard.nets import FoldedNet, extract, fold, recalibrate
from proard.predictor.quality import kendall_tau, spearman
from proard.progress import Progress

EARLIER = (
    Attack(),
    Attack(name="pgd50x2", num_steps=50, restarts=2),
    Attack(name="cw50x2", objective="margin", num_steps=50, restarts=2),
)
LISTS = {"earlier": EARLIER, "default": STRONG}
SCHEDULE = ("eps", "eps/4", "eps/16")
CHEAP = {
    "ce, 5 steps": Attack(num_steps=5),
    "ce, 10 steps": Attack(num_steps=10),
    "ce, 20 steps": Attack(),
    "ce, 20 steps, schedule": Attack(step_size=SCHEDULE),
    "margin, 5 steps": Attack(objective="margin", num_steps=5),
    "margin, 10 steps": Attack(objective="margin", num_steps=10),
    "margin, 10 steps, schedule": Attack(objective="margin", num_steps=10, step_size=SCHEDULE),
    "margin, 20 steps": Attack(objective="margin"),
    "margin, 20 steps, schedule": Attack(objective="margin", step_size=SCHEDULE),
    "2 targets, 10 steps, schedule": Attack(objective="targeted", targets=2, num_steps=10, step_size=SCHEDULE),
    "3 targets, 10 steps, schedule": Attack(objective="targeted", targets=3, num_steps=10, step_size=SCHEDULE),
    "3 targets, 20 steps, schedule": Attack(objective="targeted", targets=3, step_size=SCHEDULE),
}
STUDENTS = {"images": "images:d", "clean": "clean:d", "robust": "robust:d", "points": "less AutoAttack:+.2f"}
STUDENTS |= {"points_low": "lowest:+.2f", "points_high": "highest:+.2f"}
STUDENTS |= {"missed": "missed:d", "found": "found:d", "gradients": "gradients/image:.1f", "seconds": "s:.2f"}
LABELS = {"seconds": "s/label:.3f", "gradients": "gradients/image:.1f", "mean_robust_acc": "mean robust:.3f"}
LABELS |= {"kendall": "Kendall:.3f", "spearman": "Spearman:.3f"}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write one JSON line per row where asked."""
    args = parse(argv)
    folder, conditions = Path(args.results), Conditions(Threat(eps=args.eps), Measurement(), args.seed)
    facts = {"eps": args.eps, "seed": args.seed, "machine": machine()}
    test = load_split(folder / "prepare_data" / "test.safetensors").first(args.images)
    files = sorted(folder.glob("export_student/*/student.safetensors"), key=lambda path: path.stat().st_size)
    rows = []
    for path in files:
        net = load_student(path)
        others = {"autoattack": autoattack(net, test, args)} if args.autoattack else {}
        noises = [replace(conditions, seed=args.seed + number) for number in range(args.noises)]
        rows += [row | facts for row in student_rows(path.parent.name, net, test, noises, others)]
    if rows:
        title = f"{len(files)} students, {len(test)} test images; missed: robust here, misclassified under AutoAttack"
        show(title, rows, STUDENTS)
    if args.archs:
        labels = [row | facts for row in label_rows(folder, conditions, args)]
        show(f"{args.archs} subnets on val; rank correlation with the default list's worst case", labels, LABELS)
        rows += labels
    write_rows(args.json, rows)


def student_rows(
    name: str, net: FoldedNet, images: ImageSet, noises: Sequence[Conditions], others: Mapping[str, Row]
) -> list[Row]:
    """One row for each list of attacks on one network, and for AutoAttack where it was run.

    Robust, missed and found images are those of the first noise; `points` is the mean over all, with the lowest and the
    highest; gradients and seconds are means.
    """
    outcomes: dict[str, list[np.ndarray]] = {which: [] for which in LISTS}
    spent: dict[str, list[tuple[float, float]]] = {which: [] for which in LISTS}
    for conditions in noises:
        for which, attacks in LISTS.items():
            started = time.perf_counter()
            entries = list(measure(net, images, attacks, conditions).values())
            outcomes[which].append(np.logical_and.reduce([entry["robust"] for entry in entries]))
            gradients = sum(entry["gradients"] for entry in entries) / len(images)
            spent[which].append((gradients, time.perf_counter() - started))
    shared = {"bench": "strength", "row": name, "images": len(images), "clean": int(entries[0]["clean"].sum())}
    rows = [shared | {"lever": which} | facts for which, facts in others.items()]
    for row in rows:
        row["robust"] = int(row["outcome"].sum())
    reference = others["autoattack"]["outcome"] if "autoattack" in others else None
    for which, masks in outcomes.items():
        gradients, seconds = np.mean(spent[which], axis=0).tolist()
        row = shared | {"lever": which, "robust": int(masks[0].sum()), "noises": len(noises)}
        row |= {"gradients": round(gradients, 2), "seconds": round(seconds, 3)}
        if reference is not None:
            points = [100 * float(robust.mean() - reference.mean()) for robust in masks]
            row |= {"points": round(float(np.mean(points)), 3)}
            row |= {"points_low": round(min(points), 3), "points_high": round(max(points), 3)}
            row |= {"missed": int((masks[0] & ~reference).sum()), "found": int((reference & ~masks[0]).sum())}
        rows.append(row)
    return [{key: value for key, value in row.items() if key != "outcome"} for row in rows]


def autoattack(net: FoldedNet, images: ImageSet, args: Namespace) -> Row:
    """Standard AutoAttack of its authors on all images."""
    from pyautoattack import AutoAttack

    pixels, started = to_float(images.images).contiguous(), time.perf_counter()
    made = AutoAttack(net.requires_grad_(False), eps=args.eps, seed=args.seed, version="standard")
    adv, _ = made.run_standard_evaluation(pixels, images.labels, batch_size=500)
    with torch.no_grad():
        clean = net(pixels).argmax(1) == images.labels
        robust = net(adv).argmax(1) == images.labels
    seconds = round(time.perf_counter() - started, 3)
    return {"outcome": (robust & clean).numpy(), "seconds": seconds}


def label_rows(folder: Path, conditions: Conditions, args: Namespace) -> list[Row]:
    """Seconds and rank correlation of every cheap attack and of the default list itself."""
    data = folder / "prepare_data"
    newest = max(folder.glob("train_phase/*/supernet.safetensors"), key=lambda path: path.stat().st_mtime)
    supernet, train, val = read(newest, data / "train.safetensors", data / "val.safetensors")
    val, seen = val.first(args.label_images), {}
    pixels, batch_size = to_float(train.first(conditions.measurement.recalibration_images).images), 250
    progress = Progress("labels", args.archs, "subnets")
    for arch in spread_archs(supernet.space, args.archs, seed=args.seed):
        net = extract(supernet, arch)
        recalibrate(net, pixels, batch_size=batch_size)
        net = fold(net).eval()
        for name, attacks in {"default list": STRONG, **{name: (attack,) for name, attack in CHEAP.items()}}.items():
            started = time.perf_counter()
            entries = list(measure(net, val, attacks, conditions).values())
            seconds = time.perf_counter() - started
            robust = np.logical_and.reduce([entry["robust"] for entry in entries]).mean()
            spent = sum(entry["gradients"] for entry in entries) / len(val)
            seen.setdefault(name, []).append((float(robust), spent, seconds))
        progress.advance()
    progress.close()
    rows, wanted = [], np.asarray(seen["default list"])[:, 0]
    for name, values in seen.items():
        robust, spent, seconds = np.asarray(values).T
        row = {"bench": "strength_labels", "lever": name, "archs": args.archs, "images": len(val)}
        row |= {"seconds": round(float(seconds.mean()), 4), "gradients": round(float(spent.mean()), 2)}
        row |= {"kendall": round(kendall_tau(robust, wanted), 4), "spearman": round(spearman(robust, wanted), 4)}
        rows.append(row | {"mean_robust_acc": round(float(robust.mean()), 5)})
    return rows


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    options = Options(
        __doc__,
        "strength",
        quick={"archs": 4, "noises": 1, "images": 20, "label_images": 20},
        threads=(1, "of torch"),
        zero=["archs"],
        rounds=None,
        results=("results/quickstart", "folder of a finished run", str),
        eps=(0.15, "radius in pixel units", float),
        images=(None, "test images for the students; all of them if left out", int),
        noises=(3, "seeds of the start noise of each list"),
        autoattack=(False, "also run AutoAttack", bool),
        archs=(40, "subnets of the labels; 0 leaves them out"),
        label_images=(300, "val images of a label"),
    )
    return options.read(argv)


if __name__ == "__main__":
    main()
