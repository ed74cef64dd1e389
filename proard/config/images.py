"""Settings of the source of the images and of their split."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from proard.config.columns import with_hub_classes
from proard.config.fields import Classes, Count, Number, Settings

Paths = str | tuple[str, ...]


class AdditionalImages(Settings):
    """A second source of training images, such as generated ones, which fills the part `share` of every batch.

    `files`: Parquet files with the columns of `train`, or npz archives with the arrays `image` (uint8, of shape (n,
    height, width, channels)) and `label` (integers, of shape (n,)). They are never part of val or test, and neither
    recalibration nor the calibration of int8 files uses them. A pass takes every image of `train` once.
    """

    files: Paths
    share: Annotated[Number, Field(gt=0, lt=1)]


class PrepareData(Settings):
    """Source and split of the images. `train` and `test` are paths; without `test`, a part of `train` becomes test.

    `max_train_images` reduces the training images before `val` is split off. `image_column` and `label_column` name
    columns of Parquet files. Without `label_column`, an integer, boolean or text column named label, labels, target,
    class or fine_label is used. `classes` is optional if a Hugging Face data set stored its class names in the Parquet
    files. `image_size` resizes images of `parquet` and `imagefolder` to that side in pixels.
    """

    source: Literal["digits", "cifar10", "cifar100", "parquet", "imagefolder"] = "digits"
    train: Paths | None = None
    test: Paths | None = None
    folder: str = "data"
    download: bool = False
    classes: Classes = None
    image_size: Count | None = None
    image_column: str | None = None
    label_column: str | None = None
    val_fraction: Annotated[Number, Field(gt=0, lt=0.5)] = 0.1
    test_fraction: Annotated[Number, Field(gt=0, lt=0.5)] = 0.2
    max_train_images: Count | None = None
    max_test_images: Count | None = None
    additional: AdditionalImages | None = None

    @model_validator(mode="before")
    @classmethod
    def classes_from_the_file(cls, value: Any) -> Any:
        """Use the class names stored in a Parquet file as if they were given in the config."""
        return with_hub_classes(value)

    @model_validator(mode="after")
    def source_is_complete(self) -> PrepareData:
        """Require a path and the classes for sources that read the user's own files."""
        if self.source in ("parquet", "imagefolder"):
            if self.train is None:
                raise ValueError(f"source {self.source} needs `train`: the path of the training images")
            if self.classes is None:
                where = " (optional only for existing Parquet files with Hugging Face's class names)"
                raise ValueError(
                    f"source {self.source} needs `classes`: their names in label order, or their number"
                    f"{where if self.source == 'parquet' else ''}"
                )
        return self

    def image_shape(self) -> tuple[int, int, int]:
        """Channels, side in pixels and number of classes of this source's images."""
        channels, size, classes = {"digits": (1, 8, 10), "cifar10": (3, 32, 10), "cifar100": (3, 32, 100)}.get(
            self.source, (3, 32, 0)
        )
        if self.classes is not None:
            classes = self.classes if isinstance(self.classes, int) else len(self.classes)
        return channels, self.image_size or size, classes
