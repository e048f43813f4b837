"""Samples: one image decoded and augmented, with its targets."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from msdetr.config import DataConfig
from msdetr.data.buckets import choose_image_buckets
from msdetr.data.cache import ImageCache, open_image_cache
from msdetr.data.coco import CocoDataset, load_coco
from msdetr.data.images import ExifPolicy, decode_image
from msdetr.data.labels import LabelMap
from msdetr.data.paths import Split, resolve_split
from msdetr.data.transforms import (
    Augmentation,
    Geometry,
    Size,
    evaluation_transform,
    resize_window,
    training_transform,
    transform_boxes,
    transform_pixels,
)

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One image and its n targets."""

    pixels: Tensor
    """[3, H, W] uint8, RGB."""
    labels: Tensor
    """[n] int64"""
    boxes: Tensor
    """[n, 4] float32, (centre x, centre y, width, height) as fractions of `pixels`."""
    image_id: int
    """Id in the annotation file."""
    original_size: tuple[int, int]
    """(height, width) of the stored image in pixels (turned by its EXIF tag, if that applies)."""


class DetectionDataset(Dataset[Sample]):
    """Annotated images under a transform.

    Args:
        annotations: images and boxes.
        transform: draws what to do with an image of a given size.
        exif: whether photographs are turned as their EXIF tag says.
        cache: keeps decoded images; samples are the same with and without one.
    """

    def __init__(
        self,
        annotations: CocoDataset,
        transform: Augmentation,
        exif: ExifPolicy = "ignore",
        cache: ImageCache | None = None,
    ) -> None:
        self.annotations = annotations
        self.transform = transform
        self.exif = exif
        self.cache = cache
        self._image_buckets: dict[tuple[int, int, int], tuple[Size, ...]] = {}

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`; a transform that is random draws the same each time."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        return self.sample(index, np.random.default_rng(index))

    def image_buckets(
        self, num_buckets: int, *, batch_size: int, multiple: int
    ) -> tuple[Size, ...]:
        """Padded shapes for batches of this set, see `choose_image_buckets`; computed once."""
        key = (num_buckets, batch_size, multiple)
        if key not in self._image_buckets:
            buckets = choose_image_buckets(
                self.annotations.sizes.numpy(),
                self.transform,
                num_buckets=num_buckets,
                batch_size=batch_size,
                multiple=multiple,
            )
            names = ", ".join(f"{height}x{width}" for height, width in buckets)
            logger.info("%d image buckets for batches of %d: %s", len(buckets), batch_size, names)
            self._image_buckets[key] = buckets
        return self._image_buckets[key]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Sample `index`, its augmentation drawn from `rng`.

        Raises:
            ValueError: the image is missing or broken, of another size than annotated, or outside
                the image folder.
        """
        original_size = self.annotations.image_size(index)
        geometry = self.transform(original_size, rng)
        pixels = self._pixels(index, geometry)
        labels, boxes = transform_boxes(*self.annotations.targets(index), geometry)
        return Sample(pixels, labels, boxes, self.annotations.image_id(index), original_size)

    def _pixels(self, index: int, geometry: Geometry) -> Tensor:
        cache, max_scale = self.cache, geometry.max_scale
        stored = None if cache is None else cache.load(index, max_scale)
        if stored is not None:
            return resize_window(stored, geometry)
        decoded = decode_image(
            self.annotations.image_path(index),
            exif=self.exif,
            expected_size=self.annotations.image_size(index),
            max_scale=max_scale,
        )
        if cache is not None and decoded.scale == 1:
            cache.store(index, np.asarray(decoded.image), max_scale)
        return transform_pixels(decoded, geometry)


def build_dataset(
    config: DataConfig, split: Split, *, label_map: LabelMap | None = None
) -> DetectionDataset:
    """The training set with augmentation, or the validation set without.

    Args:
        config: where the data are and how they are augmented.
        split: which of the two.
        label_map: labels of the model or training set, instead of those of the annotation file.

    Raises:
        ValueError: a path is missing, the annotations are broken, or the images do not fit into
            memory for `config.cache`; says which and what to do.
    """
    images, annotation_file = resolve_split(config, split)
    annotations = load_coco(annotation_file, images, config.label_layout, label_map=label_map)
    transform = training_transform if split == "train" else evaluation_transform
    cache = None
    if config.cache == "memory":
        identity = (split, str(images.resolve()), str(annotation_file.resolve()), config.exif)
        cache = open_image_cache(annotations.sizes.numpy(), *identity)
    return DetectionDataset(annotations, transform(config), config.exif, cache)
