"""The share of padding in batches: `python -m benchmarks.loader buckets --annotations FILE ...`.

Samples are drawn from the image sizes of COCO annotation files (the images are not needed) with the
recipe's augmentation, and put into batches. A batch is padded to its maximum sides (`exact`), to a
multiple (`multiple`), or to one of a few buckets (`buckets`). `padded_share` is padding over all
pixels; `relative_area` is the pixels of all batches over those of `multiple` 64 in random order.

Orders of the samples: `random`, as in training; `area` sorts windows of 64 batches by aspect and
then size, before they are split into batches. The loader does not sort, as that would change which
images meet in a batch.

The measured draws differ from those that the buckets were chosen for. The last rows show the cost
of the target buckets: slots per image and the share of empty ones, for all boxes of the images
(crops remove some).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.cli import require_at_least
from benchmarks.common import Row, environment, print_table, write_rows
from msdetr.cli.options import parse_options, user_errors
from msdetr.config import DataConfig
from msdetr.data.annotated_images import load_annotated_images
from msdetr.data.buckets import choose_image_buckets, round_up, smallest_bucket
from msdetr.data.transforms import Augmentation, Size, evaluation_transform, training_transform

Order = Literal["random", "area"]

_REFERENCE_MULTIPLE = 64
_WINDOW = 64
_COLUMNS = {
    "image_buckets": "split batch order rule multiple buckets shapes padded_share:.3f "
    "relative_area:.3f seconds:.2f",
    "target_buckets": "batch shapes mean_targets:.1f mean_slots:.1f padded_share:.3f",
}
"""Columns of the printed tables, by benchmark."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the share of padding for a data set's image sizes."""

    annotations: tuple[Path, ...]
    """COCO annotation files; their images count together."""
    batches: tuple[int, ...] = (2, 8)
    """Images per batch."""
    multiples: tuple[int, ...] = (32, 64)
    """Sides are multiples of these."""
    buckets: tuple[int, ...] = (4, 8, 16, 24, 32, 48)
    """Numbers of image buckets."""
    num_batches: int = 8192
    """Batches to measure on."""
    output: Path | None = None
    """JSON file for the rows."""

    def __post_init__(self) -> None:
        if not self.annotations:
            raise ValueError("annotations: give at least one file")
        require_at_least(self, 1, "batches", "multiples", "buckets", "num_batches")


def draw_batches(
    image_sizes: NDArray[np.int64], transform: Augmentation, batch: int, count: int, order: Order
) -> NDArray[np.int64]:
    """Sizes [count, batch, 2] of augmented samples, in batches."""
    rng = np.random.default_rng(1)
    images = image_sizes[rng.integers(len(image_sizes), size=count * batch)]
    sizes = np.array([transform((int(h), int(w)), rng).size for h, w in images], dtype=np.int64)
    if order != "random":
        aspect, area = sizes[:, 0] / sizes[:, 1], sizes.prod(axis=1)
        window = np.arange(len(sizes)) // (_WINDOW * batch)
        # Classes of aspect are wide, so that the size matters.
        sizes = sizes[np.lexsort((area, np.log2(aspect).round(1), window))]
    return sizes.reshape(count, batch, 2)


def padded_shapes(
    sizes: NDArray[np.int64], multiple: int, buckets: Sequence[Size]
) -> NDArray[np.int64]:
    """Shape [count, 2] that `Collate` pads each batch of `draw_batches` to."""
    largest = sizes.max(axis=1)
    if not buckets:
        return round_up(largest, multiple)
    return np.array([smallest_bucket(buckets, (int(h), int(w))) for h, w in largest])


def measure(options: Options) -> list[Row]:
    """A row per rule.

    Raises:
        ValueError: an annotation file is missing or broken.
    """
    sets = [load_annotated_images([(file.parent, file)])[0] for file in options.annotations]
    image_sizes = np.concatenate([images.table.sizes.numpy() for images in sets])
    rows: list[Row] = []
    for split, make in (("train", training_transform), ("val", evaluation_transform)):
        for batch in options.batches:
            rows += _measure_split(image_sizes, make(DataConfig()), batch, options, split)
    counts = np.concatenate([np.diff(images.box_offsets.numpy()) for images in sets])
    rows += [_measure_targets(counts, batch, options) for batch in options.batches]
    where = {
        "data": ", ".join(file.name for file in options.annotations),
        "images": len(image_sizes),
        **environment(torch.device("cpu")),
    }
    return [{**row, **where} for row in rows]


def _measure_split(
    image_sizes: NDArray[np.int64],
    transform: Augmentation,
    batch: int,
    options: Options,
    split: str,
) -> Iterator[Row]:
    orders: tuple[Order, ...] = ("random", "area")
    draws = {
        order: draw_batches(image_sizes, transform, batch, options.num_batches, order)
        for order in orders
    }
    reference = padded_shapes(draws["random"], _REFERENCE_MULTIPLE, ()).prod(axis=1).sum()
    rules: list[tuple[str, int, int | None]] = [("exact", 1, None)]
    rules += [("multiple", multiple, None) for multiple in options.multiples]
    rules += [("buckets", multiple, n) for multiple in options.multiples for n in options.buckets]
    for order, (rule, multiple, number) in itertools.product(orders, rules):
        if order != "random" and number is not None:
            continue
        buckets: tuple[Size, ...] = ()
        sizes, begin = draws[order], time.perf_counter()
        if number is not None:
            buckets = choose_image_buckets(
                image_sizes, transform, num_buckets=number, batch_size=batch, multiple=multiple
            )
        seconds = time.perf_counter() - begin
        shapes = padded_shapes(sizes, multiple, buckets)
        area = shapes.prod(axis=1).sum()
        yield {
            "benchmark": "image_buckets",
            "split": split,
            "batch": batch,
            "order": order,
            "rule": rule,
            "multiple": multiple,
            "buckets": number,
            "shapes": len(np.unique(shapes, axis=0)),
            "padded_share": float(1 - sizes.prod(axis=2).sum() / (area * batch)),
            "relative_area": float(area / reference),
            "seconds": seconds if number is not None else None,
            "num_batches": options.num_batches,
        }


def _measure_targets(counts: NDArray[np.int64], batch: int, options: Options) -> Row:
    """Slots of batches, for the number of boxes [N] of each image."""
    rng = np.random.default_rng(1)
    drawn = counts[rng.integers(len(counts), size=(options.num_batches, batch))]
    buckets = np.array(DataConfig().target_buckets)
    slots = buckets[np.searchsorted(buckets, drawn.max(axis=1))]
    return {
        "benchmark": "target_buckets",
        "batch": batch,
        "shapes": len(np.unique(slots)),
        "mean_targets": float(drawn.mean()),
        "mean_slots": float(slots.mean()),
        "padded_share": float(1 - drawn.mean() / slots.mean()),
        "num_batches": options.num_batches,
    }


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; the exit status."""
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.loader buckets")
        rows = measure(options)
        if options.output is not None:
            write_rows(options.output, rows)
    for benchmark, columns in _COLUMNS.items():
        print_table([row for row in rows if row["benchmark"] == benchmark], columns)
    return 0
