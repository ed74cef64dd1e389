"""Two optimizer steps of every training that a committed config lists, and the resulting weights.

`python tests/two_steps.py` writes `two_steps.json` anew: after a change that is meant to change results.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from training_runs import no_validation

from proard.config import RunConfig, group_of, load
from proard.config.losses import merge
from proard.config.nets import Named, VisionTransformer, WideResNet
from proard.data import ImageSet
from proard.nets import FixedNet, Supernet, extract, fold
from proard.space import FixedSpace, SearchSpace, space_of
from proard.space.twins import with_twins
from proard.stages.train_teacher import fitted_space, named_arch, teacher_arch, teacher_space
from proard.stages.training import AugmentedImages
from proard.training import Plan, ResumeState, Run, phase_plan, single_plan

CONFIGS = Path(__file__).parents[1] / "config"
EXPECTED = Path(__file__).with_suffix(".json")
BASE = "cifar10_micro"  # what a config without a run of its own is read on top of
IMAGES, BATCH, SIDE = 8, 4, 8
LENGTHS = {"name": True, "seed": True, "net": True, "epochs": True, "warmup_epochs": True}
LENGTHS |= {"lr": True, "attack": {"step_size"}, "beside": True}


def names() -> list[str]:
    """Configs that train something, by their path without suffix."""
    return sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))


def trainings(name: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """A config's trainings by name, each with the call that makes two steps; of those equal but for lengths, one."""
    section = _read(name)
    run = load(section if "run" in section else merge(_read(BASE), section))
    run = run.model_copy(update={"space": small(run.space)})
    space, listed = SearchSpace(run.space), []
    taught_in = space_of(small(teacher_space(run.train_teacher, run.space).settings))
    largest = teacher_arch(run.train_teacher, taught_in)
    if run.train_teacher.source == "train":
        for label, settings in (("teacher", run.train_teacher), ("control", run.train_control)):
            listed.append((label, settings, taught_in, single_plan(largest, settings.objective, settings)))
    legs = [(f"phase_{phase.name}", phase) for phase in run.train_phase.phases]
    trainings = with_twins(run).experiment.trainings
    for training in trainings:
        phases = getattr(training, "phases", ())
        legs += [(f"variant_{group_of(training.name)}_{phase.name}", phase) for phase in phases]
    listed += [(label, phase, space, phase_plan(space, phase)) for label, phase in legs]
    for student in (training for training in trainings if training.trains != "supernet"):
        own = space if student.net is None else fitted_space(small(student.net), run.space, where="net")
        arch = named_arch(student.arch, own, where=student.name)
        listed.append((f"student_{student.name}", student, own, single_plan(arch, student.loss, student)))
    seen = set()
    for label, settings, where, plan in listed:
        fields = settings.model_dump(mode="json", exclude=LENGTHS)
        key = json.dumps([fields, type(settings).__name__, where.settings.model_dump(mode="json")], sort_keys=True)
        if key not in seen:
            seen.add(key)
            yield label, lambda row=(settings, where, plan): _two_steps(run, *row)


def small(net: Named) -> Named:
    """A network of the same kind, with all its choices, thin and for small images."""
    if isinstance(net, WideResNet):
        return net.model_copy(update={"depth": 10, "widen": 1, "image_size": SIDE})
    if isinstance(net, VisionTransformer):
        return net.model_copy(update={"layers": 2, "heads": 3, "hidden": 48, "mlp": 96, "image_size": SIDE})
    if net.image_size < 2 * SIDE:
        return net
    by = max(max(unit.channels for unit in net.units) // 64, 1)

    def thin(part):
        return part.model_copy(update={"channels": max(part.channels // by, 8)})

    units = tuple(thin(unit) for unit in net.units)
    final = net.final.model_copy(update={"channels": net.final.channels // 8, "features": net.final.features // 8})
    changes = {"stem": thin(net.stem), "units": units, "final": final, "image_size": SIDE, "channel_multiple": 2}
    return net.model_copy(update=changes)


def _read(name: str) -> dict[str, Any]:
    """A config file as written."""
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text("utf-8"))


def _two_steps(run: RunConfig, settings: Any, space: SearchSpace | FixedSpace, plan: Plan) -> dict[str, Any]:
    """Loss of the second epoch, length of the weights' change, and a checksum of all that the network holds."""
    asked = SearchSpace(run.space)
    teacher = fold(extract(_network(asked, seed=1), asked.largest).eval())
    net = _network(space, seed=0)
    before = [weight.detach().clone() for weight in net.parameters()]
    changes = {"batch_size": BATCH, "epochs": 1 / plan.passes_per_epoch, "warmup_epochs": 0}
    settings = settings.model_copy(update=changes)
    with tempfile.TemporaryDirectory() as folder:
        training = Run(
            net,
            label="two steps",
            plan=plan,
            settings=settings,
            threat=run.threat,
            source=AugmentedImages(_images(space), settings),
            teacher=None if getattr(settings, "teacher", "") == "dynamic" else teacher,
            control=teacher,
            validate=no_validation,
            state=ResumeState(Path(folder) / "net.safetensors", "mark"),
            seed=0,
        )
        rows = training.train()
    assert rows[-1]["step"] == 2
    change = torch.stack([(now.detach() - then).norm() for now, then in zip(net.parameters(), before, strict=True)])
    digest = hashlib.sha256()
    for key, value in sorted(net.state_dict().items()):
        digest.update(key.encode() + value.contiguous().numpy().tobytes())
    facts = {key: rows[-1][key] for key in ("forward_equivalents", "work_macs", "gradients", "weight_gradients")}
    return {"loss": rows[-1]["loss"], "change": float(change.norm()), "checksum": digest.hexdigest()[:16], **facts}


def _network(space: SearchSpace | FixedSpace, *, seed: int) -> Supernet | FixedNet:
    """Random weights for the space's images."""
    channels, generator = space.settings.image_channels, torch.Generator().manual_seed(seed)
    made = FixedNet if isinstance(space, FixedSpace) else Supernet
    return made(space, mean=[0.5] * channels, std=[0.25] * channels, generator=generator)


def _images(space: SearchSpace | FixedSpace) -> ImageSet:
    """Noise with labels of all kinds."""
    shape = space.settings
    pixels = np.random.default_rng(0).integers(
        0, 256, (IMAGES, shape.image_size, shape.image_size, shape.image_channels), dtype=np.uint8
    )
    labels, classes = torch.arange(IMAGES) * (shape.classes - 1) // (IMAGES - 1), tuple(map(str, range(shape.classes)))
    stats = ((0.5,) * shape.image_channels, (0.25,) * shape.image_channels)
    return ImageSet(torch.from_numpy(pixels), labels, "noise", "train", classes, *stats)


def machine() -> dict[str, Any]:
    """Machine facts on which the last bits of a result depend."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "cpu": model, "instructions": capability, "threads": torch.get_num_threads()}


def main() -> None:
    """Write the expected values."""
    torch.set_num_threads(1)
    found = {name: {label: make() for label, make in trainings(name)} for name in sys.argv[1:] or names()}
    lines = ["{", f' "machine": {json.dumps(machine())},', ' "trainings": {']
    for name, rows in found.items():
        lines.append(f'  "{name}": {{')
        lines += [f"   {json.dumps(label)}: {json.dumps(facts)}," for label, facts in rows.items()]
        lines[-1] = lines[-1][:-1]
        lines.append("  },")
    lines[-1] = "  }"
    EXPECTED.write_text("\n".join([*lines, " }", "}", ""]), "utf-8")


if __name__ == "__main__":
    main()
