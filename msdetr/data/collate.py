"""Samples to batches of padded tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from msdetr.data.buckets import smallest_bucket
from msdetr.data.dataset import Sample
from msdetr.data.transforms import Size
from msdetr.structures import Batch, ImageBatch, Targets


@dataclass(frozen=True)
class Collate:
    """Puts samples into a `Batch`: few tensors, of few different shapes.

    Images are padded right and bottom with 0 to the first of `image_buckets` that holds the batch;
    without buckets, or where none holds it, to a multiple of `pad_multiple` (1: to the largest
    image of the batch). Targets are padded to the smallest of the ascending `target_buckets` that
    holds the batch, beyond the last to a multiple of it.
    """

    pad_multiple: int
    target_buckets: tuple[int, ...]
    image_buckets: tuple[Size, ...] = ()
    """(height, width), ascending by area."""

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch of one or more samples."""
        return Batch(
            images=self._images([sample.pixels for sample in samples]),
            targets=self._targets(samples),
            image_ids=torch.tensor([sample.image_id for sample in samples]),
            original_sizes=torch.tensor([sample.original_size for sample in samples]),
        )

    def _images(self, images: list[Tensor]) -> ImageBatch:
        sizes = [tuple(image.shape[1:]) for image in images]
        pixels = _empty_images(len(images), 3, *self._padded_size(sizes))
        for row, image in zip(pixels, images, strict=True):
            _, bottom, right = image.shape
            row[:, :bottom, :right] = image
            row[:, bottom:] = 0
            row[:, :bottom, right:] = 0
        return ImageBatch(pixels, torch.tensor(sizes))

    def _padded_size(self, sizes: list[tuple[int, ...]]) -> Size:
        height, width = map(max, zip(*sizes, strict=True))
        return smallest_bucket(self.image_buckets, (height, width)) or (
            _round_up(height, self.pad_multiple),
            _round_up(width, self.pad_multiple),
        )

    def _targets(self, samples: Sequence[Sample]) -> Targets:
        count = torch.tensor([len(sample.labels) for sample in samples])
        slots = self.target_slots(int(count.max()))
        labels = torch.zeros(len(samples), slots, dtype=torch.int64)
        boxes = torch.zeros(len(samples), slots, 4)
        for i, sample in enumerate(samples):
            labels[i, : len(sample.labels)] = sample.labels
            boxes[i, : len(sample.labels)] = sample.boxes
        return Targets(labels, boxes, count)

    def target_slots(self, count: int) -> int:
        """Slots per image of a batch with at most `count` targets per image."""
        for bucket in self.target_buckets:
            if count <= bucket:
                return bucket
        return _round_up(count, self.target_buckets[-1])


def _empty_images(*shape: int) -> Tensor:
    """Uninitialised uint8 images; in a loader process already in the memory that it shares with the
    training process, which would otherwise cost a copy of the batch."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
