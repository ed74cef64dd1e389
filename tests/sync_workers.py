"""The work of each of two processes in `test_sync.py`, and the same in one process."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from helpers import image_sets, random_images, random_supernet, tiny_config, tiny_space
from torch import Tensor
from training_runs import no_validation, phase_run, step_of, take, teacher_run

from proard.attacks import pgd
from proard.config.losses import Trades
from proard.nets.norm import batch_norm_of_all
from proard.nets.view import SubnetView
from proard.space import Arch
from proard.training import Drawn, Plan, TrainingStep
from proard.training.plan import bind
from proard.training.ranks import Ranks

WORLD = 2
BATCH = 7  # parts of 3 and 4 images
ATTACK = {"num_steps": 2, "step_size": 0.05}
TRAININGS = {  # of four steps each, on batches of 15; the timed one of as many as fit
    "trades": {"objective": "trades", "clip_norm": 0.5},
    "timed": {"objective": "pgd_at", "epochs": 20, "minutes": 0.6, "attack": {"num_steps": 1, "step_size": 0.05}},
    "pgd_at": {"objective": "pgd_at", "attack": {**ATTACK, "bn_mode": "running"}},
    "hat_awp": {
        "objective": "hat",
        "awp": {"gamma": 0.01, "warmup_epochs": 0},
        "attack": {**ATTACK, "bn_mode": "batch"},
    },
    "rslad": {"loss": "rslad", "teacher_logits": "float32"},
    "dynamic": {"teacher": "dynamic", "attack": {**ATTACK, "shared": "smallest"}},
    "both": {"teacher": "both", "sampling": "pareto", "attack": {**ATTACK, "carry_passes": 1}},
    "absld": {"loss": "absld", "attack": {**ATTACK, "start": "gaussian"}},
    "mtard_igdm": {"loss": "mtard", "alignment": "igdm"},
    "adaad_kdiga": {
        "loss": "adaad",
        "alignment": {"name": "kdiga", "weight": 0.1},
        "attack": {"num_steps": 1, "step_size": 0.05},
    },
}


def archs() -> list[Arch]:
    """A narrow deep and a wide shallow subnet: neither contains the other, and neither uses all weights."""
    space = tiny_space()
    chosen = [{"width": (0.5,), "depth": (1,), "expand": (1,)}, {"width": (1,), "depth": (0,), "expand": (0.5,)}]
    return [space.arch([options[0] for options in space.open_choices(**choice)]) for choice in chosen]


@contextlib.contextmanager
def in_float64():
    """Context in which all is computed in float64, so that only the order of sums differs."""
    folded = SubnetView.folded

    def in_full(view, statistics, **_type):
        return folded(view, statistics, dtype=torch.float64)

    with mock.patch.object(Tensor, "float", Tensor.double), mock.patch.object(SubnetView, "folded", in_full):
        yield


def train(ranks: Ranks, *, steps: int, lr: float, poisoned: int | None = None) -> tuple[TrainingStep, list]:
    """Make some steps on this process's parts of the global batches."""
    attack = {"num_steps": 2, "step_size": 0.05, "start": "zero", "bn_mode": "batch", "objective": "ce"}
    settings = tiny_config(train_teacher__attack=attack, train_teacher__weight_decay=0.01).train_teacher
    plan = Plan(lambda seed, step, data_pass: [Drawn(arch, *bind(Trades(), settings)) for arch in archs()])
    part, measures = ranks.part(BATCH), []
    with in_float64():
        made = step_of(random_supernet(tiny_space()), settings, plan, part=part)
        for step in range(steps):
            images, labels = random_images(tiny_space(), BATCH, seed=step), torch.arange(BATCH) % 3
            if poisoned == step:
                images[-1] = torch.nan  # of the last process alone
            result = take(made, images[part.rows], labels[part.rows], number=step, lr=lr)
            measures = [result.loss, result.clean, result.robust]
    return made, measures


def clocked(ranks: Ranks) -> dict:
    """A clock by which a step takes a second on the first process, and longer on any other."""
    now = [0.0]

    def search(*arguments, **options):
        now[0] += 1.0 + ranks.rank
        return pgd(*arguments, **options)

    return {"clock": lambda: now[0], "search": search}


def whole_training(name: str, folder: str, ranks: Ranks) -> dict:
    """Weights, running statistics, averages and history of one of `TRAININGS`, in float64."""
    options = {"epochs": 4 / 3, "batch_size": 15, **TRAININGS[name]}
    make = teacher_run if "objective" in options else phase_run
    with in_float64(), tempfile.TemporaryDirectory() as own:
        train_set = image_sets(Path(own), train=48, val=3)["train"]
        run = make(train_set, Path(folder) / name, fit_now=False, **options)
        run.net.double()
        batch = run.source.batch
        run.source.batch = lambda *args: (lambda images, labels: (images.double(), labels))(*batch(*args))
        for network in ("teacher", "control"):
            if run.options.get(network) is not None:
                run.options[network].double().dtype = torch.float64
        run.options |= {"ranks": ranks, "validate": no_validation, **(clocked(ranks) if "minutes" in options else {})}
        run.fit()
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in run.rows]
    return {"net": run.net.state_dict(), "rows": rows}


def normalised(x: Tensor, total, *, twice: bool) -> list[Tensor]:
    """Batch norm of a part with its results: outputs, statistics, gradients, gradients of input gradients."""
    generator = torch.Generator().manual_seed(5)
    scale, shift, wave = (torch.randn(4, generator=generator, dtype=x.dtype).requires_grad_() for _ in range(3))
    x = x.detach().requires_grad_()
    out, mean, var, values = batch_norm_of_all(x, scale, shift, total, eps=1e-5, twice=twice)
    loss = (out.sin() * wave[:, None, None]).sum()
    first = torch.autograd.grad(loss, [x, scale, shift], create_graph=twice)
    second = torch.autograd.grad(first[0].square().sum(), [x, scale]) if twice else ()
    return [tensor.detach() for tensor in (out, mean, var, values, *first, *second)]


def planes() -> Tensor:
    """Maps of another mean and spread in every channel and image."""
    generator = torch.Generator().manual_seed(3)
    maps = torch.randn((BATCH, 4, 3, 3), generator=generator, dtype=torch.float64)
    return maps * torch.arange(1, 5)[:, None, None] + torch.arange(BATCH)[:, None, None, None]


def work(rank: int, folder: str) -> None:
    """Train as one of two processes, and write the results to the folder."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    ranks = Ranks(rank, WORLD)
    part = ranks.part(BATCH)
    trained, measures = train(ranks, steps=3, lr=0.05)
    poisoned, _ = train(ranks, steps=2, lr=0.05, poisoned=1)
    import bench_sync
    import step_rows
    from plain_step import Recipe

    images, labels = random_images(tiny_space(), 4, seed=rank), torch.arange(4) % 3
    nets = (random_supernet(tiny_space()), random_supernet(tiny_space()))
    largest = bench_sync.require_equal(step_rows.Problem(archs(), images, labels, *nets, Recipe()))
    rows = {name: bench_sync.Row(name, nets[0]) for name in bench_sync.ROWS}
    for row in rows.values():
        row(archs()[-1], images, labels)
    found = {
        "bench": (largest, {name: row.bytes for name, row in rows.items()}),
        "trained": trained.net.state_dict(),
        "average": trained.update.average,
        "measures": torch.stack(measures),
        "bytes": trained.update.sync.bytes_reduced,
        "failure": poisoned.update.guard.failure(),
        "poisoned": {name: parameter.detach() for name, parameter in poisoned.update.parameters.items()},
        "norms": [normalised(planes()[part.rows], part.total, twice=twice) for twice in (False, True)],
        "trainings": {name: whole_training(name, f"{folder}/{rank}", ranks) for name in TRAININGS},
        "wishes": ranks.all_reduce_max(rank, 1 - rank, 0),
        "divided": ranks.divided([1, 2, 3], lambda job: [job, rank]),
        "told": ranks.from_first({"rank": rank}),
    }
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
