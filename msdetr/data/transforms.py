"""Augmentation in two steps: drawing a `Geometry`, and applying it.

Random resize, crop and resize again (DETR's recipe) amount to one window of the stored image and
one final size. Both are known before the image is decoded, so a sample costs one decode (at reduced
size where that is enough) and one resize.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from msdetr.config import DataConfig
from msdetr.data.images import DecodedImage

Size = tuple[int, int]
"""(height, width) in pixels."""


class Geometry(NamedTuple):
    """A window of the image, scaled to `size`, then perhaps mirrored left to right."""

    top: int
    """First row of the window, in pixels of the image."""
    left: int
    """First column."""
    height: int
    """Rows."""
    width: int
    """Columns."""
    size: Size
    """Size of the result."""
    flip: bool
    """Whether the result is mirrored."""

    @property
    def max_scale(self) -> int:
        """Largest factor by which the decoder may reduce the image without enlarging it later."""
        return max(1, min(self.height // self.size[0], self.width // self.size[1]))


class Augmentation(Protocol):
    """Draws the geometry of an image."""

    def __call__(self, image_size: Size, rng: np.random.Generator) -> Geometry:
        """The geometry for an image of `image_size`, drawn from `rng`."""

    def largest(self, image_size: Size) -> Size:
        """(height, width) that no result for an image of `image_size` exceeds."""


@dataclass(frozen=True, kw_only=True)
class EvaluationTransform:
    """The whole image, its shorter side scaled to `size`; nothing is random."""

    size: int
    """Shorter side."""
    max_size: int
    """Upper bound of the longer side."""

    def __call__(self, image_size: Size, rng: np.random.Generator) -> Geometry:
        """The geometry for an image of `image_size`; draws nothing from `rng`."""
        return Geometry(
            0, 0, *image_size, scaled_size(image_size, self.size, self.max_size), flip=False
        )

    def largest(self, image_size: Size) -> Size:
        """(height, width) of the result for an image of `image_size`."""
        return scaled_size(image_size, self.size, self.max_size)


@dataclass(frozen=True, kw_only=True)
class TrainingTransform:
    """DETR's augmentation: a flip half of the time, then a resize to one of `sizes`; with `crop`,
    half of the images are scaled and cropped before that."""

    sizes: tuple[int, ...]
    """Shorter sides of the result, one is drawn."""
    max_size: int
    """Upper bound of the longer side of the result."""
    crop: bool
    """Whether to crop at all."""
    crop_resize_sizes: tuple[int, ...]
    """Shorter sides that an image is scaled to before it is cropped, one is drawn."""
    crop_min_size: int
    """Smallest side of a crop of the scaled image (or the image's side, where that is smaller)."""
    crop_max_size: int
    """Largest side."""

    def __call__(self, image_size: Size, rng: np.random.Generator) -> Geometry:
        """Draws the geometry for an image of `image_size` from `rng`."""
        flip = bool(rng.random() < 0.5)
        if self.crop and rng.random() < 0.5:
            window, crop_size = self._draw_crop(image_size, rng)
        else:
            window, crop_size = (0, 0, *image_size), image_size
        size = scaled_size(crop_size, _draw(self.sizes, rng), self.max_size)
        return Geometry(*window, size, flip)

    def largest(self, image_size: Size) -> Size:
        """(height, width) that no result for an image of `image_size` exceeds."""
        ratios = [image_size[0] / image_size[1]]
        inverse = [image_size[1] / image_size[0]]
        if self.crop:
            for shorter_side in self.crop_resize_sizes:
                scaled = scaled_size(image_size, shorter_side)
                (low, high), (left, right) = (self._crop_range(side) for side in scaled)
                ratios.append(high / left)
                inverse.append(right / low)
        shorter_side = max(self.sizes)
        return (
            _longest_side(max(ratios), shorter_side, self.max_size),
            _longest_side(max(inverse), shorter_side, self.max_size),
        )

    def _draw_crop(
        self, image_size: Size, rng: np.random.Generator
    ) -> tuple[tuple[int, int, int, int], Size]:
        """A window (top, left, height, width) of the image, and its size when scaled."""
        scaled = scaled_size(image_size, _draw(self.crop_resize_sizes, rng))
        crop_size = self._draw_side(scaled[0], rng), self._draw_side(scaled[1], rng)
        top = int(rng.integers(scaled[0] - crop_size[0], endpoint=True))
        left = int(rng.integers(scaled[1] - crop_size[1], endpoint=True))
        # From scaled pixels back to those of the image.
        rows = _rescale(top, crop_size[0], scaled[0], image_size[0])
        columns = _rescale(left, crop_size[1], scaled[1], image_size[1])
        return (rows[0], columns[0], rows[1], columns[1]), crop_size

    def _draw_side(self, side: int, rng: np.random.Generator) -> int:
        low, high = self._crop_range(side)
        return int(rng.integers(low, high, endpoint=True))

    def _crop_range(self, side: int) -> tuple[int, int]:
        """Smallest and largest side of a crop of `side` pixels."""
        return min(self.crop_min_size, side), min(self.crop_max_size, side)


def training_transform(config: DataConfig) -> Augmentation:
    """The augmentation that `config.augmentation` names."""
    if config.augmentation == "none":
        return evaluation_transform(config)
    return TrainingTransform(
        sizes=config.train_sizes,
        max_size=config.max_size,
        crop=config.augmentation == "detr",
        crop_resize_sizes=config.crop_resize_sizes,
        crop_min_size=config.crop_min_size,
        crop_max_size=config.crop_max_size,
    )


def evaluation_transform(config: DataConfig) -> Augmentation:
    """Scaling to `test_size`, at most `max_size`."""
    return EvaluationTransform(size=config.test_size, max_size=config.max_size)


def scaled_size(image_size: Size, shorter_side: int, max_size: int | None = None) -> Size:
    """DETR's size rule: the shorter side becomes `shorter_side`, or less where the longer side
    would exceed `max_size`. The longer side is rounded down, at least 1."""
    height, width = image_size
    shorter, longer = min(image_size), max(image_size)
    if max_size is not None and longer / shorter * shorter_side > max_size:
        shorter_side = max(1, round(max_size * shorter / longer))
    if width < height:
        return int(shorter_side * height / width), shorter_side
    return shorter_side, int(shorter_side * width / height)


def _draw(values: tuple[int, ...], rng: np.random.Generator) -> int:
    """One of `values`, as `rng.choice` draws it, but without an array: five times faster."""
    return values[int(rng.integers(len(values)))]


def _longest_side(ratio: float, shorter_side: int, max_size: int) -> int:
    """Upper bound of a side that `scaled_size` gives for up to `shorter_side` pixels where the side
    is at most `ratio` times the other."""
    if ratio <= 1:
        return shorter_side
    # Where max_size acts, the shorter side is rounded: by up to half a pixel, or up to one.
    bounded = max(max_size + ratio / 2, ratio)
    return math.ceil(min(shorter_side * ratio, bounded))


def transform_pixels(decoded: DecodedImage, geometry: Geometry) -> Tensor:
    """Applies `geometry` to an image that was decoded with its `max_scale` or less.

    Returns:
        [3, *geometry.size] uint8, its memory in any order.
    """
    image, scale = decoded
    if scale == 1:
        return resize_window(np.asarray(image), geometry)
    # Pillow takes fractions of the decoded pixels as a window; whole ones would shift the picture
    # against its boxes.
    top, left, height, width = (side / scale for side in geometry[:4])
    box = (left, top, left + width, top + height)
    image = image.resize(geometry.size[::-1], Image.Resampling.BILINEAR, box=box)
    if geometry.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize_window(image: NDArray[np.uint8], geometry: Geometry) -> Tensor:
    """Applies `geometry` to the pixels [H, W, 3] of a whole image: antialiased bilinear.

    Returns:
        [3, *geometry.size] uint8, its memory in any order.
    """
    top, left, height, width = geometry[:4]
    # A copy in any case: torch wants memory that it may write to, and is faster on dense memory.
    window = np.array(image[top : top + height, left : left + width], order="C")
    # Channels last, which torchvision resizes with vector instructions, twice as fast as Pillow.
    pixels: Tensor = torch.from_numpy(window).permute(2, 0, 1)
    pixels = F.resize(pixels, list(geometry.size), antialias=True)
    return pixels.flip(-1) if geometry.flip else pixels


def transform_boxes(labels: Tensor, boxes: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Labels and boxes inside the window of `geometry`.

    Args:
        labels: [n] int64
        boxes: [n, 4] float32 (x0, y0, x1, y1) in pixels of the image.
        geometry: the same as for the pixels.

    Returns:
        the m labels whose box still has an area, and their boxes: (centre x, centre y, width,
        height) as fractions of the window, clipped to it.
    """
    top, left, height, width = geometry[:4]
    # NumPy: for a few boxes, torch's overhead per operation would dominate.
    origin = np.array((left, top) * 2, dtype=np.float32)
    extent = np.array((width, height) * 2, dtype=np.float32)
    first, last = np.split(((boxes.numpy() - origin) / extent).clip(0, 1), 2, axis=1)
    keep = (last > first).all(axis=1)
    first, last = first[keep], last[keep]
    fractions = np.concatenate((0.5 * (first + last), last - first), axis=1)
    if geometry.flip:
        fractions[:, 0] = 1 - fractions[:, 0]
    return torch.from_numpy(labels.numpy()[keep]), torch.from_numpy(fractions)


def _rescale(begin: int, length: int, scaled_side: int, side: int) -> tuple[int, int]:
    """(begin, length) of an interval of `scaled_side` pixels, in an image side of `side` pixels."""
    first = min(round(begin * side / scaled_side), side - 1)
    end = max(round((begin + length) * side / scaled_side), first + 1)
    return first, end - first
