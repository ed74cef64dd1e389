"""Folders of images as users have them: links, leftovers of tools, many formats, turned and transparent images."""

from __future__ import annotations

import numpy as np
import pytest
from foreign import UPRIGHT, transparent, turned, wide_pixels
from image_files import SPLITS, folder_settings, random_pixels, rows_as_bytes, run_stage, write_folder
from PIL import Image

from proard.config import PrepareData
from proard.config.fingerprint import image_fingerprint
from proard.data import DataError, make_splits, preprocess


def read(root, **more):
    """Splits of a folder, and all its images as bytes with their labels."""
    splits = make_splits(folder_settings(str(root), **more), seed=0)
    pairs = [
        pair
        for name in SPLITS
        for pair in zip(rows_as_bytes(splits.images[name]), splits.labels[name].tolist(), strict=True)
    ]
    return splits, pairs


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".thumbnails", "@eaDir", "sub/@eaDir/deep"])
def test_hidden_folders_hold_no_images(tmp_path, hidden):
    root = tmp_path / "train"
    write_folder(root, {"a": 4, "b": 4})
    write_folder(root / "a", {hidden: 3}, seed=1)
    write_folder(root, {"@eaDir": 2, ".cache": 2})
    splits, pairs = read(root)
    assert len(pairs) == 8
    assert splits.classes == ("a", "b")
    assert splits.notes == ("train: left out 1 hidden",)


def test_linked_folders_are_read_once_and_circles_end(tmp_path):
    root = tmp_path / "train"
    write_folder(root, {"a": 4, "b": 4})
    write_folder(tmp_path, {"elsewhere": 3}, seed=1)
    write_folder(tmp_path / "elsewhere", {"inner": 2}, seed=2)
    for name, target in {"one": "elsewhere", "two": "elsewhere/inner", "up": "train", "top": "."}.items():
        (root / "a" / name).symlink_to(tmp_path / target, target_is_directory=True)
    (tmp_path / "elsewhere" / "inner" / "back").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "a" / "again.png").symlink_to(root / "a" / "0.png")
    splits, pairs = read(root)
    assert len(pairs) == len(set(pairs)) == 13
    assert sum(label == 0 for _, label in pairs) == 9
    assert splits.notes == ("train: left out 3 linked in a loop, 1 linked twice",)


def test_the_fingerprint_is_of_the_files_that_are_read(tmp_path):
    write_folder(tmp_path / "train", {"a": 4, "b": 4})
    settings = folder_settings(str(tmp_path / "train"))
    before = image_fingerprint(settings)
    write_folder(tmp_path / "train" / "a", {"@eaDir": 1})
    for name in ("notes.txt", ".DS_Store"):
        (tmp_path / "train" / "a" / name).write_bytes(b"no image")
    assert image_fingerprint(settings) == before
    (tmp_path / "train" / "a" / "0.png").rename(tmp_path / "train" / "a" / "@0.png")
    assert image_fingerprint(settings) != before
    settings = PrepareData(additional={"files": str(tmp_path / "*.npz"), "share": 0.5})
    before = image_fingerprint(settings)
    (tmp_path / "made.npz").write_bytes(b"more")
    assert image_fingerprint(settings) != before != image_fingerprint(PrepareData()) == ""


def test_one_file_in_two_classes_is_refused(tmp_path):
    root = tmp_path / "train"
    write_folder(root, {"a": 4, "b": 4})
    (root / "b" / "same").symlink_to(root / "a", target_is_directory=True)
    with pytest.raises(DataError, match=r"b/same/0.png and .*a/0.png are the same file in two classes"):
        read(root)


FORMATS = {"jfif": "JPEG", "jpe": "JPEG", "jp2": "JPEG2000", "avif": "AVIF", "pnm": "PPM", "tga": "TGA", "apng": "PNG"}


def test_every_format_of_pillow_is_read_and_the_rest_is_counted(tmp_path, capsys):
    root = tmp_path / "train"
    write_folder(root, {"a": 4, "b": 4})
    Image.init()
    formats = {suffix: kind for suffix, kind in FORMATS.items() if f".{suffix}" in Image.registered_extensions()}
    for suffix, kind in formats.items():
        Image.fromarray(wide_pixels(seed=len(suffix))).save(root / "a" / f"image.{suffix.upper()}", kind)
    Image.fromarray(random_pixels(1, height=16, width=16)[0]).save(root / "a" / "image.ico", sizes=[(16, 16)])
    for name in ("notes.txt", "more.txt", "film.mpg", "table.h5", "README", ".DS_Store"):
        (root / "b" / name).write_bytes(b"no image")
    _, manifest = run_stage(tmp_path, source="imagefolder", train=str(root), classes=2, image_size=8)
    assert sum(entry["count"] for entry in manifest["splits"].values()) == 9 + len(formats)
    assert "  train: left out 1 .h5, 1 .mpg, 2 .txt, 1 hidden, 1 without suffix" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_images_are_turned_upright(tmp_path, orientation):
    with Image.open(turned(tmp_path / "a.png", orientation)) as image:
        found = preprocess(image)
    upright = Image.fromarray(wide_pixels()).transpose(UPRIGHT[orientation])
    np.testing.assert_array_equal(found, np.asarray(upright))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white_and_opaque_ones_keep_every_bit(tmp_path, kind):
    pixels = wide_pixels(4)
    pixels[..., 3] = np.where(np.arange(48) < 24, 0, 255)
    if kind == "P":
        image = Image.fromarray(pixels[..., :1].squeeze() % 8, "L").convert("P")
        image.info["transparency"] = 3
        image.save(tmp_path / "a.png", transparency=3)
        clear = np.asarray(image) == 3
        opaque = np.asarray(image.convert("RGB"))
    else:
        image = Image.fromarray(pixels, "RGBA").convert(kind)
        image.save(tmp_path / "a.png")
        clear, opaque = pixels[..., 3] == 0, np.asarray(image.convert("RGB"))
    with Image.open(tmp_path / "a.png") as image:
        found = preprocess(image)
    assert (found[clear] == 255).all()
    np.testing.assert_array_equal(found[~clear], opaque[~clear])


def test_half_transparent_pixels_are_mixed_with_white():
    image = Image.new("RGBA", (1, 1), (0, 100, 200, 51))
    assert preprocess(image).tolist() == [[[204, 224, 244]]]


def test_train_and_test_of_equal_files_are_refused_and_copies_within_are_named(tmp_path):
    train, test = (write_folder(tmp_path / name, {"a": 6, "b": 6}, seed=seed) for seed, name in enumerate(SPLITS[::2]))
    for index in range(2):
        (tmp_path / "test" / "b" / f"copy{index}.png").write_bytes((tmp_path / f"train/b/{index}.png").read_bytes())
    with pytest.raises(DataError, match=r"prepare_data.test shares .*: 2 of 14 are .*copy0.png equals .*train/b/0.png"):
        read(train, test=test)
    for index in range(6):
        (tmp_path / "train" / "a" / f"copy{index}.png").write_bytes((tmp_path / "train/a/0.png").read_bytes())
    splits, _ = read(train)
    assert splits.notes[0].startswith("test: ")
    assert "have a copy in train or val" in splits.notes[0]


def test_the_pipeline_reads_with_the_function_that_the_card_quotes(tmp_path):
    write_folder(tmp_path / "train", {"a": 4, "b": 4})
    expected = set()
    for path in (turned(tmp_path / "train/a/turned.png"), transparent(tmp_path / "train/b/clear.png")):
        with Image.open(path) as image:
            expected.add(preprocess(image, 8).tobytes())
    _, pairs = read(tmp_path / "train")
    assert expected <= {pixels for pixels, _ in pairs}
