"""One training step: from the released code's to this package's, optimisation by optimisation, per search space.

V0 is the released ProARD step rewritten from its description, V1 a fair textbook step. V2 to V6 add levers to it, V7
and V8 are `proard.training`'s own step with a loop and with the fused optimizer, V9 and V10 use bfloat16. V0 to V8 must
agree in float64 before anything is timed; for V9 and V10, which cannot, the agreement of gradients is printed.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import step_rows
from common import Call, Options, Row, Timing, ladder, write_rows
from official_step import OfficialStep, load_official
from step_checks import checked, reduced_precision
from step_rows import COLUMNS, DEFAULT_SCALES, LEVERS, OFFICIAL, PLAIN, Problem, build, laid_out, scaled_space

from proard.config import PRESETS

SPACES = ["resnet_cifar", "mobilenet_micro"]


def timed_calls(problem: Problem, official: OfficialStep | None = None) -> dict[str, Call]:
    """Per row, a call that makes one step on each arch; the official classes are timed after the first baseline."""
    baseline, *others = LEVERS
    steps = {baseline: build(baseline, problem)} | ({OFFICIAL: official} if official else {})
    steps |= {row: build(row, problem) for row in others}
    return {row: step_rows.training_call(step, problem, laid_out(problem.images, row)) for row, step in steps.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Check, time, print, and write one JSON line per row with `--json`."""
    args = parse(argv)
    write_rows(args.json, [row for name in args.space for row in measured(name, args)])


def measured(name: str, args: Namespace) -> list[Row]:
    """Check, time and print the ladder of one space; return its rows."""
    scale = args.width_scale or DEFAULT_SCALES.get(name, 1.0)
    try:
        space = scaled_space(name, scale)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    official = load_official(args.official, name) if args.official else None
    problem, facts = checked(space, args)
    agreement, facts = reduced_precision(problem), facts | {"space": name, "width_scale": scale}
    step = OfficialStep(official, problem, scale) if official else None
    levers = {**LEVERS, OFFICIAL: "the official classes on archs of the same choices"}

    def own(row: str, timing: Timing) -> Row:
        return step_rows.step_times(row, timing, steps=args.archs, batch=args.batch) | {"agreement": agreement.get(row)}

    how = {"rounds": args.rounds, "plain": PLAIN, "baseline": "released step", "facts": facts, "own": own}
    title = f"{problem.describe()}, width scale {scale:g}"
    rows = ladder("step", timed_calls(problem, step), levers, COLUMNS, title=title, **how)
    for row, values in agreement.items():
        signs, cosine = values["input_gradient_signs"], values["parameter_gradients"]
        print(f"{row} and V8: {signs:.1%} equal signs of input gradients, cosine of weight gradients {cosine:.4f}")
    return rows


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    options = Options(
        __doc__,
        "step",
        quick={"batch": 8, "steps": 2, "archs": 1, "rounds": 2},
        space=(SPACES, "search spaces", sorted(PRESETS)),
        width_scale=(None, "times all channels; 0.125 for resnet_cifar, else 1", float),
        batch=(64, "images per step"),
        steps=(10, "PGD steps of the attack"),
        archs=(2, "sampled subnets; times are means over them"),
        official=(None, "PATH of a checkout of the official repository, timed as one more row", str),
    )
    args = options.read(argv)
    if args.official and args.space == SPACES:
        args.space = SPACES[:1]  # the only space of the official classes
    return args


if __name__ == "__main__":
    main()
