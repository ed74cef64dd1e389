"""Parquet files as users have them: which column is the label, class names inside, copies between files."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import parquet_settings, png, random_pixels

from proard.config import ConfigError, load
from proard.data import DataError, make_splits

LABELS = np.arange(20) % 2
NAMES = ["cat", "dog"]


def write(path, *, seed=0, hub=None, images=None, **columns):
    """A file of 20 images with these columns; `hub` are class names by column, as Hugging Face's files hold them."""
    encoded = images or [png(pixels) for pixels in random_pixels(20, seed=seed)]
    table = pa.table({"image": pa.array(encoded, pa.binary()), **columns})
    if hub is not None:
        features = {name: {"names": names, "_type": "ClassLabel"} for name, names in hub.items()}
        features["image"] = {"_type": "Image"}
        table = table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return str(path)


def counted(settings):
    """How many images of each class train, val and test hold together."""
    splits = make_splits(settings, seed=0)
    return sum(np.bincount(part, minlength=2) for part in splits.labels.values()).tolist(), splits.notes


def text(labels=LABELS):
    return pa.array([NAMES[label] for label in labels])


def test_a_lone_integer_column_is_no_label_unless_it_is_named(tmp_path):
    fold = pa.array(np.arange(20) % 4 // 2, pa.int8())
    path = write(tmp_path / "a.parquet", class_name=text(), fold=fold)
    with pytest.raises(
        DataError, match=r"no label column.*class_name: string, fold: int8; .*prepare_data.label_column"
    ):
        make_splits(parquet_settings(path), seed=0)
    counts, notes = counted(parquet_settings(path, label_column="fold"))
    assert counts == [10, 10]
    assert notes == ("train: images from column image, labels from column fold",)


LABELLED = {
    "target": pa.array(LABELS, pa.int16()),
    "fine_label": pa.array(LABELS),
    "labels": pa.array(LABELS == 1),
    "class": text(),
    "label": text().dictionary_encode(),
}


@pytest.mark.parametrize("name", LABELLED)
def test_integers_booleans_and_text_called_as_labels_are_taken(tmp_path, name):
    path = write(tmp_path / "a.parquet", **{"fold": pa.array(np.zeros(20, int)), name: LABELLED[name]})
    counts, notes = counted(parquet_settings(path, classes=NAMES))
    assert counts == [10, 10]
    assert notes == (f"train: images from column image, labels from column {name}",)


def test_text_labels_become_the_index_of_their_class(tmp_path):
    path = write(tmp_path / "a.parquet", kind=text(np.arange(20) % 4 // 3))
    assert counted(parquet_settings(path, classes=["dog", "cat"], label_column="kind"))[0] == [5, 15]
    with pytest.raises(DataError, match=r"a.parquet row 3 has label 'dog'; expected cat, cow, .*\(5 such rows"):
        make_splits(parquet_settings(path, classes=["cat", "cow"], label_column="kind"), seed=0)
    with pytest.raises(
        DataError, match=r"column kind contains text, such as 'cat', but prepare_data.classes is 2; set"
    ):
        make_splits(parquet_settings(path, label_column="kind"), seed=0)
    with pytest.raises(DataError, match=r"no label column 'knd' \(prepare_data.label_column\).*kind: string"):
        make_splits(parquet_settings(path, label_column="knd"), seed=0)


def test_image_column_chooses_between_two(tmp_path):
    other = [png(pixels) for pixels in random_pixels(20, seed=1)]
    path = write(tmp_path / "a.parquet", thumbnail=pa.array(other, pa.binary()), label=pa.array(LABELS))
    with pytest.raises(DataError, match=r"2 image columns.*image: binary, thumbnail.*prepare_data.image_column"):
        make_splits(parquet_settings(path), seed=0)
    splits = make_splits(parquet_settings(path, image_column="thumbnail"), seed=0)
    found = {image.tobytes() for stack in splits.images.values() for image in stack}
    assert found == {image.tobytes() for image in random_pixels(20, seed=1)}
    with pytest.raises(DataError, match=r"no image column 'x' \(prepare_data.image_column\)"):
        make_splits(parquet_settings(path, image_column="x"), seed=0)


def test_class_names_come_from_the_file_where_the_config_has_none(tmp_path):
    coarse = pa.array(np.zeros(20, int))
    hub = {"fine_label": NAMES, "coarse_label": ["animal"]}
    write(tmp_path / "0.parquet", hub=hub, fine_label=pa.array(LABELS), coarse_label=coarse)
    for train in (str(tmp_path / "*.parquet"), [str(tmp_path)]):
        section = {"source": "parquet", "train": train, "image_size": 8}
        config = load({"run": "a", "space": "resnet_digits", "prepare_data": section})
        assert config.prepare_data.classes == ("cat", "dog")
        assert config.space.classes == 2
        assert make_splits(config.prepare_data, seed=0).classes == ("cat", "dog")
    write(tmp_path / "0.parquet", fine_label=pa.array(LABELS))
    for train in (str(tmp_path), str(tmp_path / "absent.parquet")):
        with pytest.raises(ConfigError, match=r"prepare_data: source parquet needs `classes`.*Hugging Face"):
            load({"run": "a", "prepare_data": {"source": "parquet", "train": train}})


def test_a_file_that_numbers_the_classes_otherwise_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", hub={"label": NAMES}, label=pa.array(LABELS))
    with pytest.raises(DataError, match=r"a.parquet has the class order cat, dog, prepare_data.classes is dog, cat"):
        make_splits(parquet_settings(path, classes=["dog", "cat"]), seed=0)


def test_train_and_test_that_share_images_are_refused(tmp_path):
    train = write(tmp_path / "train.parquet", label=pa.array(LABELS))
    images = [png(pixels) for pixels in [*random_pixels(3), *random_pixels(17, seed=1)]]
    test = write(tmp_path / "test.parquet", images=images, label=pa.array(LABELS))
    shares = r"shares images with .*train: 3 of 20 are copies .*test.parquet row 0 equals .*train.parquet row 0\)"
    with pytest.raises(DataError, match=shares):
        make_splits(parquet_settings(train, test=test), seed=0)
