"""Samples: one image decoded and augmented, with its targets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from msdetr.annotations.labels import LabelMap
from msdetr.config import DataConfig
from msdetr.data.annotated_images import AnnotatedImages, load_annotated_images
from msdetr.data.buckets import choose_image_buckets
from msdetr.data.cache import ImageCache, open_image_cache
from msdetr.data.images import ExifPolicy, decode_image
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
        transform: draws the geometry for an image of a given size.
        exif: whether photographs are turned as their EXIF tag says.
        cache: keeps decoded images; samples are the same with and without one.
    """

    def __init__(
        self,
        annotations: AnnotatedImages,
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

    def image_buckets(self, config: DataConfig, batch_size: int) -> tuple[Size, ...]:
        """Padded shapes for batches of this set, see `choose_image_buckets`; computed once.

        Empty without `config.num_image_buckets`.
        """
        if not config.num_image_buckets:
            return ()
        key = (config.num_image_buckets, batch_size, config.pad_multiple)
        if key not in self._image_buckets:
            buckets = choose_image_buckets(
                self.annotations.table.sizes.numpy(),
                self.transform,
                num_buckets=config.num_image_buckets,
                batch_size=batch_size,
                multiple=config.pad_multiple,
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


def build_datasets(
    config: DataConfig, splits: Sequence[Split], *, label_map: LabelMap | None = None
) -> dict[Split, DetectionDataset]:
    """Training sets with augmentation, validation sets without.

    Args:
        config: where the data are and how they are augmented.
        splits: which sets; the first decides about the labels.
        label_map: labels of a model to use instead.

    Raises:
        ValueError: a path is missing, the annotations of any split have errors, or the images do
            not fit into memory for `config.cache`.
    """
    paths = [resolve_split(config, split) for split in splits]
    annotated = load_annotated_images(paths, config.label_layout, label_map=label_map)
    datasets = {}
    for split, images in zip(splits, annotated, strict=True):
        transform = training_transform if split == "train" else evaluation_transform
        cache = None
        if config.cache == "memory":
            folder, file = images.image_folder.resolve(), images.table.source.resolve()
            identity = (split, str(folder), str(file), config.exif)
            cache = open_image_cache(images.table.sizes.numpy(), *identity)
        datasets[split] = DetectionDataset(images, transform(config), config.exif, cache)
    return datasets


def build_dataset(
    config: DataConfig, split: Split, *, label_map: LabelMap | None = None
) -> DetectionDataset:
    """One set, see `build_datasets`."""
    return build_datasets(config, (split,), label_map=label_map)[split]
