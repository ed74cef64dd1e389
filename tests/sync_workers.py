"""What each of two processes does in `test_sync.py`, and the same in one process."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from helpers import random_images, random_supernet, tiny_config, tiny_space
from torch import Tensor

from proard.space import Arch
from proard.training import Drawn, Plan
from proard.training.plan import bind
from proard.training.trainer import Trainer

WORLD = 2
BATCH = 8


def archs() -> list[Arch]:
    """A narrow deep and a wide shallow subnet: neither contains the other, and neither uses all weights."""
    space = tiny_space()
    chosen = [{"width": (0.5,), "depth": (1,), "expand": (1,)}, {"width": (1,), "depth": (0,), "expand": (0.5,)}]
    return [space.arch([options[0] for options in space.open_choices(**choice)]) for choice in chosen]


def ignore_batch(x: Tensor, _mean: Tensor, _var: Tensor, scale: Tensor, shift: Tensor, **_options: object) -> Tensor:
    """Batch norm without the batch: scale and shift alone, so that images do not meet."""
    return x * scale[:, None, None] + shift[:, None, None]


def train(parts: list[slice], *, steps: int, lr: float, norm: bool, poisoned: int | None = None) -> Trainer:
    """Make some steps in float64 on the parts of the global batches that this process is given."""
    attack = {"num_steps": 2, "step_size": 0.05, "start": "zero", "bn_mode": "batch", "objective": "ce"}
    settings = tiny_config(train_teacher__attack=attack, train_teacher__weight_decay=0.01).train_teacher
    plan = Plan(lambda seed, step, data_pass: [Drawn(arch, *bind("trades", settings)) for arch in archs()])
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(Tensor, "float", Tensor.double))
        if not norm:
            patches.enter_context(mock.patch("proard.nets.view.F.batch_norm", ignore_batch))
        trainer = Trainer(random_supernet(tiny_space()), settings, plan, 0.1, None, 0)
        for step in range(steps):
            images, labels = random_images(tiny_space(), BATCH, seed=step), torch.arange(BATCH) % 3
            rows = torch.cat([torch.arange(BATCH)[part] for part in parts])
            images = images[rows]
            if poisoned == step:
                images = torch.full_like(images, torch.nan)
            trainer.measures = trainer.step(images, labels[rows], step, 0, lr, torch.Generator())[:3]
    return trainer


def share(rank: int) -> slice:
    """A process's part of a global batch."""
    return slice(rank, None, WORLD)


def work(rank: int, folder: str) -> None:
    """Train as one of two processes, and leave what came out in the folder."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    trained = train([share(rank)], steps=3, lr=0.05, norm=False)
    one_step = train([share(rank)], steps=1, lr=0.0, norm=True)
    poisoned = train([share(rank)], steps=2, lr=0.05, norm=True, poisoned=1 if rank == 1 else None)
    import bench_sync

    rows = {name: bench_sync.Row(name, random_supernet(tiny_space())) for name in bench_sync.ROWS}
    images = random_images(tiny_space(), 4, seed=rank)
    largest = bench_sync.require_equal(rows, archs(), images, torch.arange(4) % 3)
    found = {
        "bench": (largest, {name: row.bytes for name, row in rows.items()}),
        "trained": trained.net.state_dict(),
        "average": trained.average,
        "measures": torch.stack(trained.measures),
        "gradients": {name: parameter.grad for name, parameter in one_step.parameters.items()},
        "bytes": one_step.sync.bytes_reduced,
        "failure": poisoned.guard.failure(),
        "poisoned": {name: parameter.detach() for name, parameter in poisoned.parameters.items()},
    }
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
