"""Sending batches from a loader process to the training process.

PyTorch sends every tensor in a shared memory file of its own, whose descriptor needs a new,
authenticated connection. Only the images are worth that. The rest of a batch is a few kilobytes and
goes through the pipe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from msdetr.data.dataset import Sample
from msdetr.structures import Batch, ImageBatch, Targets


@dataclass(frozen=True)
class CollateAndSend:
    """A `collate` function for a loader. Batches for another process are packed, and unpacked as
    they arrive there."""

    collate: Callable[[Sequence[Sample]], Batch]

    def __call__(self, samples: Sequence[Sample]) -> Batch | PackedBatch:
        """The batch of one or more samples."""
        batch = self.collate(samples)
        return batch if get_worker_info() is None else PackedBatch(batch)


@dataclass(frozen=True)
class PackedBatch:
    """A batch that is pickled as one tensor and a few arrays, and unpickled as a `Batch`."""

    batch: Batch

    def __reduce__(self) -> tuple[Any, ...]:
        images, targets, image_ids, original_sizes = self.batch
        small = (images.sizes, *targets, image_ids, original_sizes)
        return _unpack, (images.pixels, *(tensor.numpy() for tensor in small))


def _unpack(pixels: Tensor, *small: NDArray[np.generic]) -> Batch:
    sizes, labels, boxes, count, image_ids, original_sizes = map(torch.from_numpy, small)
    return Batch(
        ImageBatch(pixels, sizes), Targets(labels, boxes, count), image_ids, original_sizes
    )
