"""Averaging gradients over processes: DistributedDataParallel, one flat all-reduce, one of the active slices alone.

Every row makes the same local step (forward and backward of one sampled subnet of the supernet, weights sliced in the
forward) in each process; the local step without any sync is timed beside it, and the difference is what a sync costs.
Before anything is timed, all rows must give the same averaged gradients in float64.

    python benchmarks/bench_sync.py --help
"""

from __future__ import annotations

import argparse
import copy
import io
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from common import NOISY, Timing, machine, require_positive, table, time_interleaved, write_rows
from step_rows import scaled_space
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from proard.config import PRESETS
from proard.nets import Supernet
from proard.space import Arch
from proard.training.ranks import Ranks
from proard.training.sync import GradientSync

RESULTS = Path(__file__).parent / "results" / "bench_sync.json"
LOCAL = "local"
ROWS = {
    LOCAL: "the step without a sync",
    "ddp": "DistributedDataParallel, find_unused_parameters",
    "flat": "one flat all-reduce of all parameters",
    "active": "one flat all-reduce of the active slices: the package's",
}
TOLERANCE = 1e-12  # of averaged float64 gradients, relative to the largest entry of each


class Row:
    """One way to average gradients, on a supernet of its own."""

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
        torch._foreach_zero_([parameter.grad for parameter in self.net.parameters()])
        loss = F.cross_entropy(self.module(images, arch), labels)
        (loss if self.sync is None else loss / dist.get_world_size()).backward()  # the sync adds up
        self.bytes = 0
        if self.name == "ddp":
            self.bytes = sum(parameter.grad.nbytes for parameter in self.net.parameters())
        elif self.name == "flat":
            gradients = [parameter.grad for parameter in self.net.parameters()]
            buffer = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()
            parts = buffer.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [p.view(g.shape) for p, g in zip(parts, gradients, strict=True)])
            self.bytes = buffer.nbytes
        elif self.sync is not None:
            before = self.sync.bytes_reduced
            self.sync([self.net.space.spec(arch)], torch.zeros(0, device=images.device))
            self.bytes = self.sync.bytes_reduced - before
        if images.is_cuda:
            torch.cuda.synchronize()


def require_equal(rows: dict[str, Row], archs: Sequence[Arch], images: Tensor, labels: Tensor) -> float:
    """Return the largest relative difference between the rows' averaged gradients, or stop.

    Raises
    ------
    SystemExit
        A row differs from the flat all-reduce of everything, or the processes saw the same images.
    """
    largest = 0.0
    for arch in archs:
        for row in rows.values():
            row(arch, images, labels)
        wanted = {name: parameter.grad for name, parameter in rows["flat"].net.named_parameters()}
        for name, row in rows.items():
            difference = max(
                float((parameter.grad - wanted[key]).abs().max() / wanted[key].abs().max().clamp_min(1e-300))
                for key, parameter in row.net.named_parameters()
            )
            if name == LOCAL and dist.get_world_size() > 1 and difference < 1e-6:
                raise SystemExit("the processes have the same gradients: nothing is averaged, nothing is timed")
            if name != LOCAL and not difference <= TOLERANCE:
                raise SystemExit(f"row {name} differs by {difference:.2g} from the plain average, nothing is timed")
            largest = max(largest, difference if name != LOCAL else 0.0)
    return largest


def work(rank: int, args: argparse.Namespace, folder: str) -> None:
    """Be one of the processes; the first one prints and writes."""
    torch.set_num_threads(args.threads)
    if args.backend == "nccl":
        torch.cuda.set_device(rank)
    device = torch.device("cuda", rank) if args.backend == "nccl" else torch.device("cpu")
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(args.backend, init_method=meeting, rank=rank, world_size=args.processes)
    space = scaled_space(args.space, args.width_scale)
    archs = [space.arch(row) for row in space.sample(args.archs, np.random.default_rng(args.seed))]
    channels, size = space.settings.image_channels, space.settings.image_size
    generator = torch.Generator().manual_seed(args.seed)
    net = Supernet(space, mean=[0.0] * channels, std=[1.0] * channels, generator=generator)
    own = torch.Generator().manual_seed(1000 + rank)  # every process has images of its own

    def batch(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        images = torch.rand((count, channels, size, size), generator=own).to(device, dtype)
        labels = torch.randint(space.settings.classes, (count,), generator=own).to(device)
        return images.contiguous(memory_format=torch.channels_last), labels

    exact = {name: Row(name, copy.deepcopy(net).to(device, torch.float64)) for name in ROWS}
    largest = require_equal(exact, archs, *batch(min(args.batch, 4), torch.float64))
    del exact
    if rank == 0:
        print(f"all rows give the same averaged gradients: largest relative difference {largest:.1e}", flush=True)
    rows = {name: Row(name, net.to(device)) for name in ROWS}
    images, labels = batch(args.batch, torch.float32)

    def call(row: Row) -> Callable[[int], None]:
        def run(_number: int) -> None:
            dist.barrier()  # no process pays for another one's previous row
            for arch in archs:
                row(arch, images, labels)

        return run

    quiet = nullcontext() if rank == 0 else redirect_stdout(io.StringIO())
    with quiet:
        timings, spread = time_interleaved({n: call(r) for n, r in rows.items()}, rounds=args.rounds, label="syncs")
    if rank == 0:
        sizes = {name: row.bytes for name, row in rows.items()}  # of the last arch
        macs = [space.spec(arch).macs for arch in archs]
        report(timings, sizes, spread, args, largest, macs)
    dist.destroy_process_group()


def report(
    timings: dict[str, Timing],
    sizes: dict[str, int],
    spread: float,
    args: argparse.Namespace,
    largest: float,
    macs: Sequence[int],
) -> None:
    """Print the table and write one JSON line per row where asked."""
    step = {name: 1e3 * timing.seconds / args.archs for name, timing in timings.items()}
    cost = {name: value - step[LOCAL] for name, value in step.items() if name != LOCAL}
    cells = [("-", "-", f"{step[LOCAL]:.1f}", "0.0", LOCAL + ": " + ROWS[LOCAL])]
    for name in cost:
        times = f"{cost['ddp'] / cost[name]:.2f}" if min(cost["ddp"], cost[name]) > 0 else "?"
        cells.append((times, f"{cost[name]:.1f}", f"{step[name]:.1f}", f"{sizes[name] / 1e6:.1f}", ROWS[name]))
    noisy = spread > NOISY or min(cost.values()) <= 0
    print(table(("over ddp", "sync ms", "step ms", "MB reduced", "row"), cells))
    print(
        f"\n{args.processes} processes, {args.backend}, {args.space} at width scale {args.width_scale:g}, subnets of "
        f"{', '.join(f'{value / 1e6:.1f} M' for value in macs)} MACs, batch {args.batch} each, medians of "
        f"{args.rounds} rounds\nlocal step timed twice: spread {spread:.1%}"
        + (" - NOISY, do not quote these ratios" if noisy else "")
    )
    run: dict[str, Any] = {
        **{name: getattr(args, name) for name in ("processes", "backend", "space", "width_scale", "batch", "rounds")},
        "seed": args.seed,
        "macs": list(macs),
        "largest_difference": largest,
        "baseline_spread": round(spread, 4),
        "noisy": noisy,
        "machine": machine(),
    }
    if args.json:
        lines = [
            {
                "bench": "sync",
                "row": name,
                "lever": ROWS[name],
                "ratio_over_ddp": round(cost["ddp"] / cost[name], 4) if cost.get(name) else None,
                "sync_ms": round(cost.get(name, 0.0), 3),
                "ms_per_step": round(step[name], 3),
                "bytes_reduced": sizes[name],
            }
            | run
            for name in ROWS
        ]
        write_rows(args.json, lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Start the processes."""
    args = parse(argv)
    try:
        scaled_space(args.space, args.width_scale)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(args, folder), nprocs=args.processes)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count()
    parser.add_argument("--processes", type=int, default=gpus if gpus > 1 else 2)
    parser.add_argument("--backend", choices=["gloo", "nccl"], default="nccl" if gpus > 1 else "gloo")
    parser.add_argument("--space", choices=sorted(PRESETS), default="resnet_cifar")
    parser.add_argument("--width-scale", type=float, help="times all channels; 0.5 for resnet_cifar, else 1")
    parser.add_argument("--batch", type=int, default=4, help="images of each process")
    parser.add_argument("--archs", type=int, default=2, help="sampled subnets; times are means over them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", nargs="?", const=str(RESULTS), metavar="FILE", help=f"default {RESULTS.name}")
    parser.add_argument("--quick", action="store_true", help="digits space, 1 arch, 2 rounds: shows that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.space, args.archs, args.rounds = "resnet_digits", 1, 2
    if args.width_scale is None:
        args.width_scale = 0.5 if args.space == "resnet_cifar" else 1.0
    require_positive(parser, args, "processes", "batch", "archs", "rounds", "threads")
    if args.backend == "nccl" and args.processes > gpus:
        parser.error(f"--processes is {args.processes}, but nccl needs a GPU each and there are {gpus}")
    return args


if __name__ == "__main__":
    main()
