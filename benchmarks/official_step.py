"""One step of the official ProARD classes, from a checkout of the user; this file contains none of their code.

The official package is called `proard` too: during its import, this project's modules are removed from `sys.modules`.
Empty stubs replace its imports that a CPU step does not need, and `.cuda()` returns the tensor unchanged.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from plain_step import Outcome, nesterov
from step_rows import Problem
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from proard.config import PRESETS
from proard.space import Arch

MODULES = {
    "networks": "proard.classification.elastic_nn.networks",
    "utils": "proard.utils",
    "loss": "robust_loss.rslad",
}
NEEDED = [("networks", "DYNResNets_Cifar"), ("utils", "MyNetwork"), ("loss", "rslad_loss")]
STAND_INS = ("horovod", "torchpack", "torchprofile", "autoattack", "adv_lib", "gdown")
OWN_ROOTS = ("proard", "robust_loss", "attacks", "utils")


def load_official(path: str, space: str) -> SimpleNamespace:
    """Import `networks`, `utils` and `loss`, the modules that the step uses; exit with the reason if that fails."""
    if space != "resnet_cifar":
        raise SystemExit(f"--official needs the published ResNet space; --space is {space}, expected resnet_cifar")
    root = Path(path).resolve()
    missing = [name for name in ("proard/classification", "robust_loss/rslad.py") if not (root / name).exists()]
    if missing:
        raise SystemExit(f"--official {path} is no checkout of the official repository: it lacks {', '.join(missing)}")
    with _own_modules_put_away(root):
        try:
            found = SimpleNamespace(**{key: importlib.import_module(name) for key, name in MODULES.items()})
        except Exception as error:
            raise SystemExit(f"--official {path}: the official modules fail to import: {error!r}") from error
    lacking = [f"{MODULES[key]}.{name}" for key, name in NEEDED if not hasattr(getattr(found, key), name)]
    if lacking:
        raise SystemExit(f"--official {path}: not found there: {', '.join(lacking)}")
    return found


class OfficialStep:
    """The official training step on archs of the same choices as the other rows'.

    Its weights are different; stem widths may differ by a channel at scales below 1. The step makes the forwards of row
    V0: teacher, student for the metric, and within `rslad_loss` the teacher again, the attack, two student passes.
    """

    def __init__(self, official: SimpleNamespace, problem: Problem, width_scale: float) -> None:
        settings = PRESETS["resnet_cifar"]
        official.utils.MyNetwork.CHANNEL_DIVISIBLE = max(1, int(settings.channel_multiple * width_scale))
        choices = {"depth_list": list(settings.depth), "expand_ratio_list": list(settings.expand)}
        choices["width_mult_list"] = [width * width_scale for width in settings.width]
        build = official.networks.DYNResNets_Cifar
        self.net: nn.Module = build(n_classes=settings.classes, **choices)
        largest = {key: [values[-1]] for key, values in choices.items()}
        self.teacher: nn.Module = build(n_classes=settings.classes, **largest).eval()
        self.loss, self.recipe, self.settings = official.loss.rslad_loss, problem.recipe, settings
        self.optimizer = nesterov(self.net, problem.recipe)

    def __call__(self, arch: Arch, images: Tensor, labels: Tensor, generator: torch.Generator) -> Outcome:
        """Train `arch` on one batch; the noise comes from the global generator, as in the official code."""
        widths = [self.settings.width.index(value) for value in arch.width]
        expand = [value or self.settings.expand[0] for value in arch.expand]  # any value where depth leaves a block out
        self.net.set_active_subnet(d=list(arch.depth), e=expand, w=widths)
        recipe = self.recipe
        with _StaysOnCPU():
            self.net.train()
            self.optimizer.zero_grad()
            with torch.no_grad():
                self.teacher(images)
            clean = self.net(images)
            options = {"step_size": recipe.step_size, "epsilon": recipe.eps, "perturb_steps": recipe.num_steps}
            loss = self.loss(self.teacher, self.net, images, labels, self.optimizer, **options)
            loss.backward()
            self.optimizer.step()
        self.metrics = (float(loss.detach()), int((clean.argmax(1) == labels).sum()))
        return Outcome(images, clean.detach(), clean.detach())


class _StaysOnCPU(TorchFunctionMode):
    """Context in which `.cuda()` returns the tensor itself."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return args[0] if function is Tensor.cuda else function(*args, **(kwargs or {}))


class _StandIns:
    """Import finder of stub modules for packages that are not installed; all attributes are stubs."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        """Spec of a stub module."""
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in STAND_INS else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Make the stub."""

        def attribute(name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            return MagicMock(name=f"{spec.name}.{name}")

        module = ModuleType(spec.name)
        module.__getattr__ = attribute
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


@contextmanager
def _own_modules_put_away(root: Path) -> Iterator[None]:
    """Context without loaded modules of the checkout's names; its path is first in `sys.path`."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in OWN_ROOTS}
    finder, arguments = _StandIns(), sys.argv
    for folder in map(root.joinpath, OWN_ROOTS):  # without an __init__ this project's package would be found first
        if folder.is_dir() and not (folder / "__init__.py").exists():
            sys.modules[folder.name] = ModuleType(folder.name)
            sys.modules[folder.name].__path__ = [str(folder)]
    sys.path.insert(0, str(root))
    sys.meta_path.append(finder)
    sys.argv = arguments[:1]  # some of its modules parse the command line when imported
    try:
        yield
    finally:
        sys.argv = arguments
        sys.meta_path.remove(finder)
        sys.path.remove(str(root))
        for name in [name for name in sys.modules if name.split(".")[0] in (*OWN_ROOTS, *STAND_INS)]:
            del sys.modules[name]
        sys.modules.update(kept)
