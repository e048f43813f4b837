from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msdetr.data.sampler import (
    epoch_permutation,
    evaluation_indices,
    sample_generator,
    step_positions,
    steps_per_epoch,
)


def epoch_indices(num_images, batch_size, world_size, *, seed=1, epoch=0) -> np.ndarray:
    """[steps, batch_size], the ranks' shares side by side."""
    order = epoch_permutation(seed, epoch, num_images)
    positions = [
        [
            position
            for rank in range(world_size)
            for position in step_positions(
                step, batch_size=batch_size, rank=rank, world_size=world_size
            )
        ]
        for step in range(steps_per_epoch(num_images, batch_size))
    ]
    return np.take(order, positions, mode="wrap")  # as `EpochSamples` does


@settings(max_examples=60, deadline=None)
@given(
    num_images=st.integers(1, 60),
    world_size=st.integers(1, 5),
    share=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
)
def test_an_epoch(num_images, world_size, share, seed, epoch):
    batch_size = world_size * share
    indices = epoch_indices(num_images, batch_size, world_size, seed=seed, epoch=epoch)
    # The same images in the same places, whatever the number of ranks.
    alone = epoch_indices(num_images, batch_size, 1, seed=seed, epoch=epoch)
    np.testing.assert_array_equal(indices, alone)
    counts = np.bincount(indices.ravel(), minlength=num_images)
    assert len(counts) == num_images
    if num_images >= batch_size:
        assert counts.max() == 1
        assert counts.sum() == num_images // batch_size * batch_size
    else:
        assert len(indices) == 1
        assert counts.max() - counts.min() <= 1  # evenly round and round


def test_orders_differ_between_epochs_and_seeds():
    orders = [epoch_permutation(seed, epoch, 50) for seed in range(3) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(50))
    assert len({tuple(order) for order in orders}) == 9
    assert tuple(orders[0]) != tuple(range(50))


def test_the_order_never_changes():
    # A run that is resumed with a later version must see the same images.
    assert epoch_permutation(42, 0, 8).tolist() == [1, 6, 5, 4, 2, 0, 3, 7]
    assert sample_generator(42, 3, 7).integers(0, 1000, 4).tolist() == [890, 288, 82, 284]


def test_streams_are_distinct():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 2**33, 0), (2**33, 0, 0)]
    draws = {tuple(sample_generator(*key).integers(0, 2**31, 4)) for key in keys}
    draws.add(tuple(np.random.default_rng(np.random.SeedSequence((1, 0, 0))).integers(0, 2**31, 4)))
    assert len(draws) == len(keys) + 1


def test_batch_size_must_be_divisible():
    with pytest.raises(ValueError, match=r"batch_size \(10\) .* must be divisible by 4"):
        step_positions(0, batch_size=10, rank=0, world_size=4)


@pytest.mark.parametrize("rank", [-1, 2])
def test_rank_must_exist(rank):
    with pytest.raises(ValueError, match="of 2"):
        step_positions(0, batch_size=10, rank=rank, world_size=2)


def test_steps_per_epoch():
    assert [steps_per_epoch(n, 4) for n in (1, 3, 4, 7, 8, 9)] == [1, 1, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="no images"):
        steps_per_epoch(0, 4)


@given(st.integers(0, 40), st.integers(1, 7))
def test_evaluation_takes_every_image_once(num_images, world_size):
    shares = [
        evaluation_indices(num_images, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert sorted(index for share in shares for index in share) == list(range(num_images))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
