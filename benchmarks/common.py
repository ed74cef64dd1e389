"""Shared by benchmarks: options, the machine, interleaved timing, rows, tables, comparisons, the package's step."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from proard import __version__
from proard.artifacts.files import write_text
from proard.attacks import pgd
from proard.config import Threat
from proard.host import usable_cores
from proard.kernels import has_bfloat16
from proard.nets import Supernet
from proard.progress import Progress
from proard.training import Plan, TrainingStep, training_step

Row = dict[str, Any]
Call = Callable[[int], object]
NOISY = 0.10  # spread of the two baselines above which a run's ratios must not be quoted
SHARED = {
    "threads": (2, "of torch"),
    "rounds": (5, "rounds that count; medians are over them"),
    "seed": (0, "of everything random"),
}


class Options(argparse.ArgumentParser):
    """The command line of a benchmark: its own options, those in `SHARED`, `--json` and `--quick`.

    An option is its default, its help and, if the default does not define it, its type or its choices; a list takes
    several values, None removes an option. Whole numbers are at least 1, except `seed` and those in `zero`.
    """

    def __init__(self, doc: str, name: str, *, quick: Row, zero: Collection[str] = (), **own: tuple | None) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.quick, self.counts = quick, []
        for option, (default, text, *more) in ((name, spec) for name, spec in {**SHARED, **own}.items() if spec):
            example = default[0] if isinstance(default, list) else default
            kind = more[0] if more else type(example)
            words = {"choices": kind} if isinstance(kind, (list, tuple)) else {"type": kind}
            words |= {"nargs": "+"} if isinstance(default, list) else {}
            words = {"action": "store_true"} if kind is bool else words | {"default": default}
            self.add_argument(f"--{option.replace('_', '-')}", help=text, **words)
            self.counts += [option] if kind is int and option not in ("seed", *zero) else []
        results = Path(__file__).parent / "results" / f"bench_{name}.json"
        self.add_argument("--json", nargs="?", const=str(results), metavar="FILE", help=f"default {results.name}")
        values = ", ".join(f"{key} {value}" for key, value in quick.items())
        self.add_argument("--quick", action="store_true", help=f"a test run; its ratios are meaningless: {values}")

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Read the command line and set the number of threads; exit with the usage if a count is below 1."""
        args = self.parse_args(argv)
        vars(args).update(self.quick if args.quick else {})
        for name in self.counts:
            least = min(np.atleast_1d(1 if getattr(args, name) is None else getattr(args, name)))
            if least < 1:
                self.error(f"--{name.replace('_', '-')} is {least}; expected at least 1")
        if args.threads:
            torch.set_num_threads(args.threads)
        return args


def given(args: argparse.Namespace, *names: str) -> Row:
    """Some of the options, by name."""
    return {name: getattr(args, name) for name in names}


def machine() -> Row:
    """Processor, cores, threads, versions and load, without which a time is meaningless."""
    return {
        "processor": cpu_info("model name") or platform.processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "proard": __version__,
    }


def cpu_info(*names: str) -> str:
    """The first line of /proc/cpuinfo with one of these names; empty if there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(names)), "")


def computed_here(rows: Mapping[str, Any], *, rounded: Collection[str]) -> dict[str, Any]:
    """The rows, without those in `rounded` (bfloat16) if this CPU only emulates that type: they would take minutes."""
    return {name: row for name, row in rows.items() if name not in rounded or has_bfloat16("cpu")}


# --- timing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Medians over rounds: seconds of one call, of the wall and of the processor; ratios taken within a round.

    `ratio_total` is how many times faster than the first call, `ratio_previous` than the one above, `ratio_plain` than
    the second baseline, `over` than every call by name.
    """

    seconds: float
    cpu_seconds: float
    ratio_total: float
    ratio_previous: float
    ratio_plain: float | None = None
    over: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Timed:
    """Interleaved timings: the rounds that were made, and the difference of the baseline's two medians."""

    timings: dict[str, Timing]
    rounds: int
    spread: float

    @property
    def quality(self) -> Row:
        """Rounds and noise."""
        return {"rounds": self.rounds, "baseline_spread": round(self.spread, 4), "noisy": self.spread > NOISY}


class TimeIsShort(Exception):
    """The time ended before anything was measured."""


@dataclass(frozen=True)
class Budget:
    """The time limit of a benchmark; `end` is on the clock `now`."""

    end: float = float("inf")
    now: Callable[[], float] = time.monotonic

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - self.now()

    def require(self) -> None:
        """Raise `TimeIsShort` if no time is left."""
        if self.left <= 0:
            raise TimeIsShort


def time_interleaved(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    label: str,
    plain: str | None = None,
    budget: Budget | None = None,
    device: torch.device | str = "cpu",
) -> Timed:
    """Time every call once per round, the first one (the baseline) once more at the end of each round.

    Every call takes the number of the round; a round -1 warms up. `plain` names the second baseline. A round starts
    only if the budget has time for it; `TimeIsShort` is raised if there is none for the first.
    A call's time ends when the device has finished.
    """
    budget, order = budget or Budget(), [*calls, next(iter(calls))]
    progress = Progress(label, len(calls) + rounds * len(order), "timings")
    for name in calls:
        budget.require()
        clocked(calls[name], -1, device)
        progress.advance(note=name)
    clocks: list[list[tuple[float, float]]] = []
    longest = 0.0
    while len(clocks) < rounds and budget.left > longest:
        begun, number = budget.now(), len(clocks)
        clocks.append([])
        for name in order:
            clocks[-1].append(clocked(calls[name], number, device))
            progress.advance(note=name)
        longest = max(longest, budget.now() - begun)
    progress.close()
    if not clocks:
        raise TimeIsShort
    return summarise(list(calls), clocks, plain=plain)


def summarise(
    names: Sequence[str], clocks: Sequence[Sequence[tuple[float, float]]], *, plain: str | None = None
) -> Timed:
    """Medians and ratios of rounds of (wall, processor) seconds; each round ends with the second baseline."""
    both = np.asarray(clocks).transpose(2, 0, 1)  # wall and processor, rounds, calls
    walls, used = np.concatenate([(both[..., :1] + both[..., -1:]) / 2, both[..., 1:-1]], axis=-1)
    timings = {}
    for index, name in enumerate(names):
        over = [0, max(index - 1, 0), *([] if plain is None else [names.index(plain)])]
        columns = [walls[:, index], used[:, index], *(walls[:, other] / walls[:, index] for other in over)]
        over_all = dict(zip(names, np.median(walls / walls[:, index, None], axis=0).tolist(), strict=True))
        timings[name] = Timing(*np.median(columns, axis=1).tolist(), over=over_all)
    first, again = np.median(both[0][:, [0, -1]], axis=0).tolist()
    return Timed(timings, len(clocks), abs(first - again) / min(first, again))


def clocked(call: Call, number: int, device: torch.device | str = "cpu") -> tuple[float, float]:
    """Wall and processor seconds of one call, until the device has finished."""
    wall, used = time.perf_counter(), time.process_time()
    call(number)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - used


# --- rows and tables -----------------------------------------------------------------------------------------------


def ladder(
    bench: str,
    calls: Mapping[str, Call],
    levers: Mapping[str, str],
    columns: Mapping[str, str],
    *,
    title: str,
    baseline: str,
    facts: Row,
    own: Callable[[str, Timing], Row],
    second: str = "ratio_plain",
    **how: Any,
) -> list[Row]:
    """Time calls, make a row of each, print them under the title and return them.

    `baseline` names the first call, `second` the ratio to the second baseline; `own` gives the facts of one row,
    `facts` are the same in all; `how` are options of `time_interleaved`.
    """
    timed, rows = time_interleaved(calls, label=title.split(",")[0], **how), []
    for name, timing in timed.timings.items():
        ratios = {"ratio_total": timing.ratio_total, second: timing.ratio_plain}
        ratios |= {"ratio_previous": timing.ratio_previous}
        rounded = {key: round(value, 4) for key, value in ratios.items() if value is not None}
        row = {"bench": bench, "row": name, "lever": levers[name], "baseline": baseline, **rounded}
        rows.append(row | own(name, timing) | facts | timed.quality)
    show(title, rows, columns)
    return rows


def write_rows(path: str | Path | None, rows: Sequence[Row]) -> None:
    """Write one JSON line per row, if a file is given."""
    if path:
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def show(title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Print rows as a table: their name, these keys as `heading:format`, their description; then the machine."""
    headings, formats = zip(*(column.rsplit(":", 1) for column in columns.values()), strict=True)
    cells = [(row.get("row", ""), *map(cell, map(row.get, columns), formats), row.get("lever", "")) for row in rows]
    first = rows[0]
    print(f"\n{title}" + (f", medians of {first['rounds']} rounds" if "rounds" in first else ""))
    print(table(("row", *headings, "what"), cells))
    if "baseline_spread" in first:
        words = " - NOISY, do not quote these ratios" if any(row["noisy"] for row in rows) else ""
        print(f"baseline timed twice: spread {max(row['baseline_spread'] for row in rows):.1%}{words}")
    print(", ".join(f"{key} {value}" for key, value in first.get("machine", {}).items()), flush=True)


def cell(value: Any, form: str) -> str:
    """A value in a format, or a dash if there is none."""
    large = form == ".3g" and isinstance(value, float) and value >= 1000
    return "-" if value is None else format(value, ".0f" if large else form)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text columns: the last one flush left, the others flush right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in list(zip(*lines, strict=True))[:-1]]
    return "\n".join("  ".join([*map(str.rjust, line, widths), line[-1]]) for line in lines)


# --- comparisons before anything is timed --------------------------------------------------------------------------


class Float64Losses(TorchFunctionMode):
    """Context in which losses of float64 networks are computed in float64 instead of float32."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Let `Tensor.float` leave float64 tensors as they are."""
        kept = function is Tensor.float and args[0].dtype is torch.float64
        return args[0] if kept else function(*args, **(kwargs or {}))


def relative_difference(found: Mapping[Any, Tensor], wanted: Mapping[Any, Tensor]) -> float:
    """Largest difference of a tensor divided by its largest entry (at least 1e-4 of the largest of all)."""
    sizes = {name: float(want.abs().max()) for name, want in wanted.items()}
    floor = 1e-4 * max(sizes.values())
    return largest(float((found[name] - want).abs().max()) / max(sizes[name], floor) for name, want in wanted.items())


def largest(values: Iterable[float]) -> float:
    """Maximum; NaN if any value is NaN."""
    return float(np.max(list(values)))


def require_close(differences: Mapping[str, float], allowed: float | Mapping[str, float], what: str) -> float:
    """The largest difference; exit with a message if one exceeds its limit, given by name."""
    limits = allowed if isinstance(allowed, Mapping) else dict.fromkeys(differences, allowed)
    wrong = [f"{name}: {value:.2g}" for name, value in differences.items() if not value <= limits[name]]
    if wrong:
        raise SystemExit(f"{what}, nothing is timed: {', '.join(wrong)}")
    return largest(differences.values())


# --- the package's training step -----------------------------------------------------------------------------------


def made_step(
    net: Supernet,
    settings: Any,
    plan: Plan,
    eps: float,
    teacher: Callable[[Tensor], Tensor] | None,
    seed: int,
    *,
    take_steps: Callable[..., Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    attack_dtype: torch.dtype | None = None,
    capture: Callable[[Callable[[], object]], Callable[[], object]] | None = None,
) -> TrainingStep:
    """`proard.training`'s step; a benchmark may replace attack steps, their type, the optimizer and graphs."""

    def search(*problem: Any, steps: Callable[..., Tensor], **options: Any) -> Tensor:
        return pgd(*problem, steps=take_steps or steps, **options)

    made = training_step(
        net, settings, plan, threat=Threat(eps=eps), teacher=teacher, seed=seed, search=search, capture=capture
    )
    made.update.optimizer = optimizer or made.update.optimizer
    made.attacker.dtype = attack_dtype or made.attacker.dtype
    if made.attacker.dtype == torch.float32:
        made.attacker.dtype = net.mean.dtype  # float64 in equality checks
    return made
