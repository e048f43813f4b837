"""Matching detections to ground truth by the rules of COCO: hotcoco, or pycocotools, the reference.

Both get and return the same arrays. Images and categories are identified by their position in the
annotation table, and annotations are numbered from 1: pycocotools considers an annotation with id 0
unmatched, and both libraries convert ids to floating point where detections are an array.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any, Literal, NamedTuple, cast

import hotcoco
import numpy as np
from numpy.typing import NDArray

from msdetr.annotations.table import AnnotationTable, Floats, Ints

Backend = Literal["hotcoco", "pycocotools"]

IOU_THRESHOLDS: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())
AREA_RANGES = ("all", "small", "medium", "large")
MAX_DETECTIONS = (1, 10, 100)
"""COCO's own, whatever number of detections a model gives: per image and category."""


class ScoredBoxes(NamedTuple):
    """N detections; images and categories by position in the table."""

    image_index: Ints
    """[N]"""
    category_index: Ints
    """[N]"""
    boxes: Floats
    """[N, 4] (x, y, width, height) in pixels."""
    scores: Floats
    """[N]"""


class Curves(NamedTuple):
    """Precision and recall as COCO accumulates them; -1 where there is no ground truth.

    T IoU thresholds, R recall levels, K categories, A area ranges, D limits on the detections.
    """

    precision: Floats
    """[T, R, K, A, D]"""
    recall: Floats
    """[T, K, A, D], the maximum over the detections."""


def score_boxes(table: AnnotationTable, detections: ScoredBoxes, backend: Backend) -> Curves:
    """Match and accumulate, printing nothing.

    Raises:
        ValueError: `backend` is unknown, or pycocotools is asked for and not installed.
    """
    if backend == "hotcoco":
        evaluation = _hotcoco(table, detections)
    elif backend == "pycocotools":
        evaluation = _pycocotools(table, detections)
    else:
        raise ValueError(f"backend must be 'hotcoco' or 'pycocotools', got {backend!r}")
    return Curves(precision=evaluation["precision"], recall=evaluation["recall"])


def _hotcoco(table: AnnotationTable, detections: ScoredBoxes) -> dict[str, Any]:
    images, categories = _images_and_categories(table)
    truth = hotcoco.COCO.from_arrays(
        images,
        categories,
        table.image_index,
        table.category_index.numpy(),
        table.boxes.numpy(),
        area=table.areas.numpy(),
        iscrowd=table.is_crowd.numpy(),
    )
    results = truth.load_res(
        np.column_stack(
            (
                detections.image_index,
                detections.boxes,
                detections.scores,
                detections.category_index,
            )
        )
    )
    evaluator = hotcoco.COCOeval(truth, results, "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    return cast(dict[str, Any], evaluator.eval)


def _pycocotools(table: AnnotationTable, detections: ScoredBoxes) -> dict[str, Any]:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ValueError(
            "backend 'pycocotools' needs the package pycocotools: pip install pycocotools, "
            "or take backend 'hotcoco', which gives the same numbers"
        ) from error

    images, categories = _images_and_categories(table)
    annotations = _entries(
        table.image_index,
        table.category_index.numpy(),
        table.boxes.numpy(),
        area=table.areas.numpy(),
        iscrowd=table.is_crowd.numpy().astype(np.int64),
    )
    detected = _entries(
        detections.image_index,
        detections.category_index,
        detections.boxes,
        area=detections.boxes[:, 2] * detections.boxes[:, 3],
        score=detections.scores,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        truth, results = COCO(), COCO()
        for dataset, entries in ((truth, annotations), (results, detected)):
            dataset.dataset = {"images": images, "categories": categories, "annotations": entries}
            dataset.createIndex()
        evaluator = COCOeval(truth, results, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    return cast(dict[str, Any], evaluator.eval)


def _images_and_categories(
    table: AnnotationTable,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    images = [{"id": index} for index in range(len(table))]
    categories = [{"id": index, "name": name} for index, name in enumerate(table.category_names)]
    return images, categories


def _entries(
    image_index: Ints, category_index: Ints, boxes: Floats, **columns: NDArray[Any]
) -> list[dict[str, Any]]:
    """Columns as the list of dicts that pycocotools takes."""
    names = ("image_id", "category_id", "bbox", *columns)
    rows = zip(
        image_index.tolist(),
        category_index.tolist(),
        boxes.tolist(),
        *(column.tolist() for column in columns.values()),
        strict=True,
    )
    return [
        {"id": number, **dict(zip(names, row, strict=True))} for number, row in enumerate(rows, 1)
    ]
