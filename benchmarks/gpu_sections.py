"""The sections of the GPU benchmark: what each needs, measures and gives. Each runs in a process of its own."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import gpu_checks as checks
import gpu_labels as labels
import gpu_ladder as ladder
import gpu_limits as limits
import gpu_proofs as proofs
import torch
from common import machine
from gpu_run import Budget, Row, TimeIsShort
from plain_step import Recipe
from step_rows import Problem, make_problem, scaled_space

from proard.kernels import dispatch
from proard.training.ranks import enter_backward_thread

SMALL, SETTLING = 8, 16  # images of the equality gates, and from which the networks' statistics are made
NARROW = {"resnet_cifar": 0.125, "mobilenet_v3_cifar": 0.125}  # compared with a CPU, slow in float64, at this width


@dataclass(frozen=True)
class Start:
    """What a section is given when its turn comes.

    Attributes
    ----------
    until : float
        When it should end, in seconds since 1970: it begins no round that would take longer.
    ceilings : dict of str to float
        Rates by name, where that section has been run.
    plain_kernels : bool
        The fused kernels are not used: one of them has failed its proof.
    """

    until: float
    ceilings: dict[str, float] = field(default_factory=dict)
    plain_kernels: bool = False


@dataclass(frozen=True)
class Result:
    """What a section gives: `state` is done, short (its time ended before it measured anything) or failed, with why."""

    state: str
    why: str = ""
    rows: list[Row] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Context:
    """What a section works with; `problem`, of the preset `space`, is on the CPU, in float32, of few images."""

    args: argparse.Namespace
    device: torch.device
    space: str | None
    problem: Problem | None
    budget: Budget
    ceilings: dict[str, float]

    def placed(self, archs: int | None = None) -> Problem:
        """The problem on the device, with a whole batch of random images and that many archs."""
        generator = torch.Generator().manual_seed(self.args.seed)
        shape, classes = self.problem.images.shape[1:], self.problem.student.space.settings.classes
        images = torch.rand((self.args.batch, *shape), generator=generator).mul_(0.96).add_(0.02)
        labels_ = torch.randint(classes, (self.args.batch,), generator=generator)
        chosen = self.problem.archs[:archs]
        return checks.placed(replace(self.problem, archs=chosen, images=images, labels=labels_), self.device)


@dataclass(frozen=True)
class Section:
    """A part that fails alone.

    Attributes
    ----------
    part : str
        What `--sections` calls it.
    title : str
        Its name in the summary.
    weight : float
        Its share of the time that is left.
    space : str, optional
        Preset of its problem.
    """

    part: str
    title: str
    weight: float
    measure: Callable[[Context], list[Row]]
    space: str | None = None

    @property
    def proves_kernels(self) -> bool:
        """Whether all that follows leaves the fused kernels alone where this fails."""
        return self.part == "kernels"


def sections(args: argparse.Namespace) -> list[Section]:
    """All sections for a device, in order."""
    each: list[tuple[str, str, float, Callable[[Context], list[Row]]]] = [
        ("equality", "equality", 2, equal),
        ("step", "one subnet a step", 4, one_subnet),
        ("shared", f"{args.subnets} subnets a step", 4, several_subnets),
        ("attack", "share of the ceiling", 1, attack),
        ("labels", "seconds per label", 3, label),
    ]
    kernels = proofs.PROOFS if args.device == "cuda" else {}
    return [
        *(Section("kernels", f"kernel {name}", 4, partial(prove, name)) for name in kernels),
        Section("ceilings", "ceilings", 1, ceilings),
        *(
            Section(part, f"{title}, {space}", weight, measure, space)
            for part, title, weight, measure in each
            for space in args.space
        ),
        Section("data", "augmented images", 1, data),
        Section("twins", "kernels alone", 1, twins),
    ]


def prepare(section: Section, args: argparse.Namespace) -> Problem | None:
    """What a section needs and can be made without the device."""
    return None if section.space is None else problem_of(section.space, args, args.width_scale)


def run_section(section: Section, args: argparse.Namespace, problem: Problem | None, start: Start) -> Result:
    """Run a section here and now; its errors become its result."""
    device = torch.device(args.device)
    budget = Budget(time.monotonic() + start.until - time.time())
    facts = {name: getattr(args, name) for name in ("width_scale", "batch", "steps", "seed", "device")}
    try:
        gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
        facts["machine"] = {**machine(), "gpu": gpu}
        if gpu:
            enter_backward_thread(args.device)
        facts |= {"space": section.space} if section.space else {}
        facts |= {"plain_kernels": True} if start.plain_kernels else {}
        with without_fused_kernels() if start.plain_kernels else nullcontext():
            rows = section.measure(Context(args, device, section.space, problem, budget, start.ceilings))
    except TimeIsShort:
        return Result("short", late(args))
    except SystemExit as error:  # a gate, or a benchmark's own check
        return Result("failed", str(error), machine=facts.get("machine", {}))
    except Exception as error:  # out of memory, a lost context: what follows has a process of its own
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        return Result("failed", f"{type(error).__name__}: {first}", machine=facts.get("machine", {}))
    return Result("done", "", [row | facts for row in rows], facts["machine"])


def late(args: argparse.Namespace) -> str:
    """Why a section that had too little time was not run."""
    return f"it would end after the {args.minutes:g} minutes allowed"


@contextmanager
def without_fused_kernels() -> Iterator[None]:
    """Context in which the plain twins serve every device."""
    with mock.patch.object(dispatch, "fused_for", return_value=None):
        yield


def problem_of(name: str, args: argparse.Namespace, width_scale: float) -> Problem:
    """Archs and networks of a space at a width, on the CPU."""
    return make_problem(
        scaled_space(name, width_scale),
        recipe=Recipe(num_steps=args.steps),
        num_archs=max(args.archs, args.subnets),
        batch_size=min(args.batch, SETTLING),
        seed=args.seed,
        dtype=torch.float32,
    )


def prove(name: str, context: Context) -> list[Row]:
    """A fused kernel against its twin on the shapes that it is used with."""
    return proofs.proof_rows(name, context.device)


def ceilings(context: Context) -> list[Row]:
    """Rates of matrix products, convolutions and copies."""
    gpu = context.device.type == "cuda"
    found = limits.ceilings(context.budget, context.device, size=8192 if gpu else 256, batch=context.args.batch)
    return limits.ceiling_rows(found)


def equal(context: Context) -> list[Row]:
    """Go through the equality gates that a device can pass.

    Attack and step are compared with a CPU's at a small width, captured attacks and host waits at the given one.

    Raises
    ------
    Wrong
        A gate failed; the others have been gone through all the same.
    """
    context.budget.require()
    args, device, problem = context.args, context.device, context.problem
    gpu, cpu, space = device.type == "cuda", torch.device("cpu"), context.space
    narrow = problem_of(space, args, min(args.width_scale, NARROW.get(space, 1.0)))
    few = checks.placed(_few(problem, args.archs), device)
    exact = [checks.placed(_few(narrow, args.archs), where, torch.float64) for where in (cpu, device)]
    gates: list[Callable[[], str]] = [
        *([lambda: checks.fused_attacks_agree(few)] if gpu else []),
        lambda: checks.attacks_agree(*exact),
        lambda: checks.graphs_agree(few, capture=None if gpu else lambda body: body),
        lambda: checks.steps_agree(*exact),
    ]
    wrong = []
    with checks.full_float32():
        wrong += [fault for gate in gates if (fault := passed(gate, space))]
    if gpu:
        waits = passed(lambda: checks.step_never_waits(few), space)
        wrong += [waits] if waits else []
    if wrong:
        raise checks.Wrong("; ".join(wrong))
    return []


def passed(gate: Callable[[], str], space: str) -> str:
    """Go through a gate and print what it found; what is wrong, or an empty text."""
    try:
        print(f"equal: {gate()} ({space})", flush=True)
    except checks.Wrong as error:
        return str(error)
    return ""


def _few(problem: Problem, archs: int) -> Problem:
    """Some archs and images of a problem, and an attack of three steps."""
    few = {"archs": problem.archs[:archs], "images": problem.images[:SMALL], "labels": problem.labels[:SMALL]}
    return replace(checks.with_steps(problem, 3), **few)


def one_subnet(context: Context) -> list[Row]:
    """The ladder of a step that trains one subnet."""
    return ladder.step_rows(context.placed(context.args.archs), context.budget, rounds=context.args.rounds)


def several_subnets(context: Context) -> list[Row]:
    """A step that trains several subnets."""
    return ladder.shared_rows(context.placed(context.args.subnets), context.budget, rounds=context.args.rounds)


def attack(context: Context) -> list[Row]:
    """Input gradients per second; the ceilings are measured here where their section gave none."""
    tops = context.ceilings
    if not tops:
        size = 1024 if context.device.type == "cuda" else 256  # of the matrix product, which is not read here
        tops = limits.ceilings(context.budget, context.device, size=size, batch=context.args.batch)
    return limits.attack_rows(context.placed(), tops, context.budget, rounds=context.args.rounds)


def label(context: Context) -> list[Row]:
    """Seconds per label."""
    args = context.args
    options = {"images": args.images, "training_steps": args.training_steps, "rounds": args.rounds, "seed": args.seed}
    return labels.label_rows(context.placed(), context.budget, **options)


def data(context: Context) -> list[Row]:
    """Augmented images per second."""
    args = context.args
    options = {"images": args.epoch, "batch": args.batch, "workers": args.workers, "rounds": args.rounds}
    return labels.data_rows(context.budget, context.device, **options)


def twins(context: Context) -> list[Row]:
    """Kernels alone, each beside its twin."""
    return limits.kernel_rows(context.budget, context.device, batch=context.args.batch)
