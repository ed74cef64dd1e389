"""Images: sources, the train / val / test split, sets in memory, augmentation."""

from proard.config import DataError
from proard.data.augment import Augmenter, Views, epoch_order, keyed_generator, mixed_order
from proard.data.decode import preprocess
from proard.data.images import ImageSet, load_split, pixel_statistics, save_split, to_float
from proard.data.split import Splits, make_splits, stratified_order

__all__ = [
    "Augmenter",
    "DataError",
    "ImageSet",
    "Splits",
    "Views",
    "epoch_order",
    "keyed_generator",
    "load_split",
    "make_splits",
    "mixed_order",
    "pixel_statistics",
    "preprocess",
    "save_split",
    "stratified_order",
    "to_float",
]
