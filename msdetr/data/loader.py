"""Loaders: batches of this rank, in worker processes, from any step on."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from msdetr.config import RunConfig
from msdetr.data.collate import Collate
from msdetr.data.dataset import DetectionDataset, Sample
from msdetr.data.sampler import (
    epoch_permutation,
    evaluation_indices,
    rank_batch_size,
    sample_generator,
    step_positions,
)
from msdetr.data.sampler import (
    steps_per_epoch as steps_per_epoch,
)
from msdetr.data.transfer import CollateAndSend
from msdetr.data.transforms import Size
from msdetr.structures import Batch


class EpochSamples(Dataset[Sample]):
    """The samples of one epoch by their position in its order.

    A sample depends on (seed, epoch, position) alone, not on the process that computes it or on
    earlier samples.
    """

    def __init__(self, dataset: DetectionDataset, *, seed: int, epoch: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = epoch
        self._order = epoch_permutation(seed, epoch, len(dataset))

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position; positions go round in sets smaller than a batch."""
        index = int(self._order[position % len(self._order)])
        return self.dataset.sample(index, sample_generator(self.seed, self.epoch, position))


def build_train_loader(
    config: RunConfig,
    dataset: DetectionDataset,
    *,
    epoch: int,
    first_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Batch]:
    """The micro-batches of one epoch for one rank, `train.accumulation_steps` per step.

    A step has the same images, in the same order, whatever the number of its micro-batches.

    Args:
        config: uses `seed`, `data`, `train.batch_size` (over all ranks and micro-batches) and
            `train.accumulation_steps`.
        dataset: the training set.
        epoch: from 0.
        first_step: step of the epoch to start with; the steps before it are not loaded.
        rank: this process.
        world_size: number of processes.

    Raises:
        ValueError: the set is empty, or the batch size is not divisible by `world_size` times
            `train.accumulation_steps`.
    """
    batch_size, num_parts = config.train.batch_size, config.train.accumulation_steps
    share = rank_batch_size(batch_size, world_size=world_size, accumulation_steps=num_parts)
    steps = range(first_step, steps_per_epoch(len(dataset), batch_size))
    samples = EpochSamples(dataset, seed=config.seed, epoch=epoch)
    positions = []
    for step in steps:
        own = step_positions(step, batch_size=batch_size, rank=rank, world_size=world_size)
        positions += [list(own[begin : begin + share]) for begin in range(0, len(own), share)]
    buckets = train_image_buckets(config, dataset, world_size=world_size)
    return _loader(config, samples, positions, buckets)


def build_eval_loader(
    config: RunConfig, dataset: DetectionDataset, *, rank: int = 0, world_size: int = 1
) -> DataLoader[Batch]:
    """This rank's share of the images, in batches of `config.eval.batch_size` or less.

    Over all ranks, every image comes exactly once. Ranks may have different numbers of batches,
    also none.
    """
    indices = list(evaluation_indices(len(dataset), rank=rank, world_size=world_size))
    size = config.eval.batch_size
    batches = [indices[begin : begin + size] for begin in range(0, len(indices), size)]
    return _loader(config, dataset, batches, eval_image_buckets(config, dataset))


def train_image_buckets(
    config: RunConfig, dataset: DetectionDataset, *, world_size: int = 1
) -> tuple[Size, ...]:
    """(height, width) of all batches of `build_train_loader`, ascending by area.

    Equal on all ranks. Empty without `data.num_image_buckets`. Together with `data.target_buckets`
    these are all shapes of training, except for images with more targets than the largest of those.
    """
    train = config.train
    share = rank_batch_size(
        train.batch_size, world_size=world_size, accumulation_steps=train.accumulation_steps
    )
    return dataset.image_buckets(config.data, share)


def eval_image_buckets(config: RunConfig, dataset: DetectionDataset) -> tuple[Size, ...]:
    """(height, width) of all batches of `build_eval_loader`, as `train_image_buckets`."""
    return dataset.image_buckets(config.data, config.eval.batch_size)


def _loader(
    config: RunConfig,
    dataset: Dataset[Sample],
    batches: list[list[int]],
    image_buckets: tuple[Size, ...],
) -> DataLoader[Batch]:
    # DataLoader draws a seed for its workers, which is unused here. A generator of its own keeps it
    # from advancing the global one. PyTorch gives each worker one thread.
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=min(config.data.num_workers, len(batches)),
        collate_fn=CollateAndSend(
            Collate(config.data.pad_multiple, config.data.target_buckets, image_buckets)
        ),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),
    )
    return loader
