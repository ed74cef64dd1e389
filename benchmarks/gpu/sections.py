"""The sections of the GPU benchmark: inputs, measurement and result of each, and its process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common import Budget, Row, TimeIsShort, given, machine
from plain_step import Recipe
from step_rows import Problem, make_problem, scaled_space

from gpu import checks
from gpu import rows as measured
from proard.artifacts.files import write_text
from proard.kernels import plain_twins
from proard.training.ranks import enter_backward_thread

SMALL, SETTLING = 8, 16  # images of the equality gates, and from which the networks' statistics are made
NARROW = {"resnet_cifar": 0.125, "mobilenet_v3_cifar": 0.125}  # compared with a CPU, slow in float64, at this width
HALF = ("resnet_cifar",)  # spaces whose training step is profiled
SCRIPT = Path(__file__).parents[1] / "bench_gpu.py"
SANITIZER = "compute-sanitizer"
PROOFS = "kernels: Triton"
CHECKS = ("--tool", "memcheck", "--report-api-errors", "no", "--target-processes", "application-only")
CHECKS += ("--launch-timeout", "120")  # seconds in which a process must have come to the GPU
FAULT = 86  # its exit code where it has found an access out of bounds


@dataclass(frozen=True)
class Start:
    """Input of a section; it starts no round that would end after `until`."""

    until: float  # in seconds since 1970
    ceilings: dict[str, float] = field(default_factory=dict)  # rates by name, if that section has been run
    plain_kernels: bool = False  # fused kernels are not used, since one of them failed its check


@dataclass(frozen=True)
class Result:
    """Result of a section: `state` is done, short (no time to measure anything) or failed; `why` is the reason."""

    state: str
    why: str = ""
    rows: list[Row] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Context:
    """Data of a section; `problem`, of the preset `space`, is on the CPU, in float32, with few images."""

    args: Namespace
    clock: measured.Clock
    space: str | None
    problem: Problem | None
    ceilings: dict[str, float]

    def placed(self, archs: int | None = None) -> Problem:
        """The problem on the device, with a whole batch of random images and that many archs."""
        generator = torch.Generator().manual_seed(self.args.seed)
        shape, classes = self.problem.images.shape[1:], self.problem.student.space.settings.classes
        images = torch.rand((self.args.batch, *shape), generator=generator).mul_(0.96).add_(0.02)
        labels = torch.randint(classes, (self.args.batch,), generator=generator)
        chosen = replace(self.problem, archs=self.problem.archs[:archs], images=images, labels=labels)
        return chosen.placed(self.clock.device)


@dataclass(frozen=True)
class Section:
    """One part of the benchmark: its name for `--sections` and in the summary, its share of the remaining time."""

    part: str
    title: str
    weight: float
    measure: Callable[[Context], list[Row]]
    space: str | None = None  # preset of its problem

    @property
    def proves_kernels(self) -> bool:
        """Whether it runs under the sanitizer, and later sections use the plain kernels if it fails."""
        return self.title == PROOFS


def sections(args: Namespace) -> list[Section]:
    """All sections for a device, in order."""
    label = given(args, "images", "training_steps", "seed")
    data, several = {"images": args.epoch, **given(args, "batch", "workers")}, f"{args.subnets} subnets a step"
    each: list[tuple[str, str, float, Callable[[Context], list[Row]]]] = [
        ("equality", "equality", 2, equal),
        ("step", "one subnet a step", 4, lambda c: measured.step_rows(c.placed(args.archs), c.clock)),
        ("shared", several, 4, lambda c: measured.shared_rows(c.placed(args.subnets), c.clock)),
        ("attack", "share of the ceiling", 3, lambda c: measured.attack_rows(c.placed(), c.clock, c.ceilings, **label)),
        ("labels", "seconds per label", 3, lambda c: measured.label_rows(c.placed(), c.clock, **label)),
    ]
    proofs = {"Triton": (16, triton_rows), "ways to convolve": (2, lambda c: checks.way_rows(c.clock.device))}
    if args.device == "cpu":
        proofs = {}
    of_spaces = [Section(part, f"{title}, {space}", *how, space) for part, title, *how in each for space in args.space]
    if args.device == "cuda":
        of_spaces += [Section("busy", f"a training step, {name}", 2, busy, name) for name in args.space if name in HALF]
    return [
        *(Section("kernels", f"kernels: {name}", *proof) for name, proof in proofs.items()),
        Section("ceilings", "ceilings", 1, lambda c: measured.ceiling_rows(c.clock, batch=args.batch)),
        *of_spaces,
        Section("data", "augmented images", 1, lambda c: measured.data_rows(c.clock, **data)),
        Section("twins", "kernels alone", 1, lambda c: measured.kernel_rows(c.clock, batch=args.batch)),
    ]


def triton_rows(context: Context) -> list[Row]:
    """Rows of the proofs of all Triton kernels."""
    return [row for name in checks.REAL for row in checks.proof_rows(name, context.clock.device)]


def busy(context: Context) -> list[Row]:
    """Rows of a training step of the largest, the smallest and a drawn subnet at half width."""
    args = context.args
    problem = problem_of(context.space, args, 0.5 * args.width_scale)
    space = problem.student.space
    problem = replace(problem, archs=[space.largest, space.smallest, problem.archs[0]])
    return measured.busy_rows(replace(context, problem=problem).placed(), context.clock, profile=args.profile)


def problem_of(name: str | None, args: Namespace, width_scale: float) -> Problem | None:
    """Archs and networks of a space at a width, on the CPU; nothing for a section without a space."""
    if name is None:
        return None
    how = {"num_archs": max(args.archs, args.subnets), "batch_size": min(args.batch, SETTLING), "seed": args.seed}
    space, recipe = scaled_space(name, width_scale), Recipe(num_steps=args.steps)
    return make_problem(space, recipe=recipe, dtype=torch.float32, **how)


def run_section(section: Section, args: Namespace, problem: Problem | None, start: Start) -> Result:
    """Run a section in this process; an error becomes its result."""
    device = torch.device(args.device)
    budget = Budget(time.monotonic() + start.until - time.time())
    facts = given(args, "width_scale", "batch", "steps", "seed", "device")
    try:
        gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
        facts["machine"] = {**machine(), "gpu": gpu}
        if gpu:
            enter_backward_thread(args.device)
        facts |= {"space": section.space} if section.space else {}
        facts |= {"plain_kernels": True} if start.plain_kernels else {}
        clock = measured.Clock(budget, device, args.rounds)
        with plain_twins("fused") if start.plain_kernels else contextlib.nullcontext():
            rows = section.measure(Context(args, clock, section.space, problem, start.ceilings))
    except TimeIsShort:
        return late(args)
    except SystemExit as error:  # a gate, or a benchmark's own check
        why = str(error)
    except Exception as error:  # out of memory, a lost context: later sections have their own process
        traceback.print_exc()
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    else:
        return Result("done", "", [row | facts for row in rows], facts["machine"])
    return Result("failed", why, machine=facts.get("machine", {}))


def late(args: Namespace) -> Result:
    """The result of a section that had too little time."""
    return Result("short", f"it would end after the {args.minutes:g} minutes allowed")


def equal(context: Context) -> list[Row]:
    """Run the equality gates for a device; if one fails, the error is raised after all others have run.

    Attack and step are compared with a CPU's at a small width, captured attacks and host waits at the given one.
    """
    context.clock.budget.require()
    args, device, space = context.args, context.clock.device, context.space
    gpu = device.type == "cuda"
    narrow = problem_of(space, args, min(args.width_scale, NARROW.get(space, 1.0)))
    few = _few(context.problem, args.archs).placed(device)
    exact = [_few(narrow, args.archs).placed(where, torch.float64) for where in (torch.device("cpu"), device)]
    capture = {} if gpu else {"capture": lambda body: body}
    gates: list[Callable[[], str]] = [
        *([lambda: checks.fused_attacks_agree(few)] if gpu else []),
        lambda: checks.attacks_agree(*exact),
        lambda: checks.graphs_agree(few, **capture),
        lambda: checks.steps_agree(*exact),
        lambda: checks.replays_agree(few, **capture),
    ]
    with checks.full_float32():
        wrong = [fault for gate in gates if (fault := passed(gate, space))]
    wrong += [fault] if gpu and (fault := passed(lambda: checks.step_never_waits(few), space)) else []
    if wrong:
        raise checks.Wrong("; ".join(wrong))
    return []


def passed(gate: Callable[[], str], space: str) -> str:
    """Run a gate and print its result; return the error, or an empty text."""
    try:
        print(f"equal: {gate()} ({space})", flush=True)
    except checks.Wrong as error:
        return str(error)
    return ""


def _few(problem: Problem, archs: int) -> Problem:
    """Some archs and images of a problem, and an attack of three steps."""
    few = {"archs": problem.archs[:archs], "images": problem.images[:SMALL], "labels": problem.labels[:SMALL]}
    return replace(problem.with_steps(3), **few)


# --- a process per section: what one of them loses, a CUDA context say, no other one misses --------------------------


class OwnProcess:
    """A section's process. It loads and prepares all that needs no device, then waits for the start."""

    def __init__(self, section: Section, args: Namespace, *, script: Path = SCRIPT) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "result.json"
        own = [sys.executable, str(script), *args.argv, "--one", section.title, "--result", str(self.path)]
        tool = sanitizer(section, args.device)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if tool:  # torch would keep freed memory and hide what reads it
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        how = {"stdin": subprocess.PIPE, "env": environment, "text": True, "start_new_session": True}
        self.process = subprocess.Popen([*tool, *own], **how)

    def finish(self, start: Start, seconds: float) -> Result:
        """Start the section and wait for its result, at most so many seconds."""
        try:
            self.process.communicate(json.dumps(asdict(start)) + "\n", timeout=max(seconds, 0))
        except subprocess.TimeoutExpired:
            return Result("failed", f"stopped after {seconds:.0f} s")
        except BrokenPipeError:  # it ended before its start
            self.process.wait()
        finally:
            self._kill()
        code = self.process.returncode
        if code == FAULT:
            return Result("failed", f"{SANITIZER} found accesses out of bounds, see above")
        if self.path.exists():
            return Result(**json.loads(self.path.read_text(encoding="utf-8")))
        why = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
        return Result("failed", f"its process ended with {why}")

    def stop(self) -> None:
        """End the process and remove its folder."""
        self._kill()
        self.folder.cleanup()

    def _kill(self) -> None:
        """End the process and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def sanitizer(section: Section, device: str) -> list[str]:
    """The command line's prefix for a section under the sanitizer, if that is installed."""
    tool = shutil.which(SANITIZER) if section.proves_kernels and device == "cuda" else None
    return [tool, *CHECKS, "--error-exitcode", str(FAULT)] if tool else []


def run_as_process(section: Section, args: Namespace) -> None:
    """Main function of a section's process: prepare, wait for the start, run, write the result."""
    problem = problem_of(section.space, args, args.width_scale)
    line = sys.stdin.readline()
    if not line:  # the benchmark has ended
        return
    result = run_section(section, args, problem, Start(**json.loads(line)))
    write_text(args.result, json.dumps(asdict(result)))
