"""Batches of the shapes that a run will meet, to compile for them before the first step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from msdetr.config import RunConfig
from msdetr.data.collate import Collate
from msdetr.data.dataset import DetectionDataset, Sample
from msdetr.data.loader import train_image_buckets
from msdetr.data.sampler import rank_batch_size
from msdetr.data.transforms import Size
from msdetr.engine.distributed import Worker
from msdetr.structures import Batch


def warm_up_batches(config: RunConfig, data: DetectionDataset, worker: Worker) -> Iterator[Batch]:
    """A micro-batch of black images for each shape of the run. All ranks call it."""
    collate = Collate(
        config.data.pad_multiple,
        config.data.target_buckets,
        train_image_buckets(config, data, world_size=worker.world_size),
    )
    if config.model.denoising == "none":
        # Two numbers of targets are enough: from the second on, graphs accept any.
        smallest, *larger = config.data.target_buckets
        shapes = [(size, smallest) for size in collate.image_buckets]
        shapes += [(size, slots) for size in collate.image_buckets[:1] for slots in larger[:1]]
    else:  # Each number of slots has denoising queries of its own.
        most = int(data.annotations.table.box_offsets.diff().max())
        all_slots = sorted({collate.target_slots(count) for count in range(most + 1)})
        shapes = list(itertools.product(collate.image_buckets, all_slots))
    for size, num_targets in shapes:
        yield _blank_batch(config, worker, collate, size, num_targets)


def _blank_batch(
    config: RunConfig, worker: Worker, collate: Collate, size: Size, num_targets: int
) -> Batch:
    sample = Sample(
        pixels=torch.zeros(3, *size, dtype=torch.uint8),
        labels=torch.zeros(num_targets, dtype=torch.int64),
        boxes=torch.full((num_targets, 4), 0.5),
        image_id=0,
        original_size=size,
    )
    count = rank_batch_size(
        config.train.batch_size,
        world_size=worker.world_size,
        accumulation_steps=config.train.accumulation_steps,
    )
    return collate([sample] * count)
