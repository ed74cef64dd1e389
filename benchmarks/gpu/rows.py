"""Measurements of the sections: ceilings, kernels, attacks, training steps, labels and data on a device."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import bench_attack
import bench_data
import bench_shared
import eval_rows
import other_libraries
import torch
import yaml
from common import Budget, Call, Row, Timing, clocked, ladder, show
from plain_step import Levers, PlainStep
from step_rows import COLUMNS, PackageStep, Problem, step_times, trained, training_call

from gpu.checks import Wrong, full_float32
from proard.artifacts.files import write_text
from proard.attacks import take_steps
from proard.config import Attack, Measurement, Phase, TrainingAttack, load
from proard.config.losses import Rslad
from proard.kernels import CapturedSteps, dispatch, plain, plain_twins
from proard.space import SearchSpace
from proard.training import passes_alone, planned_work

ROWS = {
    "G0": "released step, float32, NCHW, eager",
    "G1": "plain step: redundant forwards dropped",
    "G2": "the package's step, float32, no fused kernel",
    "G3": "fused update and logit gradient",
    "G4": "bfloat16 attack",
    "G5": "bfloat16 training passes",
    "G6": "attack without autograd, sums and masks in the convolutions' passes",
    "G7": "batch norm with sum and activation in one kernel",
    "G8": "channels padded to multiples of 8",
    "G9": "attack steps in CUDA graphs, archs met before",
    "G10": "the same, every arch met for the first time",
    "G11": "all passes of a step in one CUDA graph, archs met before",
}
GPU_ONLY = ("G3", "G6", "G7", "G8", "G9", "G10", "G11")
LEFT_OUT = {  # kernels that a row does not use
    "G2": ("fused", "padding"),
    **dict.fromkeys(("G3", "G4", "G5"), ("gradients", "norms", "padding")),
    "G6": ("norms", "padding"),
    "G7": ("padding",),
}
GRAPHS = "S7"
SHARED = {**bench_shared.LEVERS, GRAPHS: "as S5, attack steps in CUDA graphs"}
ATTACKS = {
    "plain": "textbook PGD: sliced per forward, NCHW, unfolded, autograd",
    **other_libraries.LEVERS,
    "float32": "folded view, float32 as torch sets TF32",
    "bfloat16": "folded view, bfloat16",
    "float32 graph": "float32, steps in a CUDA graph",
    "bfloat16 graph": "bfloat16, steps in a CUDA graph",
    "bfloat16 passes": "the same, 1x1 layers as convolutions and passes",
}
GPU_SHAPES = ((64, 64, 32, 3), (128, 128, 16, 3), (256, 256, 16, 3), (512, 512, 8, 3), (512, 512, 16, 1))
EPS = 8 / 255
CONFIGS = Path(__file__).parents[2] / "config"
RECIPES = ("cifar10_resnet", "cifar10_resnet_fast")
SAME_ACCURACY = 0.002  # robust accuracies that differ by no more are equal
FULL, CHEAP = 20, 10  # PGD steps of a full and of a cheap label
FEWER = 4  # a cheap label's images are one in so many


@dataclass(frozen=True)
class Clock:
    """Times calls on a device within a time limit."""

    budget: Budget
    device: torch.device
    rounds: int

    @property
    def gpu(self) -> bool:
        """Whether the device is one."""
        return self.device.type == "cuda"

    def ladder(self, bench: str, calls: Mapping[str, Call], levers: Mapping[str, str], **how: object) -> list[Row]:
        """Rows of interleaved timings, as many rounds as fit."""
        return ladder(bench, calls, levers, **{"facts": {}, **vars(self), **how})


def median_seconds(call: Callable[[], object], device: torch.device, *, repeats: int = 10) -> float:
    """Median seconds of a call alone."""
    return statistics.median([clocked(lambda number: call(), 0, device)[0] for _ in range(repeats + 2)][2:])


# --- ceilings, kernels, attacks ------------------------------------------------------------------------------------


def ceilings(clock: Clock, *, size: int, batch: int) -> dict[str, float]:
    """Rates of matrix product and convolution (TFLOP/s) by type, and of a copy (TB/s, read and write).

    float32 is as torch sets TF32: by default in convolutions alone.
    """
    clock.budget.require()
    device, found = clock.device, {}
    how = {"batch": batch, "device": device, "seconds": 0.2 if clock.gpu else 0.0}
    how["shapes"] = GPU_SHAPES if clock.gpu else bench_attack.CEILING_SHAPES[:2]
    for name, dtype in bench_attack.DTYPES.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[f"matmul_{name}_tflops"] = 2 * size**3 / median_seconds(lambda a=a, b=b: a @ b, device) / 1e12
        found[f"convolution_{name}_tflops"] = bench_attack.ceiling(dtype, **how) / 1e12
    source = torch.empty(size * size, device=device)
    target = torch.empty_like(source)
    found["copy_tb_per_s"] = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device) / 1e12
    return found


def ceiling_rows(clock: Clock, *, batch: int) -> list[Row]:
    """Rows of the ceilings."""
    rows = []
    for name, value in ceilings(clock, size=8192 if clock.gpu else 256, batch=batch).items():
        unit = "TFLOP/s" if name.endswith("tflops") else "TB/s"
        rows.append({"bench": "gpu_ceilings", "row": name, "rate": round(value, 5), "lever": unit})
    show("ceilings", rows, {"rate": "rate:.3g"})
    return rows


def kernel_rows(clock: Clock, *, batch: int) -> list[Row]:
    """Both forms of every kernel alone, launched one after the other; only the plain ones if no fused one runs."""
    clock.budget.require()
    device, fused = clock.device, dispatch.fused_for(clock.device)
    fused = fused and fused.steps
    adv = torch.rand(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    gradient, low, high = torch.randn_like(adv), (adv - 0.03).clamp(min=0), (adv + 0.03).clamp(max=1)
    logits = torch.randn(batch, 10, device=device)
    target = logits.flip(1).softmax(1)
    calls = {
        "pgd_update_": lambda twin: twin.pgd_update_(adv, gradient, low, high, step_size=0.01),
        "softmax_difference": lambda twin: twin.softmax_difference(logits, target),
    }
    rows = []
    for name, call in calls.items():
        row: Row = {"bench": "gpu_kernels", "row": name, "baseline": "plain twin", "lever": f"batch {batch}"}
        for key, twin in (("plain_us", plain), ("fused_us", fused)):
            if twin is not None:
                many = lambda call=call, twin=twin: [call(twin) for _ in range(100)]  # noqa: E731
                row[key] = 1e4 * median_seconds(many, device)
        if fused is not None:
            row["ratio_total"] = round(row["plain_us"] / row["fused_us"], 4)
        rows.append(row)
    columns = {"ratio_total": "/plain:.3g", "plain_us": "plain us:.3g", "fused_us": "fused us:.3g"}
    show("kernels alone", rows, columns)
    return rows


def attack_rows(
    problem: Problem, clock: Clock, limits: dict[str, float], *, images: int, training_steps: int, seed: int
) -> list[Row]:
    """Input gradients per second on the problem's first arch, and their share of the convolution ceiling.

    The arch is first trained on patterns; nothing is timed if its robust accuracies under the attacks differ. The
    ceilings are measured here if none are given.
    """
    clock.budget.require()
    batch, macs = len(problem.images), problem.facts()[0]["macs"]
    count = max(images, batch)
    many = replace(problem, images=problem.images[:1].expand(count, -1, -1, -1))
    many = trained(many, num_steps=training_steps, seed=seed)
    ends = bench_attack.ends_of(many, take_steps, batch=batch)
    with full_float32(deterministic=False):
        found = bench_attack.robust_accuracies(many, ends)
    require_equal_accuracies(found)
    problem = replace(many, images=many.images[:batch], labels=many.labels[:batch])
    limits = limits or ceilings(clock, size=1024 if clock.gpu else 256, batch=batch)
    calls = bench_attack.timed_calls(problem, batch)
    if clock.gpu:
        graphs = bench_attack.timed_calls(problem, batch, captured(problem))
        calls |= {f"{name} graph": graphs[name] for name in bench_attack.DTYPES}
        calls["bfloat16 passes"] = without_products(
            bench_attack.timed_calls(problem, batch, captured(problem))["bfloat16"]
        )

    def own(row: str, timing: Timing) -> Row:
        attack = row.split()[0]
        dtype = attack if attack in bench_attack.DTYPES else "float32"
        rate = batch * problem.recipe.num_steps / timing.seconds
        share = bench_attack.share_of_ceiling(macs, rate, 1e12 * limits[f"convolution_{dtype}_tflops"])
        facts = {"gradients_per_second": round(rate, 2), "ceiling_share": round(share, 4), "macs": macs}
        accuracy = {"robust_acc": round(found["accuracies"][attack], 4), "robust_noise": round(found["noise"], 4)}
        return bench_attack.over_libraries(timing) | facts | accuracy

    columns = {"gradients_per_second": "gradients/s:.3g", "ceiling_share": "of ceiling:.3g", "robust_acc": "robust:.4f"}
    columns = {"ratio_total": "/plain:.3g", **bench_attack.OVER, **columns}
    how = {"columns": columns, "baseline": "plain PGD", "plain": "plain", "own": own}
    return clock.ladder("gpu_attack", calls, ATTACKS, title=f"attacks on {problem.describe()}", **how)


def without_products(call: Call) -> Call:
    """The call with convolutions in place of the products with an epilogue."""

    def run(number: int) -> None:
        with plain_twins("products"):
            call(number)

    return run


def require_equal_accuracies(found: Row) -> None:
    """Exit if robust accuracies under the attacks differ by more than noise and by more than `SAME_ACCURACY`."""
    values, limit = found["accuracies"], max(found["noise"], SAME_ACCURACY)
    gap = max(values.values()) - min(values.values())
    if gap > limit:
        each = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        raise Wrong(f"robust accuracies differ by {gap:.4f}, expected at most {limit:.4f}: {each}")


# --- training steps ------------------------------------------------------------------------------------------------


def build(row: str, problem: Problem) -> Call:
    """Make a call that makes one step on each arch."""
    number, graphs = int(row[1:]), [captured(problem)]
    if number < 2:
        nets = problem.placed(problem.images.device)
        step = PlainStep(nets.student, nets.teacher, problem.recipe, Levers(few_forwards=number > 0))
    else:
        attack_dtype, dtype = ("bfloat16" if number >= first else "float32" for first in (4, 5))
        take = (lambda *given, **how: graphs[0](*given, **how)) if number in (9, 10) else None
        how = {"take_steps": take, "graphs": number > 10}
        step = PackageStep(problem, attack_dtype=attack_dtype, dtype=dtype, **how)
    train = training_call(step, problem)
    kinds = (
        ("fused", "padding") if number < 3 else ("gradients", *LEFT_OUT["G6"]) if number < 6 else LEFT_OUT.get(row, ())
    )

    def run(round_number: int) -> None:
        if row == "G10":
            graphs[0] = captured(problem)
        with plain_twins(*kinds) if kinds else nullcontext():
            train(round_number)

    return run


def captured(problem: Problem) -> CapturedSteps:
    """Attack steps in graphs of their own."""
    return CapturedSteps(take_steps, batch_size=len(problem.images))


def step_rows(problem: Problem, clock: Clock) -> list[Row]:
    """Time one step on each arch; times are means over the archs."""
    calls = {row: build(row, problem) for row in ROWS if clock.gpu or row not in GPU_ONLY}
    return _steps("gpu", calls, ROWS, problem, clock, len(problem.archs), plain="G1")


def shared_rows(problem: Problem, clock: Clock) -> list[Row]:
    """Time one step that trains all archs of the problem, with one attack each or one for all."""
    calls = bench_shared.timed_calls(problem)
    if clock.gpu:
        step = bench_shared.package_step("S5", problem, take_steps=captured(problem))
        calls[GRAPHS] = training_call(step, problem, together=True)
    return _steps("gpu_shared", calls, SHARED, problem, clock, 1, plain="S1")


def busy_rows(problem: Problem, clock: Clock, *, steps: int = 8, profile: str | None = None) -> list[Row]:
    """Share of a training step in which the GPU computes: three subnets, two attack steps, bfloat16, Muon.

    Kernel time is torch's profiler's, over the wall time of steps without the profiler; with `profile` its table of
    kernels is written to that file. The subnets recur, so that all passes of each are one CUDA graph.
    """
    clock.budget.require()
    problem, device = problem.with_steps(2), clock.device
    how = {"attack_dtype": "bfloat16", "dtype": "bfloat16", "optimizer": "muon"}
    train = training_call(PackageStep(problem, graphs=True, **how), problem, together=True)
    first = clocked(train, 0, device)[0]  # kernels are checked and compiled
    for number in range(1, 3):  # graphs are captured
        train(number)
    if clock.gpu:
        torch.cuda.reset_peak_memory_stats(device)

    def several(number: int) -> None:
        for index in range(steps):
            train(number + index)

    seconds = min(clocked(several, number, device)[0] for number in range(3)) / steps
    activity = torch.profiler.ProfilerActivity.CUDA if clock.gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        clocked(several, 0, device)  # until the device has finished
    kernels, spent = profiler.key_averages(), f"self_{'device' if clock.gpu else 'cpu'}_time_total"
    kernel_seconds = sum(getattr(event, spent) for event in kernels) / 1e6 / steps
    launches = sum(event.count for event in kernels if getattr(event, spent) > 0) / steps
    if profile:
        write_text(profile, kernels.table(sort_by=spent, row_limit=60, max_name_column_width=90))
    row: Row = {"bench": "gpu_busy", "row": f"{len(problem.archs)} subnets, Muon", "lever": problem.describe()}
    row |= {"first_step_s": round(first, 2), "ms_per_step": round(1e3 * seconds, 3)}
    row |= {"kernel_ms": round(1e3 * kernel_seconds, 3)}
    row |= {"busy": round(kernel_seconds / seconds, 4), "launches": round(launches)}
    row |= {"peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3)} if clock.gpu else {}
    columns = {
        "first_step_s": "first step, s:.3g",
        "ms_per_step": "ms/step:.4g",
        "kernel_ms": "kernel ms:.4g",
        "busy": "busy:.3g",
    }
    show("a training step on the GPU", [row], columns | {"launches": "kernels:.0f", "peak_gib": "peak GiB:.3g"})
    return [row, *hour_rows(row, problem)]


def hour_rows(measured: Row, problem: Problem) -> list[Row]:
    """Hours of the two full recipes at the rate of a measured step: passes times multiply-accumulates over time."""
    archs = [problem.student.space.spec(arch).macs for arch in problem.archs]
    passes = passes_alone(problem.student.space, Phase(attack=TrainingAttack(num_steps=2)), Rslad())[0]
    rate = passes * sum(archs) * len(problem.images) / (measured["ms_per_step"] / 1e3)  # multiply-accumulates / s
    rows = []
    for name in RECIPES:
        config = load(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")))
        space, images = SearchSpace(config.space), round(50_000 * (1 - config.prepare_data.val_fraction))
        teacher = config.train_teacher
        own = passes_alone(space, teacher, teacher.objective)[0] * space.spec(space.largest).macs
        work = own * images * teacher.epochs
        for phase in config.train_phase.phases:
            planned = planned_work(space, phase, images=images, seed=0, teacher_macs=space.spec(space.largest).macs)
            repeats = phase.archs_per_step if phase.sampling == "per_pass" else 1
            work += planned.macs * images * phase.epochs * repeats
        row: Row = {"bench": "gpu_hours", "row": name, "lever": "teacher and phases, without measurements"}
        rows.append(row | {"hours": round(work / rate / 3600, 2)})
    show("estimated from that rate", rows, {"hours": "hours:.3g"})
    return rows


def _steps(
    bench: str, calls: dict[str, Call], levers: dict[str, str], problem: Problem, clock: Clock, steps: int, **how: str
) -> list[Row]:
    """Rows of calls that make so many steps each."""
    own = partial(step_times, steps=steps, batch=len(problem.images))
    title, facts = f"steps on {problem.describe()}", {"archs": problem.facts()}
    how |= {"columns": COLUMNS, "title": title, "baseline": "released step", "own": own}
    return clock.ladder(bench, calls, levers, facts=facts, **how)


# --- labels and data -----------------------------------------------------------------------------------------------


def label_rows(problem: Problem, clock: Clock, *, images: int, training_steps: int, seed: int) -> list[Row]:
    """Time labels of the problem's first arch, first trained on patterns: a random one has no robust accuracy."""
    clock.budget.require()
    fixed = Measurement()
    count = images + fixed.recalibration_images
    own = replace(problem.placed(clock.device), images=problem.images[:1].expand(count, -1, -1, -1))
    own = trained(own, num_steps=training_steps, seed=seed)
    pixels = own.images.split([fixed.recalibration_images, images])
    attack, how = Attack(num_steps=FULL, step_size=EPS / 4), {"batch_size": fixed.batch_size, "seed": seed}
    full = eval_rows.Problem(own.student.eval(), *pixels, own.labels[-images:], attack, EPS, **how)
    few = max(images // FEWER, 1)
    cheap = attack.model_copy(update={"num_steps": CHEAP})
    cheap = replace(full, images=full.images[:few], labels=full.labels[:few], attack=cheap)
    rounded = replace(cheap, attack=cheap.attack.model_copy(update={"dtype": "bfloat16"}))
    levers = {
        "L0": f"plain form: PGD-{FULL} on all {images} images for every step, float32",
        "L1": "the package: the same, without images already misclassified",
        "L2": f"PGD-{CHEAP} on {few} images",
        "L3": "gradients in bfloat16",
    }
    problems = {"L0": full.contiguous(), "L1": full, "L2": cheap, "L3": rounded}
    found: dict[str, eval_rows.Label] = {}

    def call(row: str, number: int) -> None:
        measure = eval_rows.measure_plainly if row == "L0" else eval_rows.measure_as_package
        found[row] = measure(problems[row], own.archs[0])

    def facts_of(row: str, timing: Timing) -> Row:
        seen, steps = found[row], problems[row].attack.num_steps
        facts = {"robust_acc": float(seen.robust.float().mean()), "alive": seen.gradients / (len(seen.robust) * steps)}
        rounded = {name: round(value, 4) for name, value in facts.items()}
        return {"seconds_per_label": round(timing.seconds, 7)} | rounded

    columns = {"ratio_total": "/plain:.3g", "ratio_full": "/full:.3g", "seconds_per_label": "s/label:.3g"}
    columns |= {"alive": "alive:.3g", "robust_acc": "robust:.3g"}
    how = {"baseline": "plain PGD-20", "plain": "L1", "second": "ratio_full", "columns": columns, "own": facts_of}
    title, calls = f"labels on {problem.student.space.settings.name}", {row: partial(call, row) for row in levers}
    with full_float32(deterministic=False):  # as the stages measure
        rows = clock.ladder("gpu_labels", calls, levers, title=title, **how)
    print("the rank correlation of such labels needs trained supernets: benchmarks/bench_eval.py --supernet")
    return rows


def data_rows(clock: Clock, *, images: int, batch: int, workers: int | None) -> list[Row]:
    """Time an epoch that ends on the device: torchvision's DataLoader, and crops of images in its memory."""
    clock.budget.require()
    pixels = bench_data.make_images(images)
    bench_data.require_equal(pixels, device=clock.device)
    workers = workers or max(1, min(8, (os.cpu_count() or 2) - 1))

    def own(row: str, timing: Timing) -> Row:
        rate = {"seconds": round(timing.seconds, 7), "images_per_second": round(images / timing.seconds, 1)}
        return rate | {"images": images, "workers": workers}

    columns = {"ratio_total": "/loader:.3g", "ratio_workers": "/workers:.3g", "images_per_second": "images/s:.3g"}
    how = {"baseline": "DataLoader", "plain": "D1", "second": "ratio_workers", "columns": columns, "own": own}
    title, levers = f"augmented images, {images} of 32x32x3, batch {batch}", bench_data.levers(workers)
    with bench_data.timed_calls(pixels, batch_size=batch, workers=workers, device=clock.device) as calls:
        return clock.ladder("gpu_data", calls, levers, title=title, **how)
