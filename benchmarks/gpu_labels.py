"""Seconds per label and augmented images per second on a device."""

from __future__ import annotations

import os
from dataclasses import replace

import bench_data
import eval_rows
import gpu_checks as checks
import torch
from gpu_run import Budget, Row, printed, rows_of, time_within
from step_rows import Problem
from trained import trained

from proard.config import Attack, Measurement

EPS = 8 / 255
FULL, CHEAP = 20, 10  # PGD steps of a full and of a cheap label
FEWER = 4  # a cheap label's images are one in so many
RANKS = "how such labels rank subnets is measured on trained supernets: benchmarks/bench_eval.py --supernet"


def label_rows(
    problem: Problem, budget: Budget, *, images: int, training_steps: int, rounds: int, seed: int
) -> list[Row]:
    """Time labels of the problem's first arch, trained for some steps on patterns: a random one withstands nothing."""
    budget.require()
    device, fixed = problem.images.device, Measurement()
    count = images + fixed.recalibration_images
    own = replace(checks.placed(problem, device), images=problem.images[:1].expand(count, -1, -1, -1))
    own = trained(own, num_steps=training_steps, seed=seed)
    pixels = own.images.split([fixed.recalibration_images, images])
    attack = Attack(num_steps=FULL, step_size=EPS / 4)
    full = eval_rows.Problem(
        own.student.eval(), *pixels, own.labels[-images:], attack, EPS, batch_size=fixed.batch_size, seed=seed
    )
    few = max(images // FEWER, 1)
    cheap = replace(
        full, images=full.images[:few], labels=full.labels[:few], attack=attack.model_copy(update={"num_steps": CHEAP})
    )
    rounded = replace(cheap, attack=cheap.attack.model_copy(update={"dtype": "bfloat16"}))
    levers = {
        "L0": f"plain form: PGD-{FULL} on all {images} images for every step, float32",
        "L1": "the package: the same, fallen images leave",
        "L2": f"PGD-{CHEAP} on {few} images",
        "L3": "gradients in bfloat16",
    }
    problems = {"L0": full.contiguous(), "L1": full, "L2": cheap, "L3": rounded}
    found: dict[str, eval_rows.Label] = {}

    def call(row: str) -> None:
        measure = eval_rows.measure_plainly if row == "L0" else eval_rows.measure_as_package
        found[row] = measure(problems[row], own.archs[0])

    calls = {row: (lambda number, row=row: call(row)) for row in levers}
    label = f"labels on {problem.student.space.settings.name}"
    with checks.full_float32(deterministic=False):  # as the stages measure
        timed = time_within(calls, budget, rounds=rounds, device=device, label=label, plain="L1")
    rows = rows_of("gpu_labels", timed, levers, baseline="plain PGD-20", second="ratio_full")
    for row in rows:
        label_, steps = found[row["row"]], problems[row["row"]].attack.num_steps
        row |= {
            "seconds_per_label": row.pop("seconds"),
            "robust_acc": round(float(label_.robust.float().mean()), 4),
            "alive": round(label_.gradients / (len(label_.robust) * steps), 4),
        }
    columns = {"ratio_total": "/plain", "ratio_full": "/full", "seconds_per_label": "s/label"}
    printed(label, rows, {**columns, "alive": "alive", "robust_acc": "robust"})
    print(RANKS)
    return rows


def data_rows(
    budget: Budget, device: torch.device, *, images: int, batch: int, workers: int | None, rounds: int
) -> list[Row]:
    """Time an epoch that ends on the device: torchvision's DataLoader, and crops of images that lie there."""
    budget.require()
    pixels = bench_data.make_images(images)
    bench_data.require_equal(bench_data.differing_pixels(pixels, device=device))
    workers = workers or max(1, min(8, (os.cpu_count() or 2) - 1))
    levers = {row: lever.format(workers=workers) for row, lever in bench_data.LEVERS.items()}
    with bench_data.timed_calls(pixels, batch_size=batch, workers=workers, device=device) as calls:
        timed = time_within(calls, budget, rounds=rounds, device=device, label="epochs", plain="D1")
    rows = rows_of("gpu_data", timed, levers, baseline="DataLoader", second="ratio_workers")
    for row in rows:
        row |= {"images_per_second": round(images / row["seconds"], 1), "images": images, "workers": workers}
    columns = {"ratio_total": "/loader", "ratio_workers": "/workers", "images_per_second": "images/s"}
    printed(f"augmented images, {images} of 32x32x3, batch {batch}", rows, columns)
    return rows
