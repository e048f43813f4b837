from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msdetr.data.collate import Collate
from msdetr.data.dataset import Sample
from msdetr.structures import Batch

BUCKETS = (4, 8, 16)


def sample(height: int, width: int, count: int, image_id: int = 0) -> Sample:
    return Sample(
        pixels=torch.randint(1, 256, (3, height, width), dtype=torch.uint8),
        labels=torch.arange(1, count + 1),
        boxes=torch.rand(count, 4) + 0.1,
        image_id=image_id,
        original_size=(2 * height, 3 * width),
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(0, 20)), min_size=1),
    st.sampled_from([1, 7, 32]),
)
def test_batches_hold_their_samples_and_zeros(shapes, multiple):
    samples = [sample(*shape, image_id=i) for i, shape in enumerate(shapes)]
    batch = Collate(multiple, BUCKETS)(samples)
    assert isinstance(batch, Batch)
    pixels, sizes = batch.images
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    for side, axis in ((2, 0), (3, 1)):
        largest = max(shape[axis] for shape in shapes)
        assert pixels.shape[side] % multiple == 0
        assert largest <= pixels.shape[side] < largest + multiple
    slots = batch.targets.labels.shape[1]
    for i, (height, width, count) in enumerate(shapes):
        assert sizes[i].tolist() == [height, width]
        assert torch.equal(pixels[i, :, :height, :width], samples[i].pixels)
        assert pixels[i].count_nonzero() == samples[i].pixels.numel()
        assert batch.targets.count[i] == count
        assert torch.equal(batch.targets.labels[i, :count], samples[i].labels)
        assert torch.equal(batch.targets.boxes[i, :count], samples[i].boxes)
        assert batch.targets.labels[i].count_nonzero() == count
        assert batch.targets.boxes[i].count_nonzero() == 4 * count
        assert batch.original_sizes[i].tolist() == [2 * height, 3 * width]
    assert batch.image_ids.tolist() == list(range(len(shapes)))
    assert torch.equal(batch.targets.mask.sum(dim=1), batch.targets.count)
    assert slots >= BUCKETS[0]


@pytest.mark.parametrize(
    ("counts", "slots"),
    [((0,), 4), ((0, 0), 4), ((4, 1), 4), ((5,), 8), ((16, 2), 16), ((17,), 32), ((33, 0), 48)],
)
def test_targets_are_padded_to_the_smallest_bucket(counts, slots):
    batch = Collate(1, BUCKETS)([sample(5, 6, count) for count in counts])
    assert batch.targets.labels.shape == (len(counts), slots)
    assert batch.targets.boxes.shape == (len(counts), slots, 4)


def test_types_do_not_depend_on_the_content():
    for samples in ([sample(5, 6, 0), sample(5, 6, 0)], [sample(7, 3, 2)]):
        batch = Collate(1, BUCKETS)(samples)
        assert batch.images.sizes.dtype == torch.int64
        assert batch.targets.labels.dtype == torch.int64
        assert batch.targets.boxes.dtype == torch.float32
        assert batch.targets.count.dtype == torch.int64
        assert batch.image_ids.dtype == torch.int64
        assert batch.original_sizes.dtype == torch.int64


def test_a_multiple_of_one_keeps_the_exact_size():
    batch = Collate(1, BUCKETS)([sample(31, 17, 1), sample(5, 23, 1)])
    assert batch.images.pixels.shape == (2, 3, 31, 23)


@pytest.mark.parametrize(
    ("size", "padded"),
    [((20, 30), (24, 32)), ((24, 32), (24, 32)), ((30, 20), (40, 24)), ((25, 25), (40, 40)),
     ((41, 7), (48, 8))],
)  # fmt: skip
def test_images_are_padded_to_the_first_bucket_that_holds_them(size, padded):
    collate = Collate(8, BUCKETS, ((24, 32), (40, 24), (40, 40)))
    pixels = collate([sample(*size, 1), sample(7, 7, 1)]).images.pixels
    assert pixels.shape == (2, 3, *padded)
    assert pixels.count_nonzero() == 3 * (size[0] * size[1] + 49)
