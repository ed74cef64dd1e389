"""Where images come from and how they are split."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from proard.config.columns import with_hub_classes
from proard.config.fields import Classes, Count, Extended, Number

Paths = str | tuple[str, ...]


class PrepareData(Extended):
    """Where images come from and how they are split. `train` and `test` are paths; a missing `test` is cut off.

    `max_train_images` thins the training images before `val` is cut off. `image_column` and `label_column` name columns
    of Parquet files; without the latter an integer, boolean or text column called label, labels, target, class or
    fine_label is taken. `classes` may be left out where a Hugging Face data set left its class names in the Parquet
    files. `image_size` resizes images of `parquet` and `imagefolder` to that side.
    """

    gained = frozenset({"image_column"})

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

    @model_validator(mode="before")
    @classmethod
    def classes_from_the_file(cls, value: Any) -> Any:
        """Class names that a Parquet file brings count as written in the config."""
        return with_hub_classes(value)

    @model_validator(mode="after")
    def source_is_complete(self) -> PrepareData:
        """Sources that read the user's own files need a path and the classes."""
        if self.source in ("parquet", "imagefolder"):
            if self.train is None:
                raise ValueError(f"source {self.source} needs `train`: the path of the training images")
            if self.classes is None:
                where = "; only Parquet files that exist here and hold Hugging Face's class names do without"
                raise ValueError(
                    f"source {self.source} needs `classes`: their names in label order, or their number"
                    f"{where if self.source == 'parquet' else ''}"
                )
        return self

    def image_shape(self) -> tuple[int, int, int]:
        """Channels, side in pixels and number of classes of the images this source yields."""
        channels, size, classes = {"digits": (1, 8, 10), "cifar10": (3, 32, 10), "cifar100": (3, 32, 100)}.get(
            self.source, (3, 32, 0)
        )
        if self.classes is not None:
            classes = self.classes if isinstance(self.classes, int) else len(self.classes)
        return channels, self.image_size or size, classes
