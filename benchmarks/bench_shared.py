"""One step that trains four subnets: one attack per subnet, or one attack that all of them share.

S0 and S1, the released and the plain step, train one subnet, so they are called once per subnet. The package trains all
four in one step: S2 attacks each of them in full; S3 attacks the smallest in full, and every other one takes three
steps from that result, S4 one; S5 and S6 do the same in bfloat16. The gradients of S2 must be the mean of S0's in
float64. A shared attack gives other training images: the loss of robust accuracy is measured by training.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import step_rows
import torch
from common import Call, Float64Losses, Options, computed_here, ladder, relative_difference, write_rows
from step_checks import checked, replay
from step_rows import COLUMNS, PLAIN, RELEASED, PackageStep, Problem, build, laid_out, scaled_space
from torch import Tensor

from proard.config import PRESETS

HALVED = ("S5", "S6")
LEVERS = computed_here(
    {
        "S0": "released step, once per subnet",
        "S1": "plain step, once per subnet",
        "S2": "one step, every subnet attacked in full",
        "S3": "one attack, on the smallest; three steps of their own for the others",
        "S4": "one step of their own for the others",
        "S5": "as S3, in bfloat16",
        "S6": "as S4, in bfloat16",
    },
    rounded=HALVED,
)
ONE_BY_ONE = {"S0": RELEASED, "S1": PLAIN}
OWN_STEPS = {"S3": 3, "S4": 1, "S5": 3, "S6": 1}  # after a shared attack


def package_step(row: str, problem: Problem, **how: object) -> PackageStep:
    """The package's step of a row, on its own copies of student and teacher."""
    dtype = "bfloat16" if row in HALVED else "float32"
    shared = {"shared": "smallest", "own_steps": OWN_STEPS[row]} if row in OWN_STEPS else {}
    return PackageStep(problem, attack_dtype=dtype, dtype=dtype, shared=shared, **how)


def timed_calls(problem: Problem) -> dict[str, Call]:
    """Per row, a call that trains every arch on the batch once."""
    alone = {row: build(name, problem) for row, name in ONE_BY_ONE.items()}
    steps = {row: alone.get(row) or package_step(row, problem) for row in LEVERS}
    return {row: step_rows.training_call(step, problem, together=row not in alone) for row, step in steps.items()}


def equality(problem: Problem, step: PackageStep | None = None) -> dict[str, float]:
    """Largest difference of S1's and S2's gradients from S0's, over each tensor's largest entry, in float64.

    In S2 a subnet's running statistics have moved by the clean passes of the subnets before it: S0's and S1's steps
    start from statistics that are moved in the same way. `step` is S2's.
    """
    found: dict[str, dict[str, Tensor]] = {}
    with Float64Losses():
        for row, name in ONE_BY_ONE.items():
            generator, sums, student = torch.Generator().manual_seed(1), {}, copy.deepcopy(problem.student)
            for arch in problem.archs:
                alone = build(name, replace(problem, student=student))
                alone(arch, laid_out(problem.images, name), problem.labels, generator)
                replay(student, arch, [problem.images])
                for key, parameter in alone.net.named_parameters():
                    sums[key] = sums.get(key, 0) + parameter.grad / len(problem.archs)
            found[row] = sums
        step = step or package_step("S2", problem)
        images = laid_out(problem.images, "S2")
        step.together(problem.archs, images, problem.labels, torch.Generator().manual_seed(1))
        found["S2"] = {name: parameter.grad for name, parameter in step.net.named_parameters()}
    return {row: relative_difference(gradients, found["S0"]) for row, gradients in found.items() if row != "S0"}


def main(argv: Sequence[str] | None = None) -> None:
    """Check, time, print, and write one JSON line per row with `--json`."""
    args = parse(argv)
    problem, facts = checked(scaled_space(args.space, 1.0), args, equality)
    own = partial(step_rows.step_times, steps=1, batch=args.batch)
    how = {"rounds": args.rounds, "plain": "S1", "baseline": "released step", "facts": facts, "own": own}
    write_rows(args.json, ladder("shared", timed_calls(problem), LEVERS, COLUMNS, title=problem.describe(), **how))


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    return Options(
        __doc__,
        "shared",
        quick={"batch": 8, "steps": 2, "rounds": 2},
        space=("resnet_micro", "search space", sorted(PRESETS)),
        batch=(64, "images per step"),
        steps=(10, "PGD steps of a full attack"),
        archs=(4, "sampled subnets of a step"),
    ).read(argv)


if __name__ == "__main__":
    main()
