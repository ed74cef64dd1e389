"""Input gradients per second of the attack, by batch size, beside plain PGD and the machine's convolution ceiling.

The ceiling is the best rate of several convolutions in channels_last memory, per type, before and after the attacks.
`plain` is PGD as in a textbook: NCHW memory, weights sliced in every forward, unfolded norms, autograd's gradient of
the loss. The network is first trained for some steps on synthetic patterns, so that it has a robust accuracy.

Before anything is timed: in float64, 99.9 % of the pixels must end as plain PGD's do. In bfloat16 the signs of the
first gradient must be right for 90 % of it, by size. Accuracies under the attacks must agree within noise in every
type. The share of equal float32 iterates is printed: after ten steps it measures how rough the network is.

    python benchmarks/bench_attack.py --help
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from common import NOISY, Timing, computed_here, machine, table, time_interleaved, write_rows
from plain_step import Recipe, chained_pgd, sliced_forward
from step_rows import DEFAULT_SCALES, Problem, make_problem, scaled_space
from torch import Tensor
from trained import trained

from proard.attacks import pgd, start_point, take_steps
from proard.config import PRESETS
from proard.losses import KLToTarget
from proard.nets import FoldedNet, SubnetView

RESULTS = Path(__file__).parent / "results" / "bench_attack.json"
CEILING_SHAPES = ((32, 32, 32, 3), (64, 64, 16, 3), (128, 128, 8, 3), (256, 256, 8, 3), (256, 256, 16, 1))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TIMED = computed_here(DTYPES, rounded=["bfloat16"])
SAME_ITERATES, SAME_SIGNS = 0.999, 0.9
FEW_IMAGES = 8  # compared in float64
CONFIDENCE = 10.0  # of the attacked target: logits of the true class above the others
Attack = Callable[[Tensor, Tensor, torch.Generator], Tensor]  # images, target logits, generator -> adversarial images


@dataclass(frozen=True)
class Agreement:
    """How far the attacks agree on one batch.

    Attributes
    ----------
    exact, iterates : float
        Share of the pixels in which the folded attack ends as plain PGD does, in float64 and in float32.
    equal_signs, signs : float
        Share of equal signs of the first gradient, bfloat16 against float32: of pixels, and of the gradient's 1-norm.
    accuracies : dict of str to float
        Robust accuracy by the float32 network, per attack.
    noise : float
        Two standard errors of a difference of such shares.
    """

    exact: float
    iterates: float
    equal_signs: float
    signs: float
    accuracies: dict[str, float]
    noise: float

    def require(self) -> None:
        """Stop where they do not agree.

        Raises
        ------
        SystemExit
            The text has the figures and what was expected.
        """
        gap = max(self.accuracies.values()) - min(self.accuracies.values())
        wanted = (
            ("equal iterates in float64", self.exact, ">=", SAME_ITERATES, self.exact >= SAME_ITERATES),
            ("right signs in bfloat16", self.signs, ">=", SAME_SIGNS, self.signs >= SAME_SIGNS),
            ("gap of accuracies", gap, "<=", self.noise, gap <= self.noise),
        )
        faults = [
            f"{what} {value:.4f}, expected {sign} {limit:.4f}" for what, value, sign, limit, ok in wanted if not ok
        ]
        if faults:
            raise SystemExit("the attacks disagree, nothing is timed: " + "; ".join(faults))


def ceiling(
    dtype: torch.dtype,
    *,
    seconds: float,
    device: torch.device | str = "cpu",
    batch: int = 64,
    shapes: Sequence[tuple[int, int, int, int]] = CEILING_SHAPES,
) -> float:
    """Best rate of a convolution's forward pass in channels_last memory, in FLOP/s."""
    rates, gpu = [], torch.device(device).type == "cuda"
    calls = 10 if gpu else 1  # a GPU is waited for once in so many
    for channels, out, side, kernel in shapes:
        x = torch.rand(batch, channels, side, side, device=device).to(dtype, memory_format=torch.channels_last)
        weight = torch.rand(out, channels, kernel, kernel, device=device).to(dtype, memory_format=torch.channels_last)
        flops = 2 * batch * channels * out * side**2 * kernel**2
        clocks, end = [], time.perf_counter() + seconds
        with torch.no_grad():
            while time.perf_counter() < end or len(clocks) < 3:
                start = time.perf_counter()
                for _ in range(calls):
                    F.conv2d(x, weight, padding=kernel // 2)
                if gpu:
                    torch.cuda.synchronize()
                clocks.append((time.perf_counter() - start) / calls)
        rates.append(flops / statistics.median(clocks[1:]))
    return max(rates)


def attacks(problem: Problem, steps: Callable[..., Tensor] = take_steps) -> dict[str, Attack]:
    """The attack in plain form and on the folded view, on the problem's first arch; the plain form in its type.

    `steps` is what takes the folded view's steps.
    """
    arch, recipe = problem.archs[0], problem.recipe
    options = {"eps": recipe.eps, "step_size": recipe.step_size, "num_steps": recipe.num_steps}
    plain_net = problem.student.eval()
    view = SubnetView(problem.student, arch)
    layout = torch.contiguous_format

    def plain(images: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        def predict(x: Tensor) -> Tensor:
            return sliced_forward(plain_net, arch, x, training=False, layout=layout)

        return chained_pgd(predict, target, images, generator=generator, layout=layout, **options)

    def folded(dtype: torch.dtype) -> Attack:
        net = view.folded(view.running_statistics(), dtype=dtype)

        def attack(images: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
            return pgd(net, KLToTarget(target), images, start="gaussian", generator=generator, steps=steps, **options)

        return attack

    own = problem.student.mean.dtype
    dtypes = TIMED if own is torch.float32 else {"float64": own}
    return {"plain": plain, **{name: folded(dtype) for name, dtype in dtypes.items()}}


def agreement(problem: Problem) -> Agreement:
    """Run every attack once on the whole problem, and on a few of its images in float64, and compare."""
    images = laid_out(problem.images, "float32")
    ends, few = ends_of(problem), problem.images[:FEW_IMAGES]
    small = replace(problem, images=few, labels=problem.labels[:FEW_IMAGES])
    exact = ends_of(replace(small, images=few.double(), student=copy.deepcopy(problem.student).double()))
    view = SubnetView(problem.student, problem.archs[0])
    fixed = view.running_statistics()
    nets = {name: view.folded(fixed, dtype=dtype) for name, dtype in DTYPES.items()}
    target = target_logits(problem)
    start = start_point(images, eps=problem.recipe.eps, start="gaussian", generator=torch.Generator().manual_seed(1))
    gradient, rounded = (first_gradient(net, target, start) for net in nets.values())
    right = gradient.sign() == rounded.sign()
    with torch.no_grad():
        stands = {name: nets["float32"](end).argmax(1) == problem.labels for name, end in ends.items()}
    accuracies = {name: float(which.double().mean()) for name, which in stands.items()}
    share, count = accuracies["float32"], len(images)
    return Agreement(
        exact=same(exact["float64"], exact["plain"]),
        iterates=same(ends["float32"], ends["plain"]),
        equal_signs=float(right.double().mean()),
        signs=float((gradient.abs() * right).sum() / gradient.abs().sum()),
        accuracies=accuracies,
        noise=2 * (2 * share * (1 - share) / count) ** 0.5 + 1 / count,
    )


def ends_of(problem: Problem) -> dict[str, Tensor]:
    """Adversarial images of every attack, from equal noise."""
    target = target_logits(problem).to(problem.images)
    with ExitStack() as stack:
        if problem.images.dtype is torch.float64:  # the package computes objectives in float32 at least
            stack.enter_context(mock.patch.object(Tensor, "float", Tensor.double))
        return {
            name: attack(laid_out(problem.images, name), target, torch.Generator().manual_seed(1))
            for name, attack in attacks(problem).items()
        }


def same(first: Tensor, second: Tensor) -> float:
    """Share of equal pixels."""
    return float(((first.double() - second.double()).abs() < 1e-5).double().mean())


def first_gradient(net: FoldedNet, target: Tensor, images: Tensor) -> Tensor:
    """Gradient of the divergence at some images."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(KLToTarget(target)(net(images)).sum(), images)
    return gradient


def target_logits(problem: Problem) -> Tensor:
    """Logits of a confident, correct teacher: the divergence to them is nearly the cross-entropy."""
    return CONFIDENCE * F.one_hot(problem.labels, problem.student.space.settings.classes).float()


def laid_out(images: Tensor, name: str) -> Tensor:
    """Images in the memory layout of an attack."""
    return images.contiguous(memory_format=torch.contiguous_format if name == "plain" else torch.channels_last)


def timed(problem: Problem, batch: int, rounds: int) -> tuple[dict[str, Timing], float]:
    """Time every attack on the first `batch` images."""
    calls = timed_calls(problem, batch)
    return time_interleaved(calls, rounds=rounds, label=f"attacks at batch {batch}", plain="plain")


def timed_calls(
    problem: Problem, batch: int, steps: Callable[..., Tensor] = take_steps
) -> dict[str, Callable[[int], None]]:
    """Per attack, a call that attacks the first `batch` images once."""
    target = target_logits(problem)[:batch]

    def call(name: str, attack: Attack) -> Callable[[int], None]:
        images = laid_out(problem.images[:batch], name)
        return lambda number: attack(images, target, torch.Generator().manual_seed(number + 1))

    return {name: call(name, attack) for name, attack in attacks(problem, steps).items()}


def share_of_ceiling(macs: int, gradients_per_second: float, ceiling: float) -> float:
    """Share of a rate in FLOP/s: an input gradient is a forward and a backward pass, two FLOP per MAC each."""
    return 4 * macs * gradients_per_second / ceiling


def main(argv: Sequence[str] | None = None) -> None:
    """Check, time and print network by network."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for net in args.net:
        rows += measured(net, args)
    if args.json:
        write_rows(args.json, rows)


def ceilings(seconds: float) -> dict[str, float]:
    """The ceiling of every type."""
    return {name: ceiling(dtype, seconds=seconds) for name, dtype in TIMED.items()}


def measured(net: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Check, time and print the attacks on one network; return their rows.

    The ceiling is the better of two, measured right before and right after the attacks: machines change pace.
    """
    name, _, largest = net.partition(":")
    scale = args.width_scale or DEFAULT_SCALES.get(name, 1.0)
    space = scaled_space(name, scale)
    recipe = Recipe(num_steps=args.steps)
    problem = make_problem(
        space, recipe=recipe, num_archs=1, batch_size=max(args.batch), seed=args.seed, dtype=torch.float32
    )
    if largest:
        problem = replace(problem, archs=[space.largest])
    problem = trained(problem, num_steps=args.training_steps, seed=args.seed)
    found = agreement(problem)
    found.require()
    facts, macs = machine(), space.spec(problem.archs[0]).macs
    before = ceilings(args.ceiling_seconds)
    runs = [(batch, *timed(problem, batch, args.rounds)) for batch in args.batch]
    tops = {name: max(rate, before[name]) for name, rate in ceilings(args.ceiling_seconds).items()}
    print("convolution ceiling: " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in tops.items()))
    cells, rows = [], []
    for batch, timings, spread in runs:
        for attack, timing in timings.items():
            images = batch * args.steps / timing.seconds
            top = tops["float32" if attack == "plain" else attack]
            share = share_of_ceiling(macs, images, top)
            rows.append(
                {
                    "bench": "attack",
                    "row": f"{attack}, batch {batch}",
                    "lever": f"{images:.0f} gradients/s, {share:.0%} of the convolution ceiling",
                    "ratio_plain": round(timing.ratio_plain, 4),
                    "ratio_previous": round(timing.ratio_previous, 4),
                    "gradients_per_second": round(images, 1),
                    "ceiling_share": round(share, 4),
                    "ceiling_gflops": round(top / 1e9, 1),
                    "agreement": vars(found),
                    "space": net,
                    "width_scale": scale,
                    "macs": macs,
                    "batch": batch,
                    "num_steps": args.steps,
                    "rounds": args.rounds,
                    "seed": args.seed,
                    "baseline_spread": round(spread, 4),
                    "noisy": spread > NOISY,
                    "machine": facts,
                }
            )
            cells.append((attack, str(batch), f"{timing.ratio_plain:.2f}", f"{images:.0f}", f"{share:.1%}"))
    print(table(("attack", "batch", "/plain", "gradients/s", "of ceiling"), cells))
    print(describe(rows[0], found, any(row["noisy"] for row in rows)), flush=True)
    return rows


def describe(row: dict[str, Any], found: Agreement, noisy: bool) -> str:
    """What the table was measured on, and how far the attacks agree."""
    accuracies = ", ".join(f"{name} {value:.3f}" for name, value in found.accuracies.items())
    return "\n".join(
        [
            "",
            f"{row['space']} at width scale {row['width_scale']:g}, a subnet of {row['macs'] / 1e6:.1f} M MACs, "
            f"PGD-{row['num_steps']}, medians of {row['rounds']} rounds"
            + (" - NOISY, do not quote these ratios" if noisy else ""),
            f"equal iterates: float64 {found.exact:.2%}, float32 {found.iterates:.2%}; bfloat16 has the signs of "
            f"{found.equal_signs:.2%} of the pixels, {found.signs:.2%} of the gradient; "
            f"robust accuracy under the attacks: {accuracies} (noise {found.noise:.3f})",
            ", ".join(f"{key} {value}" for key, value in row["machine"].items()),
        ]
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    nets = [name + end for name in sorted(PRESETS) for end in ("", ":largest")]
    default = ["resnet_cifar", "resnet_micro", "resnet_micro:largest"]
    parser.add_argument("--net", choices=nets, nargs="+", default=default, help="a sampled subnet, or the largest")
    parser.add_argument("--width-scale", type=float, help="times all channels; 0.125 for resnet_cifar, else 1")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64, 128, 256], help="batch sizes")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count; medians are over them")
    parser.add_argument("--steps", type=int, default=10, help="PGD steps")
    parser.add_argument("--training-steps", type=int, default=40, help="on synthetic patterns, before all else")
    parser.add_argument("--ceiling-seconds", type=float, default=0.3, help="per shape and type")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of archs, weights, images and noise")
    parser.add_argument("--json", nargs="?", const=str(RESULTS), metavar="FILE", help=f"default {RESULTS.name}")
    parser.add_argument("--quick", action="store_true", help="batch 8 and 16, PGD-2, 2 rounds: shows that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.steps, args.rounds, args.ceiling_seconds = [8, 16], 2, 2, 0.01
        args.training_steps = 4
    if min([*args.batch, args.rounds, args.steps, args.threads]) < 1:
        parser.error("--batch, --rounds, --steps and --threads are at least 1")
    return args


if __name__ == "__main__":
    main()
