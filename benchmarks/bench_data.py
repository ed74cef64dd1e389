"""Augmented images per second: torchvision's DataLoader against images that stay in memory.

Every row crops at random from an image padded by 4, mirrors half of the images, and makes float32 batches of an epoch
in random order. The crops of torchvision and of the package must be equal, pixel by pixel, before anything is timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from common import Call, Options, Row, Timing, given, ladder, machine, require_close, write_rows
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import functional

from proard.data import Augmenter, epoch_order, keyed_generator, load_split

PADDING = 4
LEVERS = {
    "D0": "torchvision DataLoader, no worker",
    "D1": "torchvision DataLoader, {workers} workers",
    "D2": "windows of padded images in memory, one gather per batch: the package",
}
COLUMNS = {"ratio_total": "total:.2f", "ratio_previous": "over previous:.2f", "images_per_second": "images/s:.0f"}
Crop = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # indices, top, left, mirrored -> images


class Images(Dataset):
    """Images as in torchvision's CIFAR classes: an array, converted to PIL images for the transform."""

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


def make_images(count: int, *, side: int = 32, channels: int = 3) -> Tensor:
    """Random pixels of shape (count, side, side, channels), uint8."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, side, side, channels), generator=generator, dtype=torch.uint8)


def require_equal(images: Tensor, *, crop: Crop | None = None, device: torch.device | str = "cpu") -> None:
    """Exit if crops of torchvision and of the package, on a device, differ at any offset, mirrored or not.

    `crop` is the package's by default.
    """
    side, crop = images.shape[1], crop or Augmenter(images.to(device), padding=PADDING).crop
    places = torch.cartesian_prod(torch.arange(2 * PADDING + 1), torch.arange(2 * PADDING + 1), torch.arange(2))
    places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))]
    indices = torch.arange(len(places)) % len(images)
    drawn = (indices, places[:, 0], places[:, 1], places[:, 2].bool())
    ours = crop(*(part.to(device) for part in drawn)).cpu()
    differing = 0
    for row, (index, (top, left, mirrored)) in enumerate(zip(indices.tolist(), places.tolist(), strict=True)):
        padded = functional.pad(as_pil(images[index].numpy()), PADDING)
        cut = functional.crop(padded, top, left, side, side)
        wanted = functional.to_tensor(functional.hflip(cut) if mirrored else cut)
        differing += int((ours[row] != wanted).sum())
    require_close({"pixels": differing}, 0, "crops at equal offsets differ")


@contextlib.contextmanager
def timed_calls(
    images: Tensor, *, batch_size: int, workers: int, device: torch.device | str = "cpu"
) -> Iterator[dict[str, Call]]:
    """Per row, a call that copies one epoch to a device; worker processes end with the context."""
    dataset, augmenter = Images(images.numpy()), Augmenter(images.to(device), padding=PADDING)
    options = {"batch_size": batch_size, "shuffle": True, "pin_memory": torch.device(device).type == "cuda"}
    inline = DataLoader(dataset, **options)
    parallel = DataLoader(dataset, num_workers=workers, persistent_workers=True, **options)

    def loaded(loader: DataLoader) -> Call:
        return lambda number: sum(len(batch.to(device, non_blocking=True)) for batch in loader)

    def resident(number: int) -> int:
        generator, order = keyed_generator(number + 1), epoch_order(len(images), seed=0, epoch=number + 1)
        return sum(len(augmenter(indices, generator)) for indices in order.split(batch_size))

    def whole(call: Call, number: int) -> None:
        seen = call(number)
        assert seen == len(images), f"an epoch shows {seen} images of {len(images)}"

    try:
        calls = {"D0": loaded(inline), "D1": loaded(parallel), "D2": resident}
        yield {row: partial(whole, call) for row, call in calls.items()}
    finally:
        del parallel  # its workers end with it


def levers(workers: int) -> dict[str, str]:
    """Descriptions of the rows."""
    return {row: lever.format(workers=workers) for row, lever in LEVERS.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Check, time, print, and write one JSON line per row with `--json`."""
    args = Options(
        __doc__,
        "data",
        quick={"images": 500, "rounds": 2},
        train=(None, "train.safetensors of prepare_data; default random pixels, 32x32x3", str),
        images=(5000, "images of an epoch"),
        batch=(128, "images per batch"),
        workers=(2, "worker processes of row D1"),
    ).read(argv)
    images = load_split(args.train).first(args.images).images if args.train else make_images(args.images)
    require_equal(images)
    print("crops at all offsets are equal, mirrored and not", flush=True)
    count, side, _, channels = images.shape

    def own(row: str, timing: Timing) -> Row:
        rate, used = count / timing.seconds, timing.cpu_seconds
        return {"images_per_second": round(rate, 1), "cpu_seconds": round(used, 4)}

    facts = {"images": count, "side": side, "channels": channels, **given(args, "batch", "workers")}
    how = {"rounds": args.rounds, "baseline": "DataLoader", "facts": facts | {"machine": machine()}, "own": own}
    title = f"{count} images of {side}x{side}x{channels}, batch {args.batch}"
    with timed_calls(images, batch_size=args.batch, workers=args.workers) as calls:
        write_rows(args.json, ladder("data", calls, levers(args.workers), COLUMNS, title=title, **how))


if __name__ == "__main__":
    main()
