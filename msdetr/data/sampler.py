"""The images of a step: a stateless function of (seed, epoch, step, rank, world size).

Every epoch orders the images anew. A step takes the next `batch_size` positions of that order, and
each rank an equal share of them, so the images of a step do not depend on the number of ranks.
Positions after the last whole batch are dropped. A set smaller than one batch is repeated until the
batch is full.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Tags of random streams. SeedSequence pads keys with zeros: without tags, the order of an epoch and
# the sample at its position 0 would draw the same numbers.
_ORDER, _SAMPLE = 1, 2


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Whole batches in an epoch, at least one.

    Raises:
        ValueError: there are no images.
    """
    if num_images < 1:
        raise ValueError("the training set has no images")
    return max(1, num_images // batch_size)


def epoch_permutation(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    """The order of the images in an epoch, [num_images]."""
    return _generator(_ORDER, seed, epoch).permutation(num_images)


def sample_generator(seed: int, epoch: int, position: int) -> np.random.Generator:
    """The random numbers of the sample at a position of an epoch."""
    return _generator(_SAMPLE, seed, epoch, position)


def rank_batch_size(batch_size: int, *, world_size: int, accumulation_steps: int = 1) -> int:
    """Images of one micro-batch of one rank, for `batch_size` images over all of them.

    Raises:
        ValueError: `batch_size` is not divisible by `world_size * accumulation_steps`.
    """
    parts = world_size * accumulation_steps
    if batch_size % parts:
        micro = f" x {accumulation_steps} micro-batches" if accumulation_steps > 1 else ""
        raise ValueError(
            f"train.batch_size ({batch_size}) is the number of images of a step over all processes "
            f"and micro-batches: it must be divisible by {parts} ({world_size} processes{micro})"
        )
    return batch_size // parts


def step_positions(step: int, *, batch_size: int, rank: int, world_size: int) -> range:
    """Positions in the epoch's order that a rank takes at a step of the epoch.

    Args:
        step: from 0.
        batch_size: images per step over all ranks.
        rank: in [0, world_size).
        world_size: number of ranks.

    Raises:
        ValueError: `batch_size` is not divisible by `world_size`, or `rank` is out of range.
    """
    share = rank_batch_size(batch_size, world_size=world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    begin = step * batch_size + rank * share
    return range(begin, begin + share)


def evaluation_indices(num_images: int, *, rank: int, world_size: int) -> range:
    """Indices of the images that a rank evaluates: every image is in exactly one rank's range,
    which may be empty."""
    return range(rank, num_images, world_size)


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(key))
