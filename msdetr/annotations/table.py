"""The annotations of one split as flat arrays, whatever format they were read from.

COCO's training set has 118 thousand images and 860 thousand boxes. As lists of dicts they take
gigabytes, and every worker process ends up with its own copy because reading a Python object
writes its reference count. Here they are a few tensors. Worker processes share them, whether they
are forked (memory pages that nobody writes) or spawned (PyTorch passes tensors by shared memory).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class AnnotationTable:
    """N images, K categories and M annotated boxes.

    Images and categories ascend by id. Boxes are grouped by image, in the order of the file within
    an image, and refer to images and categories by position.
    """

    source: Path
    """The annotation file."""
    image_ids: Tensor
    """[N] int64, strictly ascending."""
    sizes: Tensor
    """[N, 2] int64, (height, width) in pixels, as the annotation file says."""
    file_name_bytes: Tensor
    """[*] uint8, all file names in UTF-8, one after the other."""
    file_name_offsets: Tensor
    """[N + 1] int64, where each name begins."""
    category_ids: Tensor
    """[K] int64, strictly ascending."""
    category_names: tuple[str, ...]
    """K names."""
    box_offsets: Tensor
    """[N + 1] int64, where each image's boxes begin; empty ranges are images without boxes."""
    annotation_ids: Tensor
    """[M] int64"""
    category_index: Tensor
    """[M] int64, into `category_ids`."""
    boxes: Tensor
    """[M, 4] float64, (x, y, width, height) in pixels, as in the file."""
    areas: Tensor
    """[M] float64, annotated area in square pixels, width * height where the file has none."""
    is_crowd: Tensor
    """[M] bool"""

    @classmethod
    def build(
        cls,
        source: Path,
        *,
        image_ids: Ints,
        sizes: Ints,
        file_names: Sequence[str],
        categories: dict[int, str],
        box_image_ids: Ints,
        box_category_ids: Ints,
        **box_columns: NDArray[np.generic],
    ) -> AnnotationTable:
        """Sorts the columns of a file into a table.

        Args:
            source: the annotation file.
            image_ids: [N], unique, in any order; `sizes` and `file_names` belong to them.
            sizes: [N, 2]
            file_names: N
            categories: names by category id.
            box_image_ids: [M], all among `image_ids`.
            box_category_ids: [M], all among `categories`.
            box_columns: the fields of the table with one row per box.
        """
        order = np.argsort(image_ids)
        image_ids = image_ids[order]
        # Surrogates that encode no character are reported elsewhere; the table must hold them.
        names = [file_names[row].encode(errors="surrogatepass") for row in order]
        image_index = np.searchsorted(image_ids, box_image_ids)
        category_ids = np.array(sorted(categories), np.int64)
        box_columns["category_index"] = np.searchsorted(category_ids, box_category_ids)
        box_order = np.argsort(image_index, kind="stable")
        arrays = {
            "image_ids": image_ids,
            "sizes": sizes[order],
            "file_name_bytes": np.frombuffer(bytearray(b"".join(names)), np.uint8),
            "file_name_offsets": _offsets([len(name) for name in names]),
            "category_ids": category_ids,
            "box_offsets": _offsets(np.bincount(image_index, minlength=len(image_ids))),
            **{name: column[box_order] for name, column in box_columns.items()},
        }
        return cls(
            source=source,
            category_names=tuple(categories[key] for key in category_ids.tolist()),
            **{name: torch.from_numpy(array) for name, array in arrays.items()},
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def image_index(self) -> Ints:
        """[M], the image of each box, into `image_ids`."""
        return np.repeat(np.arange(len(self)), np.diff(self.box_offsets.numpy()))

    @property
    def categories(self) -> dict[int, str]:
        """Names by category id, ascending."""
        return dict(zip(self.category_ids.tolist(), self.category_names, strict=True))

    def file_name(self, index: int) -> str:
        """File name of image `index`, as in the annotation file."""
        begin, end = self.file_name_offsets.numpy()[index : index + 2].tolist()
        return bytes(self.file_name_bytes.numpy()[begin:end]).decode(errors="surrogatepass")

    def clipped_boxes(self) -> tuple[NDArray[np.float32], Bools]:
        """Boxes for training, as in the published code.

        Returns:
            Boxes [M, 4] float32 (x0, y0, x1, y1) in pixels, clipped to their image; and [M], True
            where a box has an area and is no crowd. Training leaves out the others.
        """
        limits = self.sizes.numpy()[self.image_index, ::-1].astype(np.float32)
        # The same float32 arithmetic as published: corners first, then the clipping.
        boxes = self.boxes.numpy().astype(np.float32)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, :2] = np.clip(boxes[:, :2], 0, limits)
        boxes[:, 2:] = np.clip(boxes[:, 2:], 0, limits)
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        return boxes, has_area & ~self.is_crowd.numpy()


def _offsets(counts: ArrayLike) -> Ints:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)))
