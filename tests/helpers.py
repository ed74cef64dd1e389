"""Tiny spaces, tiny image sets and settings that the tests of the lower floors share."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch

from proard.artifacts import Provenance
from proard.config import RunConfig, Space, load
from proard.data import ImageSet, load_split, pixel_statistics, save_split
from proard.nets import Supernet
from proard.space import Arch, SearchSpace

CLASSES = 3

TINY = {
    "name": "tiny",
    "stem": {"channels": 8},
    "units": [{"channels": 8}, {"channels": 16, "stride": 2}],
    "depth": [0, 1],
    "expand": [0.5, 1],
    "width": [0.5, 1],
    "channel_multiple": 4,
    "image_channels": 1,
    "image_size": 8,
    "classes": CLASSES,
}
TINY_DEEP = {
    **TINY,
    "name": "tiny_deep",
    "block": "bottleneck",
    "stem": {"kind": "deep", "channels": 16},
    "units": [{"channels": 16, "blocks": 2}, {"channels": 32, "blocks": 1, "stride": 2}],
    "image_channels": 3,
}
TINY_POOL = {
    **TINY_DEEP,
    "name": "tiny_pool",
    "stem": {"kind": "deep", "channels": 16, "pool": True},
    "shortcut": "pool_conv",
}
TINY_MOBILE = {
    **TINY,
    "name": "tiny_mobile",
    "family": "mobilenet",
    "block": "mbconv",
    "stem": {"channels": 8, "activation": "h_swish"},
    "units": [
        {"channels": 8, "depth": [0], "expand": [1], "kernel": [3], "activation": "relu6"},
        {"channels": 16, "stride": 2, "activation": "h_swish", "se": True},
    ],
    "final": {"channels": 24, "features": 20, "activation": "h_swish"},
    "expand": [2, 3],
    "kernel": [3, 5, 7],
}
TINY_SILU = {
    **TINY,
    "name": "tiny_silu",
    "stem": {"channels": 8, "activation": "silu"},
    "units": [{**unit, "activation": "silu"} for unit in ({"channels": 8}, {"channels": 16, "stride": 2})],
}
SMALL_SPACES = [TINY, TINY_DEEP, TINY_POOL, TINY_MOBILE, TINY_SILU]

CONFIG = {
    "run": "tiny",
    "space": TINY,
    "threat": {"eps": 0.1},
    "measurement": {"recalibration_images": 40, "batch_size": 40},
    "validation": {"every_epochs": 1, "num_images": 30, "num_steps": 2, "step_size": 0.05},
    "train_teacher": {
        "epochs": 2,
        "batch_size": 16,
        "lr": 0.05,
        "weight_decay": 5e-4,
        "ema_decay": 0.9,
        "augment": {"crop_padding": 1, "flip": False},
        "attack": {"num_steps": 2, "step_size": 0.05},
    },
    "train_phase": {
        "phases": [
            {
                "name": "all",
                "epochs": 2,
                "batch_size": 16,
                "lr": 0.02,
                "ema_decay": 0.9,
                "augment": {"crop_padding": 1, "flip": False},
                "attack": {"num_steps": 2, "step_size": 0.05},
            }
        ]
    },
}


def tiny_space(settings: dict = TINY, **changes: object) -> SearchSpace:
    """A space small enough to enumerate and to train in a second."""
    return SearchSpace(Space.model_validate({**settings, **changes}))


def random_archs(space: SearchSpace, count: int, *, seed: int = 0) -> list[Arch]:
    """Archs drawn uniformly."""
    return [space.arch(genotype) for genotype in space.sample(count, np.random.default_rng(seed))]


def random_supernet(space: SearchSpace, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Supernet:
    """A supernet whose every number is random: norms and running statistics too, so that no two can be swapped."""
    generator = torch.Generator().manual_seed(seed)
    channels = space.settings.image_channels
    net = Supernet(space, mean=[0.4] * channels, std=[0.3] * channels, generator=generator)
    for layer in net.layers.values():
        for transform in layer.transforms.values():
            transform.data += torch.randn(transform.shape, generator=generator) / 10
        if layer.bias is not None:
            layer.bias.data = torch.randn(layer.bias.shape, generator=generator) / 5
        if layer.bn is None:
            continue
        shape = layer.bn.weight.shape
        layer.bn.weight.data = torch.rand(shape, generator=generator) + 0.5
        layer.bn.bias.data = torch.randn(shape, generator=generator) / 5
        layer.bn.running_mean = torch.randn(shape, generator=generator) / 5
        layer.bn.running_var = torch.rand(shape, generator=generator) + 0.5
    return net.to(dtype)


def random_images(space: SearchSpace, count: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Pixels in [0, 1] of the space's shape, in channels_last memory."""
    shape = (count, space.settings.image_channels, space.settings.image_size, space.settings.image_size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return images.contiguous(memory_format=torch.channels_last)


def stripes(count: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Grey 8 x 8 images of three learnable classes: a bright left, right or lower part in noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    images = rng.uniform(0, 0.45, (count, 8, 8, 1))
    images[labels == 0, :, :4] += 0.5
    images[labels == 1, :, 4:] += 0.5
    images[labels == 2, 5:] += 0.5
    return np.rint(images * 255).astype(np.uint8), labels.astype(np.int64)


NAMES = ("left", "right", "low")


def save_stripes(folder: Path, *, train: int = 96, val: int = 30, classes: tuple[str, ...] = NAMES) -> dict[str, Path]:
    """Write train, val and test of the stripes; the paths by split."""
    paths = {}
    pixels, _ = stripes(train)
    mean, std = pixel_statistics(pixels)
    for seed, (split, count) in enumerate({"train": train, "val": val, "test": val}.items()):
        images, labels = stripes(count, seed=seed)
        paths[split] = folder / f"{split}.safetensors"
        save_split(
            paths[split],
            images,
            labels,
            split=split,
            classes=classes,
            mean=mean,
            std=std,
            provenance=Provenance("tiny", "prepare_data"),
        )
    return paths


def image_sets(folder: Path, **counts: int) -> dict[str, ImageSet]:
    """The stripes in memory."""
    return {split: load_split(path) for split, path in save_stripes(folder, **counts).items()}


def tiny_config(**changes: object) -> RunConfig:
    """The tiny run with keys changed: `train_teacher__lr=3`, or `phase__lr=3` for its one phase."""
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        *path, last = key.split("__")
        node = config["train_phase"]["phases"][0] if path[:1] == ["phase"] else config
        for part in path[1:] if path[:1] == ["phase"] else path:
            node = node.setdefault(part, {})
        node[last] = value
    return load(config)
