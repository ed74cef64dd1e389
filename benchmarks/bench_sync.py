"""Averaging gradients over processes: DistributedDataParallel, one flat all-reduce, one of the active slices alone.

Every row makes the same local step (forward and backward of one sampled subnet, weights sliced in the forward) in each
process; the time beyond the local step alone is the cost of a sync. All rows must give the same averaged gradients
in float64 before anything is timed.
"""

from __future__ import annotations

import copy
import io
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial

import common
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from plain_step import Recipe
from step_rows import Problem, make_problem, scaled_space
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from proard.config import PRESETS
from proard.nets import Supernet
from proard.space import Arch
from proard.training.ranks import Ranks
from proard.training.sync import GradientSync

LOCAL = "local"
ROWS = {
    LOCAL: "the step without a sync",
    "ddp": "DistributedDataParallel, find_unused_parameters",
    "flat": "one flat all-reduce of all parameters",
    "active": "one flat all-reduce of the active slices: the package's",
}
TOLERANCE = 1e-12  # of averaged float64 gradients, relative to the largest entry of each
COLUMNS = {"ratio_over_ddp": "over ddp:.2f", "sync_ms": "sync ms:.1f", "ms_per_step": "step ms:.1f"}
COLUMNS |= {"bytes_reduced": "bytes reduced:,d"}


class Row:
    """One way to average gradients, on its own copy of the supernet."""

    def __init__(self, name: str, net: Supernet) -> None:
        self.name, self.net = name, copy.deepcopy(net).train()
        for parameter in self.net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.module: nn.Module = self.net
        if name == "ddp":
            devices = [self.net.mean.device.index] if self.net.mean.is_cuda else None
            self.module = DistributedDataParallel(self.net, device_ids=devices, find_unused_parameters=True)
        ranks = Ranks(dist.get_rank(), dist.get_world_size())
        self.sync = GradientSync(self.net, ranks) if name == "active" else None
        self.bytes = 0

    def __call__(self, arch: Arch, images: Tensor, labels: Tensor) -> None:
        """Local gradients of one subnet, then their mean over processes."""
        gradients = [parameter.grad for parameter in self.net.parameters()]
        torch._foreach_zero_(gradients)
        loss = F.cross_entropy(self.module(images, arch), labels)
        (loss if self.sync is None else loss / dist.get_world_size()).backward()  # the sync is a sum
        if self.name in ("ddp", "flat"):
            self.bytes = sum(gradient.nbytes for gradient in gradients)
        if self.name == "flat":
            buffer = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()
            parts = buffer.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [p.view(g.shape) for p, g in zip(parts, gradients, strict=True)])
        elif self.sync is not None:
            before = self.sync.bytes_reduced
            self.sync([self.net.space.spec(arch)], torch.zeros(0, device=images.device))
            self.bytes = self.sync.bytes_reduced - before
        if images.is_cuda:
            torch.cuda.synchronize()

    def gradients(self) -> dict[str, Tensor]:
        """Copies by name."""
        return {name: parameter.grad.clone() for name, parameter in self.net.named_parameters()}


def require_equal(problem: Problem) -> float:
    """The largest relative difference between the rows' averaged gradients and the flat all-reduce of everything.

    Exits if a row differs, or if the processes have equal images.
    """
    rows = {name: Row(name, problem.student) for name in ROWS}
    found: dict[str, list[float]] = {name: [] for name in rows}
    for arch in problem.archs:
        for row in rows.values():
            row(arch, problem.images, problem.labels)
        wanted = rows["flat"].gradients()
        for name, row in rows.items():
            found[name].append(common.relative_difference(row.gradients(), wanted))
    if dist.get_world_size() > 1 and min(found[LOCAL]) < 1e-6:
        raise SystemExit("the processes have the same gradients: nothing is averaged, nothing is timed")
    differences = {f"row {name}": common.largest(values) for name, values in found.items() if name != LOCAL}
    return common.require_close(differences, TOLERANCE, "rows differ from the plain average")


def own_problem(args: Namespace, batch: int, seed: int, device: torch.device, dtype: torch.dtype) -> Problem:
    """The same archs and networks in every process, with different images."""
    space, how = scaled_space(args.space, args.width_scale), {"num_archs": args.archs, "batch_size": batch}
    shared, own = (make_problem(space, recipe=Recipe(), dtype=dtype, seed=s, **how) for s in (args.seed, seed))
    images = own.images.contiguous(memory_format=torch.channels_last)
    return replace(shared, images=images, labels=own.labels).placed(device)


def work(rank: int, args: Namespace, folder: str) -> None:
    """Run one of the processes; the first one prints and writes."""
    torch.set_num_threads(args.threads)
    device = torch.device("cuda", rank) if args.backend == "nccl" else torch.device("cpu")
    if args.backend == "nccl":
        torch.cuda.set_device(rank)
    place = {"init_method": f"file://{folder}/meeting", "rank": rank, "world_size": args.processes}
    dist.init_process_group(args.backend, **place)
    difference = require_equal(own_problem(args, min(args.batch, 4), 1000 + rank, device, torch.float64))
    if rank == 0:
        print(f"all rows give the same averaged gradients: largest relative difference {difference:.1e}", flush=True)
    problem = own_problem(args, args.batch, 1000 + rank, device, torch.float32)
    rows = {name: Row(name, problem.student) for name in ROWS}

    def run(number: int, *, row: Row) -> None:
        dist.barrier()  # barrier: all processes start a row at the same time
        for arch in problem.archs:
            row(arch, problem.images, problem.labels)

    calls = {name: partial(run, row=row) for name, row in rows.items()}
    with nullcontext() if rank == 0 else redirect_stdout(io.StringIO()):
        timed = common.time_interleaved(calls, rounds=args.rounds, label="syncs")
    if rank == 0:
        report(timed, {name: row.bytes for name, row in rows.items()}, args, difference, problem)
    dist.destroy_process_group()


def report(timed: common.Timed, sizes: dict[str, int], args: Namespace, difference: float, problem: Problem) -> None:
    """Print the table and write one JSON line per row with `--json`; bytes are those of the last arch."""
    step = {name: 1e3 * timing.seconds / args.archs for name, timing in timed.timings.items()}
    cost = {name: value - step[LOCAL] for name, value in step.items() if name != LOCAL}
    facts = common.given(args, "processes", "backend", "space", "width_scale", "batch", "seed") | timed.quality
    facts |= {"macs": [fact["macs"] for fact in problem.facts()], "largest_difference": difference}
    facts |= {"noisy": facts["noisy"] or min(cost.values()) <= 0, "machine": common.machine()}
    rows = []
    for name, lever in ROWS.items():
        row = {"bench": "sync", "row": name, "lever": lever, "sync_ms": round(cost.get(name, 0.0), 3)}
        row["ratio_over_ddp"] = round(cost["ddp"] / cost[name], 4) if cost.get(name) else None
        rows.append(row | {"ms_per_step": round(step[name], 3), "bytes_reduced": sizes[name]} | facts)
    title = f"{args.processes} processes, {args.backend}, {problem.describe()} each, width scale {args.width_scale:g}"
    common.show(title, rows, COLUMNS)
    common.write_rows(args.json, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Start the processes."""
    args = parse(argv)
    try:
        scaled_space(args.space, args.width_scale)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(args, folder), nprocs=args.processes)


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    gpus = torch.cuda.device_count()
    options = common.Options(
        __doc__,
        "sync",
        quick={"space": "resnet_digits", "archs": 1, "rounds": 2},
        threads=(1, "of each process"),
        processes=(gpus if gpus > 1 else 2, "of this machine"),
        backend=("nccl" if gpus > 1 else "gloo", "nccl needs one GPU per process", ["gloo", "nccl"]),
        space=("resnet_cifar", "search space", sorted(PRESETS)),
        width_scale=(None, "times all channels; 0.5 for resnet_cifar, else 1", float),
        batch=(4, "images of each process"),
        archs=(2, "sampled subnets; times are means over them"),
    )
    args = options.read(argv)
    if args.width_scale is None:
        args.width_scale = 0.5 if args.space == "resnet_cifar" else 1.0
    if args.backend == "nccl" and args.processes > gpus:
        options.error(f"--processes is {args.processes}, but nccl needs one GPU per process and there are {gpus}")
    return args


if __name__ == "__main__":
    main()
