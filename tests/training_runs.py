"""Tiny trainings inside one process, with all their results."""

from __future__ import annotations

import torch
from helpers import random_supernet, tiny_config, tiny_space

from proard.config import Threat
from proard.nets import Supernet, extract, fold
from proard.stages.training import AugmentedImages
from proard.training import ResumeState, StepBatch, StepResult, TrainingStep, phase_plan, single_plan, training_step
from proard.training import Run as TrainingRun

EPS = 0.1


def same(first, second):
    """Whether two state dicts are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def snapshot(net):
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


class Watched(AugmentedImages):
    """Training images that record their batches, and the network before each step."""

    def __init__(self, train, settings, net):
        super().__init__(train, settings)
        self.net, self.before, self.given, self.poison_at = net, [], [], None

    def batch(self, indices, generator, *part):
        images, labels = super().batch(indices, generator, *part)
        self.before.append(snapshot(self.net))
        if self.poison_at == len(self.given):
            images = images.index_fill(0, torch.tensor([0]), torch.nan)
        self.given.append(images)
        return images, labels


def no_validation(_net):
    return [{"arch": "largest", "macs": 1, "val_clean_acc": 0.5, "val_robust_acc": 0.5, "val_num_images": 1}]


class Run:
    """A training in one process that keeps its results."""

    def __init__(self, train, folder, settings, plan, *, seed=0, validate=no_validation, fit_now=True, **more):
        self.space = tiny_space()
        generator = torch.Generator().manual_seed(seed)
        self.net = Supernet(self.space, mean=train.mean, std=train.std, generator=generator)
        self.source = Watched(train, settings, self.net)
        self.state = ResumeState(folder / "net.safetensors", "mark")
        self.options = {
            "label": "teacher",
            "plan": plan,
            "settings": settings,
            "threat": Threat(eps=EPS),
            "source": self.source,
            "validate": validate,
            "state": self.state,
            "seed": seed,
            **more,
        }
        self.rows = self.fit() if fit_now else None

    def fit(self):
        self.rows = TrainingRun(self.net, **self.options).train()
        self.options["state"].finish()  # as a stage does once its output is written
        return self.rows


def step_of(net, settings, plan, **more) -> TrainingStep:
    """The step of a training of a tiny network."""
    return training_step(net, settings, plan, threat=Threat(eps=EPS), **more)


def take(step, images, labels, *, number=0, lr=0.1, seed=0) -> StepResult:
    """Make one step."""
    return step(StepBatch(images, labels, torch.Generator().manual_seed(seed), step=number, lr=lr))


def plain_network(*, seed=7):
    """A network that is not trained: the control, or a frozen teacher."""
    net = random_supernet(tiny_space(), seed=seed, dtype=torch.float32).eval()
    return fold(extract(net, tiny_space().largest))


def teacher_run(
    train, folder, *, objective="trades", fit_now=True, seed=0, validate=no_validation, injected=None, **changes
):
    changes["objective"] = objective
    own = {key: changes.pop(key) for key in ("validation", "save_every_minutes") if key in changes}
    config = tiny_config(**own, **{f"train_teacher__{key}": value for key, value in changes.items()})
    settings = config.train_teacher
    plan = single_plan(tiny_space().largest, settings.objective, settings)
    injected = {"validation": config.validation, "save_every_minutes": config.save_every_minutes, **(injected or {})}
    control = plain_network() if settings.needs_control else None
    return Run(
        train, folder, settings, plan, seed=seed, validate=validate, fit_now=fit_now, control=control, **injected
    )


def phase_run(train, folder, *, fit_now=True, seed=0, injected=None, **changes):
    config = tiny_config(**{f"phase__{key}": value for key, value in changes.items()})
    (phase,) = config.train_phase.phases
    injected = {"validation": config.validation, **(injected or {})}
    networks = {"teacher": None if phase.teacher == "dynamic" else plain_network(seed=0)}
    networks["control"] = plain_network() if phase.needs_control else None
    return Run(
        train, folder, phase, phase_plan(tiny_space(), phase), seed=seed, fit_now=fit_now, **networks, **injected
    )
