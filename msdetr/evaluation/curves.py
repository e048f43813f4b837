"""Precision and recall of detections by the rules of COCO, as hotcoco computes them.

Images and categories are identified by their position in the annotation table, because hotcoco
converts ids to floating point where detections are an array. The numbers are those of pycocotools.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import hotcoco
import numpy as np

from msdetr.annotations.table import AnnotationTable, Floats, Ints

IOU_THRESHOLDS: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())
AREA_RANGES = ("all", "small", "medium", "large")
MAX_DETECTIONS = (1, 10, 100)
"""COCO's limits per image and category, whatever number of detections a model gives."""


class Curves(NamedTuple):
    """Precision and recall as COCO accumulates them; -1 where there is no ground truth.

    T IoU thresholds, R recall levels, K categories, A area ranges, D limits on the detections.
    """

    precision: Floats
    """[T, R, K, A, D]"""
    recall: Floats
    """[T, K, A, D], the maximum over the detections."""


def compute_curves(
    table: AnnotationTable, image_index: Ints, category_index: Ints, boxes: Floats, scores: Floats
) -> Curves:
    """Matches N detections to annotations and accumulates the matches.

    Args:
        table: the annotations.
        image_index: [N], into `table.image_ids`.
        category_index: [N], into `table.category_ids`.
        boxes: [N, 4] (x, y, width, height) in pixels.
        scores: [N]
    """
    truth = hotcoco.COCO.from_arrays(
        [{"id": index} for index in range(len(table))],
        [{"id": index, "name": name} for index, name in enumerate(table.category_names)],
        table.image_index,
        table.category_index.numpy(),
        table.boxes.numpy(),
        area=table.areas.numpy(),
        iscrowd=table.is_crowd.numpy(),
    )
    results = truth.load_res(np.column_stack((image_index, boxes, scores, category_index)))
    evaluation: Any = hotcoco.COCOeval(truth, results, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    return Curves(evaluation.eval["precision"], evaluation.eval["recall"])
