"""Image files and tables of them, written for the tests of what reads them."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from proard.config import PrepareData, job_settings, load
from proard.stages.prepare_data import main

SPLITS = ("train", "val", "test")


def random_pixels(number, *, height=8, width=8, seed=0):
    shape = (number, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, encoded, labels, *, nested=True, **more):
    images = [{"bytes": entry, "path": None} for entry in encoded] if nested else encoded
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if nested else pa.binary()
    pq.write_table(pa.table({"picture": pa.array(images, kind), "target": pa.array(labels, pa.int64()), **more}), path)
    return str(path)


def write_folder(root, counts, *, size=(8, 8), seed=0):
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return str(root)


def parquet_settings(train, **more):
    return PrepareData(**{"source": "parquet", "train": train, "classes": 2, "image_size": 8, **more})


def folder_settings(train, **more):
    return PrepareData(**{"source": "imagefolder", "train": train, "classes": 2, "image_size": 8, **more})


def rows_as_bytes(stack):
    return [image.tobytes() for image in stack]


def run_stage(folder, **section):
    config = load({"run": "tiny", "prepare_data": section})
    paths = {name: str(folder / f"{name}.safetensors") for name in SPLITS}
    paths["manifest"] = str(folder / "manifest.json")
    flags = [text for name, path in paths.items() for text in (f"--{name}", path)]
    main(["--settings", job_settings(config, "prepare_data"), "--seed", "3", "--threads", "1", *flags])
    return paths, json.loads((folder / "manifest.json").read_text())
