"""Input gradients per second of the attack, by batch size, compared with other PGD and the convolution ceiling.

`plain` is PGD as in a textbook: NCHW memory, weights sliced in every forward, unfolded norms, autograd's gradient of
the loss; `torchattacks` and `foolbox` attack the extracted subnet in float32. All start from uniform noise and ascend
the cross-entropy. The network is first trained for some steps on patterns, so that it has a robust accuracy. In
float64, 99.9 % of the pixels must end as plain PGD's do; in bfloat16 the signs of the first gradient must be right for
90 % of it, by size; accuracies under the attacks must agree within noise.
"""

from __future__ import annotations

import copy
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import common
import torch
import torch.nn.functional as F
from common import Call, Row, Timing
from other_libraries import LEVERS, Attack, other_attacks
from plain_step import Recipe, chained_pgd, sliced_forward
from step_rows import DEFAULT_SCALES, Problem, make_problem, scaled_space, trained
from torch import Tensor

from proard.attacks import input_gradient, pgd, start_point, take_steps
from proard.config import PRESETS
from proard.losses import CrossEntropy
from proard.nets import SubnetView, extract

CEILING_SHAPES = ((32, 32, 32, 3), (64, 64, 16, 3), (128, 128, 8, 3), (256, 256, 8, 3), (256, 256, 16, 1))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TIMED = common.computed_here(DTYPES, rounded=["bfloat16"])
SAME_ITERATES, SAME_SIGNS = 0.999, 0.9
FEW_IMAGES = 8  # compared in float64
OVER = {f"ratio_{name}": f"/{name}:.2f" for name in LEVERS}
COLUMNS = {"ratio_plain": "/plain:.2f", **OVER}
COLUMNS |= {"gradients_per_second": "gradients/s:.0f", "ceiling_share": "of ceiling:.1%"}
Steps = Callable[..., Tensor]  # takes the folded view's steps


def require(found: Row) -> None:
    """Exit if the attacks do not agree (see `agreement`); the message has the figures and the limits."""
    gap = max(found["accuracies"].values()) - min(found["accuracies"].values())
    wanted = (
        ("equal iterates in float64", found["exact"], ">=", SAME_ITERATES, found["exact"] >= SAME_ITERATES),
        ("right signs in bfloat16", found["signs"], ">=", SAME_SIGNS, found["signs"] >= SAME_SIGNS),
        ("gap of accuracies", gap, "<=", found["noise"], gap <= found["noise"]),
    )
    faults = [f"{what} {value:.4f}, expected {sign} {limit:.4f}" for what, value, sign, limit, ok in wanted if not ok]
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
    rates, calls = [], 10 if torch.device(device).type == "cuda" else 1  # on a GPU, synchronise once in so many calls
    for channels, out, side, kernel in shapes:
        sizes = ((batch, channels, side, side), (out, channels, kernel, kernel))
        given = [torch.rand(size, device=device).to(dtype, memory_format=torch.channels_last) for size in sizes]
        run = partial(F.conv2d, *given, padding=kernel // 2)
        clocks, end = [], time.perf_counter() + seconds
        with torch.no_grad():
            while time.perf_counter() < end or len(clocks) < 3:
                clocks.append(
                    common.clocked(lambda number, run=run: [run() for _ in range(number)], calls, device)[0] / calls
                )
        rates.append(2 * batch * channels * out * side**2 * kernel**2 / statistics.median(clocks[1:]))
    return max(rates)


def attacks(problem: Problem, steps: Steps = take_steps) -> dict[str, Attack]:
    """Attacks on the problem's first arch: in plain form, by other libraries, on the folded view.

    All but the last compute in the network's type.
    """
    arch, recipe = problem.archs[0], problem.recipe
    options = {"eps": recipe.eps, "step_size": recipe.step_size, "num_steps": recipe.num_steps}
    predict, view = partial(sliced_forward, problem.student.eval(), arch), SubnetView(problem.student, arch)

    def plain(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.empty(images.shape, dtype=images.dtype).uniform_(-recipe.eps, recipe.eps, generator=generator)
        start = (images + noise.to(images.device)).clamp(0, 1)
        loss = partial(F.cross_entropy, target=labels, reduction="sum")
        return chained_pgd(predict, loss, images, start, **options)

    def folded(dtype: torch.dtype) -> Attack:
        net = view.folded(view.running_statistics(), dtype=dtype)

        def attack(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            return pgd(net, CrossEntropy(labels), images, generator=generator, steps=steps, **options)

        return attack

    ordinary = extract(problem.student, arch).to(memory_format=torch.contiguous_format)
    own = problem.student.mean.dtype
    here = DTYPES if problem.images.is_cuda else TIMED
    dtypes = here if own is torch.float32 else {"float64": own}
    return {
        "plain": plain,
        **other_attacks(ordinary, recipe),
        **{name: folded(dtype) for name, dtype in dtypes.items()},
    }


def agreement(problem: Problem, steps: Steps = take_steps) -> Row:
    """Agreement of the attacks on the whole problem, and on a few of its images in float64.

    `exact` and `iterates` are shares of pixels in which the folded attack ends as plain PGD does, in float64 and in
    float32 (after ten steps this depends on how rough the network is); `equal_signs` and `signs` those of equal signs
    of the first gradient, bfloat16 against float32, of pixels and of the gradient's 1-norm; the others are those of
    `robust_accuracies`.
    """
    images = laid_out(problem.images, "float32")
    ends, few = ends_of(problem, steps), problem.images[:FEW_IMAGES]
    small = replace(problem, images=few, labels=problem.labels[:FEW_IMAGES])
    exact = ends_of(replace(small, images=few.double(), student=copy.deepcopy(problem.student).double()), steps)
    view = SubnetView(problem.student, problem.archs[0])
    nets = [view.folded(view.running_statistics(), dtype=dtype) for dtype in DTYPES.values()]
    start = start_point(images, eps=problem.recipe.eps, start="uniform", generator=torch.Generator().manual_seed(1))
    objective = CrossEntropy(problem.labels)
    gradient, rounded = (input_gradient(net, objective, start)[1] for net in nets)
    right = gradient.sign() == rounded.sign()
    return {
        "exact": same(exact["float64"], exact["plain"]),
        "iterates": same(ends["float32"], ends["plain"]),
        "equal_signs": float(right.double().mean()),
        "signs": float((gradient.abs() * right).sum() / gradient.abs().sum()),
        **robust_accuracies(problem, ends),
    }


@torch.no_grad()
def robust_accuracies(problem: Problem, ends: Mapping[str, Tensor]) -> Row:
    """`accuracies` by the float32 network at every attack's adversarial images, and `noise`.

    `noise` is three standard errors of a difference of two of them, from the images on which two attacks differ, and
    one image.
    """
    view, count = SubnetView(problem.student, problem.archs[0]), len(problem.labels)
    net = view.folded(view.running_statistics())

    def correct(end: Tensor) -> Tensor:
        logits = torch.cat([net(part) for part in laid_out(end, "float32").split(256)])
        return logits.argmax(1) == problem.labels

    found = {name: correct(end) for name, end in ends.items()}
    differing = max(int((one != other).sum()) for one in found.values() for other in found.values())
    accuracies = {name: float(which.double().mean()) for name, which in found.items()}
    return {"accuracies": accuracies, "noise": (3 * differing**0.5 + 1) / count}


def ends_of(problem: Problem, steps: Steps, *, batch: int | None = None) -> dict[str, Tensor]:
    """Adversarial images of every attack, found batch by batch from equal noise."""
    found, size = {}, batch or len(problem.images)
    with common.Float64Losses():
        for name, attack in attacks(problem, steps).items():
            parts = zip(laid_out(problem.images, name).split(size), problem.labels.split(size), strict=True)
            seeded = ((*part, torch.Generator().manual_seed(seed)) for seed, part in enumerate(parts, 1))
            found[name] = torch.cat([attack(*part) for part in seeded])
    return found


def same(first: Tensor, second: Tensor) -> float:
    """Share of equal pixels."""
    return float(((first.double() - second.double()).abs() < 1e-5).double().mean())


def laid_out(images: Tensor, name: str) -> Tensor:
    """Images in the memory layout of an attack."""
    layout = torch.contiguous_format if name in ("plain", *LEVERS) else torch.channels_last
    return images.contiguous(memory_format=layout)


def timed_calls(problem: Problem, batch: int, steps: Steps = take_steps) -> dict[str, Call]:
    """Per attack, a call that attacks the first `batch` images once."""
    images, labels = problem.images[:batch], problem.labels[:batch]

    def call(attack: Attack, images: Tensor, number: int) -> Tensor:
        return attack(images, labels, torch.Generator().manual_seed(number + 1))

    return {name: partial(call, attack, laid_out(images, name)) for name, attack in attacks(problem, steps).items()}


def over_libraries(timing: Timing) -> Row:
    """How many times faster than the other libraries that were timed."""
    return {f"ratio_{name}": round(timing.over[name], 4) for name in LEVERS if name in timing.over}


def share_of_ceiling(macs: int, gradients_per_second: float, ceiling: float) -> float:
    """Share of a rate in FLOP/s: an input gradient is a forward and a backward pass, two FLOP per MAC each."""
    return 4 * macs * gradients_per_second / ceiling


def main(argv: Sequence[str] | None = None, *, top: Callable[[torch.dtype], float] | None = None) -> None:
    """Check, time and print network by network; `top` measures the ceiling of a type."""
    args = parse(argv)
    top = top or partial(ceiling, seconds=args.ceiling_seconds)
    common.write_rows(args.json, [row for net in args.net for row in measured(net, args, top)])


def measured(net: str, args: Namespace, top: Callable[[torch.dtype], float]) -> list[Row]:
    """Check, time and print the attacks on one network; return their rows.

    The ceiling is the better of two, measured before and after the attacks, since a machine's speed changes.
    """
    name, _, full = net.partition(":")
    scale = args.width_scale or DEFAULT_SCALES.get(name, 1.0)
    space, recipe = scaled_space(name, scale), Recipe(num_steps=args.steps)
    how = {"num_archs": 1, "batch_size": max(args.batch), "seed": args.seed, "dtype": torch.float32}
    problem = make_problem(space, recipe=recipe, **how)
    problem = replace(problem, archs=[space.largest]) if full else problem
    problem = trained(problem, num_steps=args.training_steps, seed=args.seed)
    found, macs, rows, timed = agreement(problem), problem.facts()[0]["macs"], [], {}
    require(found)
    facts = {"space": net, "width_scale": scale, "macs": macs, "num_steps": args.steps, "seed": args.seed}
    facts |= {"agreement": found, "machine": common.machine()}
    before = {name: top(dtype) for name, dtype in TIMED.items()}
    for batch in args.batch:
        how = {"rounds": args.rounds, "plain": "plain", "label": f"attacks at batch {batch}"}
        timed[batch] = common.time_interleaved(timed_calls(problem, batch), **how)
    tops = {name: max(top(dtype), before[name]) for name, dtype in TIMED.items()}
    print("convolution ceiling: " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in tops.items()))
    for batch, attack, timing in ((batch, *item) for batch, t in timed.items() for item in t.timings.items()):
        rate, limit = batch * args.steps / timing.seconds, tops[attack if attack in tops else "float32"]
        share = share_of_ceiling(macs, rate, limit)
        row = {"bench": "attack", "row": f"{attack}, batch {batch}", "ratio_plain": round(timing.ratio_plain, 4)}
        row |= over_libraries(timing)
        row |= {"lever": f"{rate:.0f} gradients/s, {share:.0%} of the convolution ceiling"}
        row |= {"ratio_previous": round(timing.ratio_previous, 4), "gradients_per_second": round(rate, 1)}
        row |= {"ceiling_share": round(share, 4), "ceiling_gflops": round(limit / 1e9, 1), "batch": batch}
        rows.append(row | facts | timed[batch].quality)
    common.show(f"{net} at width scale {scale:g}, a subnet of {macs / 1e6:.1f} M MACs, PGD-{args.steps}", rows, COLUMNS)
    accuracies = ", ".join(f"{name} {value:.3f}" for name, value in found["accuracies"].items())
    print(
        f"equal iterates: float64 {found['exact']:.2%}, float32 {found['iterates']:.2%}; bfloat16 has the signs of "
        f"{found['equal_signs']:.2%} of the pixels, {found['signs']:.2%} of the gradient; robust accuracy under the "
        f"attacks: {accuracies} (noise {found['noise']:.3f})"
    )
    return rows


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    nets = [name + end for name in sorted(PRESETS) for end in ("", ":largest")]
    return common.Options(
        __doc__,
        "attack",
        quick={"batch": [8, 16], "steps": 2, "rounds": 2, "ceiling_seconds": 0.01, "training_steps": 4},
        net=(["resnet_cifar", "resnet_micro", "resnet_micro:largest"], "a sampled subnet, or the largest", nets),
        width_scale=(None, "times all channels; 0.125 for resnet_cifar, else 1", float),
        batch=([16, 64, 128, 256], "batch sizes"),
        steps=(10, "PGD steps"),
        training_steps=(40, "on synthetic patterns, before everything else"),
        ceiling_seconds=(0.3, "per shape and type"),
    ).read(argv)


if __name__ == "__main__":
    main()
