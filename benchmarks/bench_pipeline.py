"""Seconds of the quick start by stage; with `--plain`, its trainings compared with plain forms.

The seconds of the stages come from Snakemake's records, of a run in a temporary folder or of `--results FOLDER`.
`--plain` compares the trainings of the teacher and of the first phase alone, cut to a few epochs and one validation.
Losses of both forms must agree within 2 % and validation accuracies within two standard errors.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from common import Options, Row, machine, made_step, show, time_interleaved, write_rows
from plain_step import Norm, sliced_forward
from torch import Tensor, nn

from proard.config import Attack, Measurement, RunConfig, job_settings, load
from proard.data import ImageSet, keyed_generator, load_split, to_float
from proard.evaluation.meter import Conditions, validation_rows
from proard.losses import InnerObjective
from proard.nets import StaticNet, Supernet, extract, fold
from proard.nets.elastic import BN_EPS, BN_MOMENTUM
from proard.nets.view import Statistics
from proard.space import Arch, ConvSpec, SearchSpace
from proard.stages import prepare_data
from proard.stages.training import AugmentedImages
from proard.training import Plan, StepBatch, phase_plan, single_plan
from proard.training.run import learning_rate

ROOT = Path(__file__).parents[1]
SAME_LOSS = 0.02


def main(argv: Sequence[str] | None = None) -> None:
    """Run or read the quick start; compare its trainings with `--plain`."""
    args = Options(
        __doc__,
        "pipeline",
        quick={"plain": True, "epochs": 1, "rounds": 1},
        config=(str(ROOT / "config" / "quickstart.yaml"), "of the run"),
        results=(None, "FOLDER whose records are read, as in results/quickstart", str),
        plain=(False, "compare the trainings with their plain form"),
        epochs=(2, "of every training under --plain"),
        rounds=(3, "under --plain; medians are over them"),
        seed=None,
    ).read(argv)
    rows = compared(args) if args.plain else stages(args)
    write_rows(args.json, rows)
    show(Path(args.config).name, rows, {"ratio_plain": "/plain:.2f", "seconds": "seconds:.1f"})


# --- the whole workflow --------------------------------------------------------------------------------------------


def stages(args: Namespace) -> list[Row]:
    """One row per stage, and one for the whole run if it was started here."""
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
    return [*rows, _row("whole run", wall, "wall clock, workflow's own time included") | {"machine": machine()}]


def stage_rows(results: Path) -> list[Row]:
    """Seconds of every stage from the records of a run; exits if there are none."""
    folder = results / "benchmarks"
    found: dict[str, list[dict[str, str]]] = {}
    for path in sorted(folder.rglob("*.tsv")):
        with path.open(encoding="utf-8", newline="") as file:
            jobs = list(csv.DictReader(file, delimiter="\t"))
        found.setdefault(path.relative_to(folder).parts[0].removesuffix(".tsv"), []).extend(jobs)
    if not found:
        raise SystemExit(f"{folder} holds no benchmark records; run the workflow, or name another run with --results")
    rows = []
    for stage, jobs in found.items():
        memory = max((float(job["max_rss"]) for job in jobs if job.get("max_rss", "-") not in ("-", "NA")), default=0.0)
        label = f"{len(jobs)} jobs" if len(jobs) > 1 else "1 job"
        rows.append(_row(stage, sum(float(job["s"]) for job in jobs), f"{label}, at most {memory:.0f} MiB"))
    return rows


def _row(stage: str, seconds: float, lever: str) -> Row:
    """A row of the table."""
    return {"bench": "pipeline", "row": stage, "seconds": round(seconds, 2), "lever": lever}


# --- trainings in plain form: sliced weights, NCHW memory, autograd through unfolded networks ------------------------


class PlainSupernet(Supernet):
    """A supernet whose training steps use plain views."""

    def view(self, arch: Arch, *, total: None = None) -> PlainView:
        """One subnet, nothing materialised."""
        return PlainView(self, arch)


class PlainView:
    """`SubnetView` in plain form: nothing is materialised, autograd adds gradients to the supernet's."""

    def __init__(self, supernet: Supernet, arch: Arch) -> None:
        self.supernet, self.arch, self.spec = supernet, arch, supernet.space.spec(arch)

    def __call__(
        self, images: Tensor, *, record: Statistics | None = None, update_running: bool = False, frozen: bool = False
    ) -> Tensor:
        """Logits with batch statistics, as from `SubnetView`."""

        def norm(layer: ConvSpec, bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
            out, values = layer.out_channels, x.numel() / layer.out_channels
            mean, var = (torch.zeros_like(bn.running_mean[:out]) for _ in range(2))
            x = F.batch_norm(x, mean, var, bn.weight[:out], bn.bias[:out], training=True, momentum=1.0, eps=BN_EPS)
            if record is not None:
                record[layer.name] = (mean, var * ((values - 1) / values))
            if update_running:
                bn.running_mean[:out].lerp_(mean, BN_MOMENTUM)
                bn.running_var[:out].lerp_(var, BN_MOMENTUM)
            return x

        return self._run(images, norm)

    def running_statistics(self) -> Statistics:
        """Empty: `folded` then uses the stored ones."""
        return {}

    def folded(self, statistics: Statistics, *, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
        """Evaluation mode at fixed statistics, not folded, in the network's own dtype."""

        def norm(layer: ConvSpec, bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
            out = layer.out_channels
            stored = (bn.running_mean[:out], bn.running_var[:out])
            return F.batch_norm(x, *statistics.get(layer.name, stored), bn.weight[:out], bn.bias[:out], eps=BN_EPS)

        return lambda images: self._run(images, norm)

    def scatter_gradients(self) -> None:
        """Nothing to do."""

    def _run(self, images: Tensor, norm: Norm) -> Tensor:
        """Slice, convolve, normalise."""
        images = self.supernet.normalise(images).contiguous(memory_format=torch.contiguous_format)
        return sliced_forward(self.supernet, self.arch, images, norm)


def plain_steps(
    predict: Callable[[Tensor], Tensor],
    objective: InnerObjective,
    adv: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    step_size: float,
    num_steps: int,
) -> Tensor:
    """`attacks.take_steps` as in a textbook: autograd through the objective, one clamp after the other."""
    for _ in range(num_steps):
        adv = adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(predict(adv)).sum(), adv)
        adv = adv.detach() + step_size * gradient.sign()
        adv = torch.minimum(torch.maximum(adv, low), high)
    return adv.detach()


def unfolded_teacher(net: StaticNet) -> Callable[[Tensor], Tensor]:
    """A teacher's logits without a graph, norms not folded."""
    net, layout = net.eval().to(memory_format=torch.contiguous_format), torch.contiguous_format
    return torch.no_grad()(lambda images: net(images.contiguous(memory_format=layout)))


FORMS: dict[str, dict[str, Any]] = {"plain": {"take_steps": plain_steps}, "package": {}}


def compared(args: Namespace) -> list[Row]:
    """Time the teacher's training and the first phase in both forms, after checking that they train the same."""
    config = cut(Path(args.config), args.epochs)
    with tempfile.TemporaryDirectory() as folder:
        files = [f"--{split}={folder}/{split}.safetensors" for split in ("train", "val", "test")]
        settings = job_settings(config, "prepare_data")
        prepare_data.main([f"--settings={settings}", *files, f"--manifest={folder}/manifest.json", "--device=cpu"])
        data = [load_split(f"{folder}/{split}.safetensors") for split in ("train", "val")]
    space, recipe, phase = SearchSpace(config.space), config.train_teacher, config.train_phase.phases[0]
    plans = {"train_teacher": (recipe, single_plan(space.largest, recipe.objective, recipe))}
    plans["train_phase"] = (phase, phase_plan(space, phase))
    teachers: dict[str, Any] = dict.fromkeys(FORMS)
    rows = []
    for stage, (settings, plan) in plans.items():
        forms = {form: partial(train, config, settings, plan, data, form, teachers[form]) for form in FORMS}
        ends = {form: call() for form, call in forms.items()}
        require_same(stage, [facts for _, facts in ends.values()])
        network = extract(ends["package"][0], space.largest).eval()
        teachers = {"plain": unfolded_teacher(network), "package": fold(network)}
        calls = {form: lambda number, call=call: call() for form, call in forms.items()}
        timed = time_interleaved(calls, rounds=args.rounds, label=stage, plain="plain")
        facts = timed.quality | {"config": json.dumps(Path(args.config).name), "machine": machine()}
        for form, timing in timed.timings.items():
            row = _row(f"{stage}, {form}", timing.seconds, f"{args.epochs} epochs and one validation")
            rows.append(row | {"ratio_plain": round(timing.ratio_plain, 4)} | facts)
    return rows


def cut(path: Path, epochs: int) -> RunConfig:
    """The run's configuration with short trainings."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    phases = values["train_phase"]
    for section in (values["train_teacher"], phases, phases["phases"][0]):
        section["epochs"], section["warmup_epochs"] = epochs, 0
    return load(values)


def train(
    config: RunConfig, settings: Any, plan: Plan, data: Sequence[ImageSet], form: str, teacher: Callable | None
) -> tuple[Supernet, dict[str, float]]:
    """Train once in a form and validate the averaged weights: the network, and loss and accuracies at its end."""
    space, (images_of, val), seed = SearchSpace(config.space), data, config.seed
    made = PlainSupernet if form == "plain" else Supernet
    net = made(space, mean=images_of.mean, std=images_of.std, generator=torch.Generator().manual_seed(seed))
    net = net.to(memory_format=torch.contiguous_format) if form == "plain" else net
    step = made_step(net, settings, plan, config.threat.eps, teacher, seed, **FORMS[form])
    source, size = AugmentedImages(images_of, settings), settings.batch_size
    steps = max(len(source) // size, 1)
    total, losses = round(settings.epochs * steps * plan.passes_per_epoch), []
    for number in range(total):
        data_pass, place = divmod(number, steps)
        indices, generator = source.order(seed, data_pass)[place * size :][:size], keyed_generator(seed, number, 1)
        images, labels = source.batch(indices, generator)
        lr = learning_rate(settings, number, total, 0)
        batch = StepBatch(images, labels, generator, step=number, data_pass=data_pass, lr=lr)
        losses.append(step(batch).loss)
    rule, conditions = config.validation, Conditions(config.threat, Measurement(), seed)
    attack = Attack(name="val", num_steps=rule.num_steps, step_size=rule.step_size)
    pixels = {"recalibration": to_float(images_of.first(1000).images), "val": val.first(rule.num_images)}
    with step.update.averaged():
        (row,) = validation_rows(net, {"largest": space.largest}, attack=attack, conditions=conditions, **pixels)
    return net, {**row, "loss": float(torch.stack(losses[-steps:]).mean())}


def require_same(stage: str, ends: Sequence[Mapping[str, float]]) -> None:
    """Exit if losses or accuracies of both forms disagree; the message has the figures."""
    losses = [end["loss"] for end in ends]
    wrong = [f"loss {losses}"] if not abs(losses[0] - losses[1]) <= SAME_LOSS * losses[0] else []
    for column in ("val_clean_acc", "val_robust_acc"):
        shares = [float(end[column]) for end in ends]
        noise = 2 * (2 * shares[0] * (1 - shares[0]) / float(ends[0]["val_num_images"])) ** 0.5
        wrong += [f"{column} {shares}"] if not abs(shares[0] - shares[1]) <= noise + 1e-9 else []
    if wrong:
        raise SystemExit(f"{stage}: plain form and package train differently, nothing is timed: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
