"""The images and boxes of one split as training and evaluation go through them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msdetr.annotations.checks import read_annotations
from msdetr.annotations.file_names import resolve_image_path
from msdetr.annotations.findings import CHECKS, refuse_errors
from msdetr.annotations.labels import LabelLayout, LabelMap
from msdetr.annotations.table import AnnotationTable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AnnotatedImages:
    """N images of an annotation table, and the M of its boxes that training uses."""

    table: AnnotationTable
    """The parsed annotation file."""
    image_folder: Path
    """Folder that file names are relative to."""
    label_map: LabelMap
    """Categories and their labels."""
    box_offsets: Tensor
    """[N + 1] int64, where each image's boxes begin; empty ranges are images without boxes."""
    boxes: Tensor
    """[M, 4] float32, (x0, y0, x1, y1) in pixels, inside the image, of positive size."""
    labels: Tensor
    """[M] int64"""

    @classmethod
    def from_table(
        cls, table: AnnotationTable, image_folder: Path, label_map: LabelMap
    ) -> AnnotatedImages:
        """The images of a table, each of whose categories is in the label map."""
        boxes, is_used = table.clipped_boxes()
        rows = np.searchsorted(label_map.category_ids, table.category_ids.numpy())
        labels = np.array(label_map.labels, np.int64)[rows][table.category_index.numpy()]
        num_boxes = np.bincount(table.image_index[is_used], minlength=len(table))
        return cls(
            table=table,
            image_folder=image_folder,
            label_map=label_map,
            box_offsets=torch.from_numpy(np.concatenate(([0], np.cumsum(num_boxes)))),
            boxes=torch.from_numpy(boxes[is_used]),
            labels=torch.from_numpy(labels[is_used]),
        )

    def __len__(self) -> int:
        return len(self.table)

    def file_name(self, index: int) -> str:
        """File name of image `index`, as in the annotation file."""
        return self.table.file_name(index)

    def image_path(self, index: int) -> Path:
        """Path of image `index`.

        Raises:
            ValueError: a symbolic link leads out of the image folder.
        """
        return resolve_image_path(self.image_folder, self.file_name(index))

    def image_id(self, index: int) -> int:
        """Id of image `index` in the annotation file."""
        return int(self.table.image_ids[index])

    def image_size(self, index: int) -> tuple[int, int]:
        """(height, width) of image `index`."""
        height, width = self.table.sizes.numpy()[index].tolist()
        return height, width

    def targets(self, index: int) -> tuple[Tensor, Tensor]:
        """Labels [n] int64 and boxes [n, 4] float32 of image `index`, in the order of the file.

        Both are views: do not write to them.
        """
        begin, end = self.box_offsets.numpy()[index : index + 2].tolist()
        return self.labels[begin:end], self.boxes[begin:end]


def load_annotated_images(
    splits: Sequence[tuple[Path, Path]],
    layout: LabelLayout = "auto",
    *,
    label_map: LabelMap | None = None,
) -> list[AnnotatedImages]:
    """Reads the annotations of splits that one model is trained or evaluated on.

    As in the published code, crowd annotations are left out, boxes are clipped to their image,
    boxes that then have no width or no height are left out, and images without boxes are kept.

    Args:
        splits: (image folder, annotation file) pairs; the folders are not looked into. The first
            file decides about the labels.
        layout: how category ids become labels, see `LabelMap.from_categories`.
        label_map: labels of a model to use instead; the categories of all files must be in it.

    Raises:
        ValueError: a file cannot be read, or there are findings of severity `error`. The message
            covers all files.
    """
    results = read_annotations([file for _, file in splits], layout, label_map=label_map)
    refuse_errors([(result.table.source, result.findings) for result in results])
    for table, _, findings in results:
        for code, count in Counter(finding.code for finding in findings).items():
            advice = f"{CHECKS[code].cure}; `msdetr doctor` lists them"
            logger.warning("%s: %d of %s, %s", table.source, count, code, advice)
    annotated = []
    for (folder, _), (table, labels, _) in zip(splits, results, strict=True):
        assert labels is not None  # else there were errors
        annotated.append(AnnotatedImages.from_table(table, folder, labels))
    return annotated
