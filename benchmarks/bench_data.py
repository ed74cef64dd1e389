"""Augmented images per second: torchvision's DataLoader against images that stay in memory.

Every row crops at random from an image padded by 4, mirrors half of the images, and makes float32 batches of an epoch
in random order. Before anything is timed, the crops of torchvision and of the package must be equal, pixel by pixel.

    python benchmarks/bench_data.py --help
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import NOISY, Timing, machine, require_positive, table, time_interleaved, write_rows
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import functional

from proard.data import Augmenter, epoch_order, keyed_generator, load_split

RESULTS = Path(__file__).parent / "results" / "bench_data.json"
PADDING = 4
LEVERS = {
    "D0": "torchvision DataLoader, no worker",
    "D1": "torchvision DataLoader, {workers} workers",
    "D2": "windows of padded images in memory, one gather per batch: the package",
}


class Images(Dataset):
    """Images as torchvision's CIFAR classes give them: an array, made a PIL image for the transform."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        crop = transforms.RandomCrop(images.shape[1], padding=PADDING)
        self.transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()])

    def __len__(self) -> int:
        """Images."""
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        """One augmented image of shape (channels, height, width)."""
        return self.transform(as_pil(self.images[index]))


def as_pil(pixels: np.ndarray) -> Image.Image:
    """An image of shape (height, width, channels), grey or in colour."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def make_images(count: int, *, side: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    """Random pixels of shape (count, side, side, channels), uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, side, side, channels), generator=generator, dtype=torch.uint8)


def differing_pixels(images: Tensor, *, count: int = 162, seed: int = 0, device: torch.device | str = "cpu") -> int:
    """Pixels in which crops of torchvision and of the package, on a device, differ: every offset, mirrored and not."""
    side, augmenter = images.shape[1], Augmenter(images.to(device), padding=PADDING)
    places = torch.cartesian_prod(torch.arange(2 * PADDING + 1), torch.arange(2 * PADDING + 1), torch.arange(2))
    places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:count]]
    indices = torch.arange(len(places)) % len(images)
    ours = augmenter.crop(
        *(part.to(device) for part in (indices, places[:, 0], places[:, 1], places[:, 2].bool()))
    ).cpu()
    differing = 0
    for row, (index, (top, left, mirrored)) in enumerate(zip(indices.tolist(), places.tolist(), strict=True)):
        padded = functional.pad(as_pil(images[index].numpy()), PADDING)
        crop = functional.crop(padded, top, left, side, side)
        wanted = functional.to_tensor(functional.hflip(crop) if mirrored else crop)
        differing += int((ours[row] != wanted).sum())
    return differing


def require_equal(differing: int) -> None:
    """Stop where a pixel differs.

    Raises
    ------
    SystemExit
        With the number of pixels.
    """
    if differing:
        raise SystemExit(f"crops at equal offsets differ in {differing} pixels, nothing is timed")


@contextlib.contextmanager
def timed_calls(
    images: Tensor, *, batch_size: int, workers: int, device: torch.device | str = "cpu"
) -> Iterator[dict[str, Callable[[int], None]]]:
    """Per row, a call that brings one epoch to a device; worker processes live as long as the context."""
    dataset, augmenter = Images(images.numpy()), Augmenter(images.to(device), padding=PADDING)
    options = {"batch_size": batch_size, "shuffle": True, "pin_memory": torch.device(device).type == "cuda"}
    inline = DataLoader(dataset, **options)
    parallel = DataLoader(dataset, num_workers=workers, persistent_workers=True, **options)

    def loaded(loader: DataLoader) -> Callable[[int], None]:
        return lambda number: require_all(
            sum(len(batch.to(device, non_blocking=True)) for batch in loader), len(images)
        )

    def resident(number: int) -> None:
        generator, seen = keyed_generator(number + 1), 0
        for indices in epoch_order(len(images), seed=0, epoch=number + 1).split(batch_size):
            seen += len(augmenter(indices, generator))
        require_all(seen, len(images))

    try:
        yield {"D0": loaded(inline), "D1": loaded(parallel), "D2": resident}
    finally:
        del parallel  # its workers end with it


def require_all(seen: int, expected: int) -> None:
    """An epoch shows every image once."""
    assert seen == expected, f"{seen} images of {expected}"


def main(argv: Sequence[str] | None = None) -> None:
    """Check, time, print, and write one JSON line per row where asked."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    images = load_split(args.train).first(args.images).images if args.train else make_images(args.images)
    require_equal(differing_pixels(images))
    print("crops at all offsets are equal, mirrored and not", flush=True)
    facts = machine()
    with timed_calls(images, batch_size=args.batch, workers=args.workers) as calls:
        timings, spread = time_interleaved(calls, rounds=args.rounds, label="epochs")
    run = {
        "images": len(images),
        "side": images.shape[1],
        "channels": images.shape[3],
        "batch": args.batch,
        "workers": args.workers,
        "rounds": args.rounds,
        "baseline_spread": round(spread, 4),
        "noisy": spread > NOISY,
        "machine": facts,
    }
    if args.json:
        write_rows(args.json, [_json_row(row, timing, run) | run for row, timing in timings.items()])
    print(_report(timings, run))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--train", metavar="FILE", help="train.safetensors of prepare_data; default random pixels, 32x32x3"
    )
    parser.add_argument("--images", type=int, default=5000, help="images of an epoch")
    parser.add_argument("--batch", type=int, default=128, help="images per batch")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of row D1")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count; medians are over them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", nargs="?", const=str(RESULTS), metavar="FILE", help=f"default {RESULTS.name}")
    parser.add_argument("--quick", action="store_true", help="500 images, 2 rounds: shows that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.images, args.rounds = 500, 2
    require_positive(parser, args, "images", "batch", "workers", "rounds", "threads")
    return args


def _report(timings: dict[str, Timing], run: dict[str, Any]) -> str:
    """Compose the table and what it was measured on."""
    cells = []
    for row, timing in timings.items():
        ratios = (f"{timing.ratio_total:.2f}", f"{timing.ratio_previous:.2f}")
        rate = f"{run['images'] / timing.seconds:.0f}"
        cells.append((row, *ratios, rate, LEVERS[row].format(workers=run["workers"])))
    return "\n".join(
        [
            table(("row", "total", "over previous", "images/s", "lever"), cells),
            "",
            f"{run['images']} images of {run['side']}x{run['side']}x{run['channels']}, batch {run['batch']}, "
            f"medians of {run['rounds']} rounds",
            ", ".join(f"{key} {value}" for key, value in run["machine"].items()),
            f"baseline timed twice: spread {run['baseline_spread']:.1%}"
            + (" - NOISY, do not quote these ratios" if run["noisy"] else ""),
        ]
    )


def _json_row(row: str, timing: Timing, run: dict[str, Any]) -> dict[str, Any]:
    """Collect what is particular to a row."""
    return {
        "bench": "data",
        "row": row,
        "lever": LEVERS[row].format(workers=run["workers"]),
        "baseline": "DataLoader",
        "ratio_total": round(timing.ratio_total, 4),
        "ratio_previous": round(timing.ratio_previous, 4),
        "images_per_second": round(run["images"] / timing.seconds, 1),
        "cpu_seconds": round(timing.cpu_seconds, 4),
    }


if __name__ == "__main__":
    main()
