"""Checks before anything is timed: rows of the ladder agree in float64; differences of bfloat16 rows are printed."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch
import torch.nn.functional as F
from common import Float64Losses, Row, largest, machine, relative_difference, require_close
from plain_step import Outcome, Recipe
from step_rows import EXACT, LEVERS, Problem, Step, build, laid_out, make_problem
from torch import Tensor

from proard.attacks import input_gradient, start_point
from proard.losses import KLToTarget
from proard.nets import SubnetView, Supernet
from proard.space import Arch, SearchSpace

TOLERANCE = 1e-10  # of float64 outputs, relative to the largest entry of each tensor


def equality(
    problem: Problem, rows: Sequence[str] = EXACT, build: Callable[[str, Problem], Step] = build
) -> dict[str, float]:
    """Largest relative difference to V0 after one step on each arch, by row and quantity (`V3 adv`).

    Every row starts from equal weights, statistics and (random, non-zero) momentum, and gets equal noise. Compared are
    the adversarial images, clean and adversarial training-mode logits, all gradients and all updated parameters.
    The rows update running statistics at different passes (V0: clean batch for its metric, adversarial, clean again;
    V1 to V6: clean, adversarial; the package: clean), so `statistics` compares each row's with a replay of its
    own updates on V0's adversarial images. Only batch norm's counter of batches is not compared.
    """
    found: dict[str, list[float]] = {}
    for arch in problem.archs:
        reference: dict[str, dict[str, Tensor]] = {}
        with Float64Losses():
            for row in rows:
                step = build(row, problem)
                _fill_momentum(step)
                outcome = step(arch, laid_out(problem.images, row), problem.labels, torch.Generator().manual_seed(1))
                seen = _quantities(step, outcome)
                reference = reference or seen
                batches = {"clean": problem.images, "adv": reference["adv"]["adv"]}
                replayed = replay(copy.deepcopy(problem.student), arch, [batches[name] for name in step.moves])
                expected = {**reference, "statistics": running(replayed)}
                for name, tensors in seen.items():
                    found.setdefault(f"{row} {name}", []).append(relative_difference(tensors, expected[name]))
    return {name: largest(values) for name, values in found.items()}


def require_equal(differences: Mapping[str, float]) -> float:
    """The largest of all differences; exits if it exceeds the tolerance."""
    return require_close(differences, TOLERANCE, f"rows differ from the released step by more than {TOLERANCE:g}")


def checked(
    space: SearchSpace, args: Namespace, equality: Callable[[Problem], dict[str, float]] = equality
) -> tuple[Problem, Row]:
    """The problem of the options, after a check that rows agree on a small one in float64, and facts about it."""
    recipe = Recipe(num_steps=args.steps)
    how = {"num_archs": args.archs, "seed": args.seed, "recipe": recipe}
    small = make_problem(space, batch_size=min(args.batch, 8), dtype=torch.float64, **how)
    difference = require_equal(equality(small.with_steps(min(args.steps, 3))))
    print(f"{space.settings.name}: rows agree in float64, largest relative difference {difference:.1e}", flush=True)
    problem = make_problem(space, batch_size=args.batch, dtype=torch.float32, **how)
    facts = {"space": space.settings.name, "archs": problem.facts(), "batch": args.batch, **asdict(recipe)}
    return problem, facts | {"seed": args.seed, "largest_difference": difference, "machine": machine()}


def reduced_precision(problem: Problem) -> dict[str, dict[str, float]]:
    """Agreement of the bfloat16 rows with V8 in one step, averaged over archs.

    `input_gradient_signs`: share of equal signs in the attack's first input gradient. `parameter_gradients`: cosine
    between the step's gradients and V8's.
    """
    agreement: dict[str, dict[str, float]] = {row: {} for row in ("V9", "V10") if row in LEVERS}
    for arch in problem.archs:
        view = SubnetView(problem.student, arch)
        folds = [view.folded(view.running_statistics(), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
        with torch.no_grad():
            target = KLToTarget(problem.teacher.eval()(problem.images, problem.teacher.space.largest))
        generator = torch.Generator().manual_seed(1)
        start = start_point(problem.images, eps=problem.recipe.eps, start="gaussian", generator=generator)
        exact, rounded = (input_gradient(net, target, start)[1].sign() for net in folds)
        signs = float((exact == rounded).float().mean())
        gradients = {}
        for row in ("V8", *agreement):
            step = build(row, problem)
            step(arch, laid_out(problem.images, row), problem.labels, torch.Generator().manual_seed(1))
            gradients[row] = torch.cat([p.grad.flatten() for p in step.net.parameters()])
        for row, values in agreement.items():
            cosine = float(F.cosine_similarity(gradients[row], gradients["V8"], dim=0))
            for name, value in (("input_gradient_signs", signs), ("parameter_gradients", cosine)):
                values[name] = values.get(name, 0.0) + value / len(problem.archs)
    return agreement


def _fill_momentum(step: Step) -> None:
    """Equal random momentum for every row."""
    generator = torch.Generator().manual_seed(2)
    for parameter in step.net.parameters():
        noise = torch.empty(parameter.shape, dtype=parameter.dtype).normal_(0, 1e-2, generator=generator)
        step.optimizer.state[parameter]["momentum_buffer"].copy_(noise)


@torch.no_grad()
def replay(net: Supernet, arch: Arch, batches: Sequence[Tensor]) -> Supernet:
    """The network after these batches in training mode, with updated running statistics."""
    net.train()
    for batch in batches:
        net(batch, arch)
    return net


def _quantities(step: Step, outcome: Outcome) -> dict[str, dict[str, Tensor]]:
    """All compared tensors, by quantity and name."""
    parameters = dict(step.net.named_parameters())
    return {
        "adv": {"adv": outcome.adv},
        "logits": {"clean": outcome.clean_logits, "adv": outcome.adv_logits},
        "gradients": {name: parameter.grad.clone() for name, parameter in parameters.items()},
        "parameters": {name: parameter.detach().clone() for name, parameter in parameters.items()},
        "statistics": running(step.net),
    }


def running(net: Supernet) -> dict[str, Tensor]:
    """Copy the running means and variances."""
    return {name: value.clone() for name, value in net.named_buffers() if "running_" in name}
