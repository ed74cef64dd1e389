"""PGD of torchattacks and foolbox, with which many users attack their networks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from plain_step import Recipe
from torch import Tensor, nn

Attack = Callable[[Tensor, Tensor, torch.Generator], Tensor]  # images, labels, generator -> adversarial images
LEVERS = {
    "torchattacks": "torchattacks.PGD on an ordinary network, NCHW",
    "foolbox": "foolbox's LinfPGD on the same; its backward pass includes the weights",
}


@cache
def libraries() -> dict[str, ModuleType]:
    """The libraries that can be imported; prints a line about each of the others."""
    found = {}
    for name in LEVERS:
        try:
            found[name] = importlib.import_module(name)
        except ImportError as error:
            print(f'no row {name} ({error}); to install it: pip install -e ".[test]"', flush=True)
    return found


def other_attacks(net: nn.Module, recipe: Recipe, *, random_start: bool = True) -> dict[str, Attack]:
    """The libraries' attacks by cross-entropy, from a uniform start or from the images themselves.

    Noise is drawn from torch's own generators, which are seeded like the given one.
    """
    makers = {"torchattacks": torchattacks_pgd, "foolbox": foolbox_pgd}
    return {name: makers[name](library, net, recipe, random_start) for name, library in libraries().items()}


def torchattacks_pgd(library: ModuleType, net: nn.Module, recipe: Recipe, random_start: bool) -> Attack:
    """Torchattacks' `PGD`."""
    how = {"eps": recipe.eps, "alpha": recipe.step_size, "steps": recipe.num_steps}
    attack = library.PGD(net, **how, random_start=random_start)

    def run(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        torch.manual_seed(generator.initial_seed())
        return attack(images, labels)

    return run


def foolbox_pgd(library: ModuleType, net: nn.Module, recipe: Recipe, random_start: bool) -> Attack:
    """Foolbox's `LinfPGD`, its steps alone, without the check of the result."""
    model = library.PyTorchModel(net, bounds=(0, 1), device=next(net.parameters()).device)
    how = {"abs_stepsize": recipe.step_size, "steps": recipe.num_steps}
    attack = library.attacks.LinfPGD(**how, random_start=random_start)

    def run(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        torch.manual_seed(generator.initial_seed())
        return attack.run(model, images, labels, epsilon=recipe.eps)

    return run
