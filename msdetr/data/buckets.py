"""Image buckets: the few padded shapes that the batches of a run have.

Compiled code and captured graphs serve one shape each, and padding to a multiple of 64 leaves about
170 shapes on COCO. A bucket is a padded (height, width). A batch is padded to the smallest bucket
that holds it. Buckets are chosen for the data set, its augmentation and the batch size: batches
are simulated, and the choice minimises their padded area, first greedily, then by exchanging one
bucket at a time (the p-median problem; Teitz and Bart, Operations Research 16(5), 1968).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from msdetr.data.transforms import Augmentation, Size

_NUM_SAMPLES = 8192
_NUM_BATCHES = 16384
# Lines of the grid that buckets are chosen from, per axis. Finer multiples than give this many are
# thinned, as the time grows with the fourth power.
_MAX_LINES = 32


def choose_image_buckets(
    image_sizes: NDArray[np.int64],
    transform: Augmentation,
    *,
    num_buckets: int,
    batch_size: int,
    multiple: int,
) -> tuple[Size, ...]:
    """The padded shapes for batches of a data set.

    The result depends on the arguments alone, so that it is equal in all processes of a run.

    Args:
        image_sizes: [N, 2], (height, width) of the stored images in pixels.
        transform: the augmentation.
        num_buckets: maximum number of shapes.
        batch_size: maximum number of images in a batch.
        multiple: all sides are multiples of this.

    Returns:
        (height, width) in pixels by ascending area; the last one holds every batch. Empty for a set
        without images.
    """
    if not len(image_sizes):
        return ()
    unique_sizes, counts = _unique_rows(image_sizes)
    samples = _simulate_samples(unique_sizes, counts, transform)
    shapes, weights = simulate_batches(samples, batch_size, multiple)
    largest = np.array([transform.largest(_size(row)) for row in unique_sizes]).max(axis=0)
    last = np.maximum(round_up(largest, multiple), shapes.max(axis=0))
    chosen = _minimise_area(shapes, weights, last, num_buckets)
    return tuple(sorted({_size(row) for row in chosen}, key=lambda size: (size[0] * size[1], size)))


def smallest_bucket(buckets: Sequence[Size], size: Size) -> Size | None:
    """The first of the buckets, ascending by area, that holds `size`; None if none does."""
    for bucket in buckets:
        if size[0] <= bucket[0] and size[1] <= bucket[1]:
            return bucket
    return None


def simulate_batches(
    sample_sizes: NDArray[np.int64], batch_size: int, multiple: int, *, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Shapes [S, 2] of batches of random samples, padded to `multiple`, and their counts.

    Args:
        sample_sizes: [N, 2], (height, width) of augmented samples in pixels.
        batch_size: samples per batch.
        multiple: of both sides.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    drawn = sample_sizes[rng.integers(len(sample_sizes), size=(_NUM_BATCHES, batch_size))]
    return _unique_rows(round_up(drawn.max(axis=1), multiple))


def round_up(values: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    """The smallest multiples of `multiple` that are not below `values`."""
    return -(-values // multiple) * multiple


def _simulate_samples(
    unique_sizes: NDArray[np.int64], counts: NDArray[np.int64], transform: Augmentation
) -> NDArray[np.int64]:
    """Sizes [_NUM_SAMPLES, 2] of augmented samples."""
    rng = np.random.default_rng(0)
    # Evenly through the sizes instead of at random: small sets are then exactly represented.
    ranks = (np.arange(_NUM_SAMPLES) + 0.5) / _NUM_SAMPLES * counts.sum()
    images = unique_sizes[np.searchsorted(np.cumsum(counts), ranks, side="right")]
    return np.array([transform(_size(row), rng).size for row in images], dtype=np.int64)


def _minimise_area(
    shapes: NDArray[np.int64], weights: NDArray[np.int64], last: NDArray[np.int64], num_buckets: int
) -> NDArray[np.int64]:
    """At most `num_buckets` shapes, `last` among them, of minimum total area when each of `shapes`
    [S, 2], `weights` [S] times, takes the smallest that holds it."""
    heights, widths = (_lines(shapes[:, axis]) for axis in (0, 1))
    # A best bucket is as high as one of the shapes in it, and as wide as one.
    candidates = np.stack(np.meshgrid(heights, widths, indexing="ij"), axis=-1).reshape(-1, 2)
    candidates = np.concatenate((last[None], candidates))
    # Shapes between two lines need the bucket of the upper one.
    rows, columns = np.searchsorted(heights, shapes[:, 0]), np.searchsorted(widths, shapes[:, 1])
    weights = np.bincount(rows * len(widths) + columns, weights).astype(np.int64)
    cells = np.flatnonzero(weights)
    weights, shapes = weights[cells], candidates[cells + 1]
    holds = (shapes <= candidates[:, None]).all(axis=2)
    # [candidate, shape]: area that the shape has in the candidate. Integers: the choice is exact.
    area = np.where(holds, candidates.prod(axis=1)[:, None], last.prod())

    chosen = [0]
    while len(chosen) < num_buckets:
        before = area[chosen].min(axis=0)
        best, total = _best_addition(area, before, weights)
        if total == before @ weights:
            break
        chosen.append(best)
    improved = True
    while improved:
        improved = False
        for place in range(1, len(chosen)):
            others = chosen[:place] + chosen[place + 1 :]
            best, total = _best_addition(area, area[others].min(axis=0), weights)
            if total < area[chosen].min(axis=0) @ weights:
                chosen[place] = best
                improved = True
    return candidates[chosen]


def _best_addition(
    area: NDArray[np.int64], current: NDArray[np.int64], weights: NDArray[np.int64]
) -> tuple[int, int]:
    """The candidate that gives the smallest total area, and that total."""
    totals = np.minimum(area, current) @ weights
    best = int(totals.argmin())
    return best, int(totals[best])


def _lines(sides: NDArray[np.int64]) -> NDArray[np.int64]:
    """The different values of `sides`, thinned to `_MAX_LINES`, the largest always among them."""
    values = np.unique(sides)
    if len(values) <= _MAX_LINES:
        return values
    return values[np.linspace(0, len(values) - 1, _MAX_LINES).round().astype(np.int64)]


def _unique_rows(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The different rows of [N, 2], ascending, and their counts."""
    # One number per row: sorting those is many times faster than sorting rows.
    codes, counts = np.unique(rows[:, 0] << 32 | rows[:, 1], return_counts=True)
    return np.stack((codes >> 32, codes & 0xFFFFFFFF), axis=1), counts


def _size(row: NDArray[np.int64]) -> Size:
    return int(row[0]), int(row[1])
