"""Before anything is timed: the rows of the ladder agree in float64, the bfloat16 rows up to what is printed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from plain_step import Outcome
from step_rows import EXACT, LEVERS, Problem, Step, build, laid_out
from torch import Tensor

from proard.attacks import input_gradient, start_point
from proard.losses import KLToTarget
from proard.nets import SubnetView, Supernet
from proard.space import Arch

TOLERANCE = 1e-10  # of float64 outputs, relative to the largest entry of each tensor


def equality(problem: Problem, rows: Sequence[str] = EXACT) -> dict[str, dict[str, float]]:
    """Largest relative difference to V0 after one step on each arch, per row and quantity.

    Every row starts from equal weights, statistics and (random, non-zero) momentum, and gets equal noise. Compared are
    the adversarial images, clean and adversarial training-mode logits, all gradients and all updated parameters.
    The rows move running statistics differently often (V0: clean batch for its metric, adversarial, clean again;
    V1 to V6: clean, adversarial; the package: clean), so `statistics` compares each row's with those that its own
    moves give, replayed from V0's adversarial images. Nothing else is left out but the counter of batches.

    Returns
    -------
    dict of row to dict of quantity to float
        Each tensor's largest difference over its largest entry; the worst tensor, the worst arch.
    """
    found: dict[str, dict[str, list[float]]] = {row: {} for row in rows}
    for arch in problem.archs:
        reference: dict[str, dict[str, Tensor]] = {}
        with mock.patch.object(Tensor, "float", Tensor.double):  # the package computes losses in float32 at least
            for row in rows:
                step = build(row, problem)
                _fill_momentum(step)
                outcome = step(arch, laid_out(problem.images, row), problem.labels, torch.Generator().manual_seed(1))
                seen = _quantities(step, outcome)
                reference = reference or seen
                expected = {**reference, "statistics": _replay(problem, arch, step.moves, reference["adv"]["adv"])}
                for name, tensors in seen.items():
                    difference = _difference(tensors, expected[name])
                    found[row].setdefault(name, []).append(difference)
    return {row: {name: _largest(values) for name, values in by_name.items()} for row, by_name in found.items()}


def require_equal(differences: dict[str, dict[str, float]]) -> float:
    """Return the largest of all differences, or stop.

    Raises
    ------
    SystemExit
        It exceeds the tolerance: the text names the rows and quantities.
    """
    wrong = [
        f"{row} {name}: {value:.2g}"
        for row, values in differences.items()
        for name, value in values.items()
        if not value <= TOLERANCE
    ]
    if wrong:
        text = ", ".join(wrong)
        raise SystemExit(f"rows differ from V0 in float64 by more than {TOLERANCE:g}, nothing is timed: {text}")
    return max(value for values in differences.values() for value in values.values())


def reduced_precision(problem: Problem) -> dict[str, dict[str, float]]:
    """How far the bfloat16 rows follow V8 in one step, averaged over archs.

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
def _replay(problem: Problem, arch: Arch, moves: Sequence[str], adv: Tensor) -> dict[str, Tensor]:
    """Show the plain supernet these batches in training mode and return its running statistics."""
    net = copy.deepcopy(problem.student).train()
    for batch in moves:
        net({"clean": problem.images, "adv": adv}[batch], arch)
    return _running(net)


def _quantities(step: Step, outcome: Outcome) -> dict[str, dict[str, Tensor]]:
    """Everything that is compared, by quantity and tensor."""
    parameters = dict(step.net.named_parameters())
    return {
        "adv": {"adv": outcome.adv},
        "logits": {"clean": outcome.clean_logits, "adv": outcome.adv_logits},
        "gradients": {name: parameter.grad.clone() for name, parameter in parameters.items()},
        "parameters": {name: parameter.detach().clone() for name, parameter in parameters.items()},
        "statistics": _running(step.net),
    }


def _running(net: Supernet) -> dict[str, Tensor]:
    """Copy the running means and variances."""
    return {name: value.clone() for name, value in net.named_buffers() if "running_" in name}


def _difference(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of a tensor over its largest entry (at least 1e-4 of the quantity's largest)."""
    floor = 1e-4 * max(float(want.abs().max()) for want in expected.values())
    return _largest(
        float((tensors[name] - want).abs().max()) / max(float(want.abs().max()), floor)
        for name, want in expected.items()
    )


def _largest(values: Iterable[float]) -> float:
    """Maximum that is not a number where any value is not."""
    return float(np.max(list(values)))
