"""Images: sources and their errors, the split, sets in memory, augmentation."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_files import (
    SPLITS,
    folder_settings,
    parquet_settings,
    png,
    random_pixels,
    rows_as_bytes,
    run_stage,
    write_folder,
    write_parquet,
)
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from proard import artifacts
from proard.artifacts import ArtifactError
from proard.config import Phase, PrepareData, TrainTeacher
from proard.data import (
    Augmenter,
    DataError,
    epoch_order,
    load_split,
    make_splits,
    mixed_order,
    sources,
    stratified_order,
    to_float,
)
from proard.stages.training import AugmentedImages


def test_digits_keep_their_range_and_share_no_image():
    splits = make_splits(PrepareData(), seed=0)
    train = splits.images["train"]
    assert train.shape[1:] == (8, 8, 1)
    assert train.dtype == np.uint8
    assert (train.min(), train.max()) == (0, 255)
    assert sum(len(splits.labels[name]) for name in SPLITS) == 1797
    assert splits.classes == tuple("0123456789")
    assert len({image for name in SPLITS for image in rows_as_bytes(splits.images[name])}) == 1797


@pytest.mark.parametrize("nested", [True, False])
def test_parquet_rows_arrive_once_with_their_pixels_and_labels(tmp_path, nested):
    pixels, labels = random_pixels(60), np.arange(60) % 3
    for part in range(2):
        rows = slice(30 * part, 30 * part + 30)
        write_parquet(tmp_path / f"{part}.parquet", [png(p) for p in pixels[rows]], labels[rows], nested=nested)
    settings = parquet_settings(str(tmp_path / "*.parquet"), classes=("a", "b", "c"))
    splits = make_splits(settings, seed=0)
    expected = dict(zip(rows_as_bytes(pixels), labels.tolist(), strict=True))
    found = {
        image: label
        for name in SPLITS
        for image, label in zip(rows_as_bytes(splits.images[name]), splits.labels[name].tolist(), strict=True)
    }
    assert found == expected
    assert [len(splits.labels[name]) for name in SPLITS] == [42, 6, 12]
    several = make_splits(parquet_settings((str(tmp_path / "0.parquet"), str(tmp_path)), classes=3), seed=0)
    assert sum(len(several.labels[name]) for name in SPLITS) == 60


def test_parquet_with_a_test_file_leaves_it_whole(tmp_path):
    train = write_parquet(tmp_path / "train.parquet", [png(p) for p in random_pixels(20)], np.arange(20) % 2)
    test_pixels = random_pixels(6, seed=1)
    test = write_parquet(tmp_path / "test.parquet", [png(p) for p in test_pixels], np.arange(6) % 2)
    splits = make_splits(parquet_settings(train, test=test), seed=0)
    assert sorted(rows_as_bytes(splits.images["test"])) == sorted(rows_as_bytes(test_pixels))
    assert len(splits.labels["train"]) + len(splits.labels["val"]) == 20


def test_parquet_with_two_integer_columns_asks_which(tmp_path):
    encoded, labels = [png(p) for p in random_pixels(20)], np.arange(20) % 2
    path = write_parquet(tmp_path / "a.parquet", encoded, np.zeros(20), fine_label=pa.array(labels))
    with pytest.raises(DataError, match=r"2 label columns.*target: int64, fine_label: int64; .*label_column"):
        make_splits(parquet_settings(path), seed=0)
    splits = make_splits(parquet_settings(path, label_column="fine_label"), seed=0)
    assert np.bincount(splits.labels["train"]).tolist() == [7, 7]


def test_imagefolder_classes_follow_the_list_and_grey_becomes_rgb(tmp_path):
    root = write_folder(tmp_path / "train", {"cat": 6, "ant": 6})
    grey = np.full((8, 8), 77, np.uint8)
    Image.fromarray(grey).save(tmp_path / "train" / "cat" / "0.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    by_name = make_splits(folder_settings(root), seed=0)
    assert by_name.classes == ("ant", "cat")
    splits = make_splits(folder_settings(root, classes=("cat", "ant")), seed=0)
    assert splits.classes == ("cat", "ant")
    everything = {
        image: label
        for name in SPLITS
        for image, label in zip(rows_as_bytes(splits.images[name]), splits.labels[name].tolist(), strict=True)
    }
    assert len(everything) == 12
    assert everything[np.full((8, 8, 3), 77, np.uint8).tobytes()] == 0


def test_image_size_resizes_and_crops_the_centre_and_leaves_fitting_images_alone(tmp_path):
    root = write_folder(tmp_path / "train", {"a": 4, "b": 3})
    kept = np.asarray(Image.open(tmp_path / "train" / "a" / "1.png"))
    wide = Image.fromarray(random_pixels(1, height=16, width=48)[0])
    wide.save(tmp_path / "train" / "b" / "wide.png")
    splits = make_splits(folder_settings(root), seed=0)
    images = {image for name in SPLITS for image in rows_as_bytes(splits.images[name])}
    assert wide.resize((24, 8), Image.Resampling.BICUBIC).crop((8, 0, 16, 8)).tobytes() in images
    assert kept.tobytes() in images


def test_cifar_absent_names_both_ways_out(tmp_path):
    with pytest.raises(DataError, match=r"prepare_data.download: true.*prepare_data.folder.*cifar-10-batches-py"):
        make_splits(PrepareData(source="cifar10", folder=str(tmp_path)), seed=0)


def test_cifar_keeps_the_names_of_the_data_set():
    data = SimpleNamespace(data=random_pixels(20, height=32, width=32), targets=[index % 10 for index in range(20)])
    data.classes = [f"name{index}" for index in range(10)]
    source = sources.of_torchvision(PrepareData(source="cifar10"), data, train=False)
    assert source.classes[3] == "name3"
    assert source.labels.tolist() == data.targets


def damaged_image(tmp_path):
    encoded = [png(p) for p in random_pixels(20)]
    encoded[7] = encoded[7][:60]
    write_parquet(tmp_path / "train.parquet", encoded, np.arange(20) % 2)
    return r"train.parquet row 7 cannot be decoded"


def null_image(tmp_path):
    encoded = [png(p) for p in random_pixels(20)]
    encoded[4] = None
    write_parquet(tmp_path / "train.parquet", encoded, np.arange(20) % 2)
    return r"train.parquet row 4 has no image"


def label_out_of_range(tmp_path):
    write_parquet(tmp_path / "train.parquet", [png(p) for p in random_pixels(4)], [0, 1, 5, 0])
    return r"train.parquet row 2 has label 5; expected 0 to 1"


def null_label(tmp_path):
    write_parquet(tmp_path / "train.parquet", [png(p) for p in random_pixels(3)], [0, None, 1])
    return r"train.parquet row 1 has no label"


def empty_class(tmp_path):
    write_parquet(tmp_path / "train.parquet", [png(p) for p in random_pixels(4)], [0, 0, 0, 0])
    return r"train.parquet has no image of class 1 \('1'\)"


def class_of_one_image(tmp_path):
    write_parquet(tmp_path / "train.parquet", [png(p) for p in random_pixels(4)], [0, 0, 0, 1])
    return r"class 1 \('1'\) of .*train.parquet has too few images.*: 1, expected at least 2"


def deep_pixels(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(buffer, "PNG")
    write_parquet(tmp_path / "train.parquet", [buffer.getvalue()] * 8, np.arange(8) % 2)
    return r"train.parquet row \d cannot be decoded .*pixels of type I;16; expected 8 bits per channel"


def no_image_column(tmp_path):
    pq.write_table(pa.table({"label": [0, 1], "text": ["a", "b"]}), tmp_path / "train.parquet")
    return r"train.parquet has no image column.*its columns are label: int64, text: string"


def no_label_column(tmp_path):
    pq.write_table(pa.table({"image": [b"a", b"b"], "name": ["a", "b"]}), tmp_path / "train.parquet")
    return r"train.parquet has no label column.*its columns are image: binary, name: string"


def no_rows(tmp_path):
    write_parquet(tmp_path / "train.parquet", [], [])
    return r"train.parquet has no rows"


def no_parquet(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"hello, this is no table")
    return r"train.parquet is no readable Parquet file"


def truncated_parquet(tmp_path):
    path = write_parquet(tmp_path / "train.parquet", [png(p) for p in random_pixels(20)], np.arange(20) % 2)
    whole = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / path).write_bytes(whole[:-100])
    return r"train.parquet is no readable Parquet file"


def missing_file(tmp_path):
    return r"prepare_data.train: .*train.parquet does not exist"


@pytest.mark.parametrize(
    "spoil",
    [
        damaged_image,
        null_image,
        label_out_of_range,
        null_label,
        empty_class,
        class_of_one_image,
        deep_pixels,
        no_image_column,
        no_label_column,
        no_rows,
        no_parquet,
        truncated_parquet,
        missing_file,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_bad_parquet_names_file_row_and_expectation(tmp_path, spoil):
    message = spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        make_splits(parquet_settings(str(tmp_path / "train.parquet")), seed=0)


def test_mixed_sizes_name_two_rows(tmp_path):
    encoded = [png(p) for p in random_pixels(19)] + [png(random_pixels(1, height=9)[0])]
    path = write_parquet(tmp_path / "train.parquet", encoded, np.arange(20) % 2)
    with pytest.raises(DataError, match=r"train.parquet row \d+ is 8 x 8 pixels, .*row 19 is 8 x 9 pixels.*image_size"):
        make_splits(PrepareData(source="parquet", train=path, classes=2), seed=0)


def test_one_size_that_is_not_the_space_s_asks_for_image_size(tmp_path):
    root = write_folder(tmp_path / "train", {"a": 4, "b": 4})
    with pytest.raises(DataError, match=r"8 x 8 pixels.*expected 32 x 32.*set prepare_data.image_size: 8"):
        make_splits(PrepareData(source="imagefolder", train=root, classes=2), seed=0)
    with pytest.raises(DataError, match=r"prepare_data.image_size applies to the sources parquet and imagefolder only"):
        make_splits(PrepareData(image_size=16), seed=0)


def test_bad_folders_name_class_or_file(tmp_path):
    root = write_folder(tmp_path / "train", {"a": 4, "b": 4})
    with pytest.raises(DataError, match=r"has 2 class folders \(a, b\), but prepare_data.classes is 3"):
        make_splits(folder_settings(root, classes=3), seed=0)
    with pytest.raises(DataError, match=r"has a folder 'b' that is no class; expected a, c"):
        make_splits(folder_settings(root, classes=("a", "c")), seed=0)
    with pytest.raises(DataError, match=r"no image of class 2 \('c'\)"):
        make_splits(folder_settings(root, classes=("a", "b", "c")), seed=0)
    with pytest.raises(DataError, match=r"is in prepare_data.train and in prepare_data.test"):
        make_splits(folder_settings(root, test=root), seed=0)
    (tmp_path / "train" / "b" / "2.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"train/b/2.png cannot be decoded"):
        make_splits(folder_settings(root), seed=0)


def test_every_prefix_of_a_stratified_order_is_balanced():
    labels = np.repeat([0, 1, 2], [100, 200, 300])
    order = stratified_order(labels, np.random.default_rng(0))
    assert sorted(order) == list(range(600))
    for number in (6, 60, 123, 450):
        counts = np.bincount(labels[order[:number]], minlength=3)
        np.testing.assert_allclose(counts, number * np.array([1, 2, 3]) / 6, atol=1.5)
    assert (np.diff(order) != 1).mean() > 0.9  # shuffled within the classes


def test_split_depends_on_the_seed_alone():
    first, again, other = (make_splits(PrepareData(), seed=seed) for seed in (0, 0, 1))
    for name in SPLITS:
        np.testing.assert_array_equal(first.images[name], again.images[name])
        assert not np.array_equal(first.images[name], other.images[name])
    larger_val = make_splits(PrepareData(val_fraction=0.3), seed=0)
    np.testing.assert_array_equal(first.images["test"], larger_val.images["test"])


def test_stage_writes_what_the_manifest_says(tmp_path, capsys):
    paths, manifest = run_stage(tmp_path, max_train_images=200, max_test_images=50)
    assert manifest["classes"] == list("0123456789")
    assert manifest["seed"] == 3
    for name in SPLITS:
        images, entry = load_split(paths[name]), manifest["splits"][name]
        assert images.split == name
        assert images.checksum == entry["checksum"]
        assert artifacts.sha256(paths[name]) == entry["sha256"]
        assert entry["count"] == len(images) == sum(entry["per_class"])
        assert torch.bincount(images.labels, minlength=10).tolist() == entry["per_class"]
        assert list(images.images.shape[1:]) == entry["image_shape"] == [8, 8, 1]
    train = load_split(paths["train"])
    pixels = train.images.double() / 255
    assert list(train.mean) == pytest.approx([pixels.mean().item()])
    assert list(train.std) == pytest.approx([pixels.std(correction=0).item()])
    assert load_split(paths["test"]).mean == train.mean
    assert manifest["splits"]["test"]["count"] == 50
    assert manifest["splits"]["train"]["count"] + manifest["splits"]["val"]["count"] == 200
    assert "digits: 8 x 8 pixels, 1 channel, 10 classes" in capsys.readouterr().out


def write_archive(path, count=30, *, label=1, size=8, seed=0):
    """An npz archive of generated images, all of one class."""
    images = np.random.default_rng(seed).integers(0, 256, (count, size, size, 1), dtype=np.uint8)
    np.savez(path, image=images, label=np.full(count, label))
    return images


def test_additional_images_are_for_training_alone(tmp_path, capsys):
    made = np.concatenate([write_archive(tmp_path / f"{number}.npz", seed=number) for number in (0, 1)])
    additional = {"files": str(tmp_path / "*.npz"), "share": 0.25}
    paths, manifest = run_stage(tmp_path, max_train_images=200, additional=additional)
    (tmp_path / "plain").mkdir()
    plain, _ = run_stage(tmp_path / "plain", max_train_images=200)
    train, without = load_split(paths["train"]), load_split(plain["train"])
    assert (train.own, train.additional, train.share) == (len(without), 60, 0.25)
    assert torch.equal(train.images[: train.own], without.images)
    np.testing.assert_array_equal(train.images[train.own :].numpy(), made)
    assert set(train.labels[train.own :].tolist()) == {1}
    assert (train.mean, train.std) == (without.mean, without.std)
    assert len(train.first(None)) == len(train.first(10**6)) == train.own  # for recalibration and calibration
    assert train.first(None).checksum == without.checksum
    entry = manifest["splits"]["train"]
    assert entry["count"] == sum(entry["per_class"]) == train.own
    assert (entry["additional"], entry["share"]) == (60, 0.25)
    assert "additional" not in manifest["splits"]["val"]
    assert "60 additional images, 25% of every batch" in capsys.readouterr().out
    source = AugmentedImages(train, TrainTeacher(augment={"crop_padding": 0, "flip": False}))
    assert len(source) == train.own + train.own // 3
    images, labels = source.batch(source.order(0, 0)[:40], torch.Generator())
    assert images.shape == (40, 1, 8, 8)
    assert (labels == 1).sum() >= 9


def test_a_pass_takes_every_own_image_once_and_every_batch_its_share_of_the_others():
    passes = [mixed_order(100, 70, 50, seed=3, epoch=epoch) for epoch in range(7)]
    assert all(sorted(order[order < 100].tolist()) == list(range(100)) for order in passes)
    assert all(
        abs(int((order[start : start + 30] >= 100).sum()) - 10) <= 1 for order in passes for start in (0, 60, 90)
    )
    drawn = torch.cat([order[order >= 100] for order in passes])
    assert torch.bincount(drawn - 100, minlength=70).tolist() == [5] * 70  # 350 of 70
    assert torch.equal(passes[1], mixed_order(100, 70, 50, seed=3, epoch=1))
    assert not torch.equal(passes[1], mixed_order(100, 70, 50, seed=4, epoch=1))
    assert not torch.equal(passes[0][:100], passes[1][:100])


def test_bad_additional_images_are_one_error(tmp_path):
    def refusal(**settings):
        with pytest.raises(DataError) as caught:
            make_splits(PrepareData(additional={"files": str(tmp_path / "*"), "share": 0.5, **settings}), seed=0)
        return str(caught.value)

    assert "does not exist" in refusal()
    write_archive(tmp_path / "a.npz", label=10)
    assert f"{tmp_path}/a.npz image 0 has label 10; expected 0 to 9" in refusal()
    write_archive(tmp_path / "a.npz", size=16)
    assert "additional images are 16 x 16 pixels with 1 channels, expected 8 x 8" in refusal()
    np.savez(tmp_path / "a.npz", image=np.zeros((2, 8, 8, 1), np.float32), label=np.zeros(2, int))
    assert "has image float32 of shape (2, 8, 8, 1)" in refusal()
    np.savez(tmp_path / "a.npz", pictures=np.zeros(2))
    assert "is no npz archive with the arrays image and label" in refusal()
    (tmp_path / "b.parquet").write_bytes(b"")
    assert "mixes npz archives with other files" in refusal()
    (tmp_path / "b.parquet").unlink()
    splits = make_splits(PrepareData(), seed=0)
    np.savez(tmp_path / "a.npz", image=splits.images["test"][[4, 5]], label=splits.labels["test"][[4, 5]])
    assert f"contains 2 images of test (the first: {tmp_path}/a.npz image 0); remove them" in refusal()


def test_additional_images_may_be_parquet_files(tmp_path):
    images = random_pixels(12, seed=5)
    write_parquet(tmp_path / "more.parquet", [png(image) for image in images], np.arange(12) % 2)
    train = write_folder(tmp_path / "train", {"a": 4, "b": 4})
    settings = folder_settings(train, additional={"files": str(tmp_path / "more.parquet"), "share": 0.5})
    splits = make_splits(settings, seed=0)
    assert splits.additional == 12
    np.testing.assert_array_equal(splits.images["train"][-12:], images)


def test_damaged_split_is_refused_and_subsets_have_their_own_checksum(tmp_path):
    paths, _ = run_stage(tmp_path)
    images = load_split(paths["val"])
    assert images.first(None) is images
    assert images.first(10**6) is images
    assert images.first(20).checksum == images.take(range(20)).checksum != images.checksum
    assert torch.equal(images.take([3, 1]).labels, images.labels[[3, 1]])
    assert torch.bincount(images.first(50).labels, minlength=10).min() >= 4
    data = bytearray((tmp_path / "val.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "val.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"val.safetensors is damaged"):
        load_split(paths["val"])


def test_to_float_divides_on_the_device_by_a_tensor_that_lies_there():
    """A GPU multiplies by the reciprocal of a divisor that the host holds, one ulp off for half of the values."""
    divisors = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "div" in str(function):
                divisors.append(args[1])
            assert "_to_copy" not in str(function) or "device" not in (kwargs or {})  # nothing comes from the host
            return function(*args, **(kwargs or {}))

    with Watch():
        to_float(torch.empty((2, 4, 4, 3), dtype=torch.uint8, device="meta"))
    assert [getattr(divisor, "device", None) for divisor in divisors] == [torch.device("meta")]


@pytest.mark.parametrize("channels", [1, 3])
def test_to_float_is_exact_and_channels_last(channels):
    images = torch.arange(256, dtype=torch.uint8).repeat(channels).view(2, 16, 8, channels)
    batch = to_float(images)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(batch, (images.permute(0, 3, 1, 2).double().numpy() / 255).astype(np.float32))
    assert (batch.min(), batch.max()) == (0, 1)


def slow_crop(image, top, left, mirrored, padding):
    height, width, channels = image.shape
    padded = torch.zeros(height + 2 * padding, width + 2 * padding, channels, dtype=torch.uint8)
    padded[padding : padding + height, padding : padding + width] = image
    crop = padded[top : top + height, left : left + width]
    return crop.flip(1) if mirrored else crop


@pytest.mark.parametrize(("padding", "channels"), [(4, 3), (1, 1), (0, 3)])
def test_crops_equal_the_slow_reference_at_every_offset(padding, channels):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (5, 6, 7, channels), generator=generator, dtype=torch.uint8)
    augmenter = Augmenter(images, padding=padding)
    side = torch.arange(2 * padding + 1)
    draws = torch.cartesian_prod(torch.arange(5), side, side, torch.arange(2))
    batch = augmenter.crop(draws[:, 0], draws[:, 1], draws[:, 2], draws[:, 3].bool())
    expected = torch.stack([slow_crop(images[i], y, x, m, padding) for i, y, x, m in draws.tolist()])
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, to_float(expected))


@pytest.mark.parametrize("flip", [False, True])
def test_shifted_crops_show_a_part_of_the_image_on_black(flip):
    images = 1 + torch.randint(255, (40, 8, 6, 2), dtype=torch.uint8)  # nothing is black
    augment = Augmenter(images, padding=0, flip=flip, shift=5)
    indices = torch.arange(40).repeat(20)
    views = augment.draw(indices, torch.Generator().manual_seed(1))
    crops = augment(indices, torch.Generator().manual_seed(1))
    assert crops.shape == (800, 2, 8, 6)
    cut = []
    for number, index in enumerate(indices.tolist()):
        r0, r1, c0, c1 = views.box[number].tolist()
        top, left = int(views.top[number]) - 5, int(views.left[number]) - 5
        expected = torch.zeros(8, 6, 2, dtype=torch.uint8)
        expected[r0:r1, c0:c1] = images[index, r0 + top : r1 + top, c0 + left : c1 + left]
        assert (expected[r0:r1, c0:c1] > 0).all()
        expected = expected.flip(1) if views.mirrored[number] else expected
        assert torch.equal(crops[number], to_float(expected[None])[0])
        cut.append((8 - (r1 - r0), 6 - (c1 - c0)))
    sums = torch.tensor(cut).sum(1)
    assert torch.bincount(sums, minlength=6).min() > 90  # uniform over 0 to 5: 133 each
    assert sums.max() == 5
    assert views.mirrored.any() == flip
    part = augment(indices, torch.Generator().manual_seed(1), slice(10, 20))
    assert torch.equal(part, crops[10:20])


def test_shifts_and_crops_or_kept_views_are_not_combined():
    assert TrainTeacher(augment={"crop_padding": 0, "crop_shift": 11}).augment.crop_shift == 11
    with pytest.raises(ValueError, match="write crop_padding: 0 beside it"):
        TrainTeacher(augment={"crop_shift": 11})
    shifts = {"crop_padding": 0, "crop_shift": 3}
    with pytest.raises(ValueError, match="crop_shift has too many views; remove one"):
        Phase(loss="rslad", teacher_logits="float32", augment=shifts)


def test_crops_are_a_view_and_repeat_with_the_generator():
    images = torch.randint(256, (50, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    augmenter = Augmenter(images, padding=2)
    assert augmenter.windows.untyped_storage().nbytes() == 50 * 12 * 12 * 3
    indices = torch.arange(50)
    first, again, other = (augmenter(indices, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    plain = Augmenter(images, padding=0, flip=False)(indices, torch.Generator().manual_seed(0))
    assert torch.equal(plain, to_float(images))


def test_epoch_order_is_a_function_of_seed_and_epoch():
    order = epoch_order(100, seed=1, epoch=2)
    assert torch.equal(order.sort().values, torch.arange(100))
    assert torch.equal(order, epoch_order(100, seed=1, epoch=2))
    for seed, epoch in ((1, 3), (2, 2), (2, 1)):
        assert not torch.equal(order, epoch_order(100, seed=seed, epoch=epoch))
