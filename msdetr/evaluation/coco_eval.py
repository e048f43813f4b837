"""COCO metrics of detections that arrive batch by batch, in one process or in several."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msdetr.annotations.labels import LabelMap
from msdetr.annotations.table import AnnotationTable, Bools, Floats, Ints
from msdetr.evaluation.coco_metrics import CocoResult
from msdetr.evaluation.curves import compute_curves
from msdetr.structures import Detections

logger = logging.getLogger(__name__)


class EvaluatorState(NamedTuple):
    """Images added to an evaluator and their detections, as arrays that are cheap to send.

    Detections are best first within an image, as they were added.
    """

    image_ids: Ints
    """[I], images added, those without detections too."""
    detection_image_ids: Ints
    """[N]"""
    category_ids: Ints
    """[N]"""
    boxes: Floats
    """[N, 4] (x, y, width, height) in pixels."""
    scores: Floats
    """[N]"""


_NO_IDS = np.zeros(0, np.int64)
_EMPTY = EvaluatorState(_NO_IDS, _NO_IDS, _NO_IDS, np.zeros((0, 4)), np.zeros(0))


class CocoEvaluator:
    """Collects detections and scores them against the annotations of a data set.

    Several processes each add their own images; one of them merges the others' `state()`:

        for state in gathered_states_of_other_ranks:
            evaluator.merge(state)
        result = evaluator.summarize()
    """

    def __init__(self, table: AnnotationTable, label_map: LabelMap) -> None:
        """Start without detections.

        Args:
            table: the annotations. All images are scored, also those that are never added: their
                boxes then count as missed.
            label_map: labels of the detections.
        """
        self._table = table
        self._label_map = label_map
        self._known_images = frozenset(table.image_ids.tolist())
        self._added_images: set[int] = set()
        self._states: list[EvaluatorState] = []

    def add(self, image_ids: Tensor | Sequence[int], detections: Detections) -> None:
        """Add the detections of some images, on any device.

        Places with score 0 (left empty by suppression), labels without a category and values that
        are not finite are dropped.

        Args:
            image_ids: B ids of the annotation table.
            detections: [B, D].

        Raises:
            ValueError: an image was added before or is not in the table, or the number of
                ids is not B.
        """
        ids = np.asarray([int(image_id) for image_id in image_ids], np.int64)
        if len(ids) != len(detections.scores):
            raise ValueError(
                f"{len(ids)} image ids for the detections of {len(detections.scores)} images"
            )
        scores = _to_numpy(detections.scores, torch.float64)  # [B, D]
        boxes = _to_numpy(detections.boxes, torch.float64)  # [B, D, 4]
        categories, has_category = self._categories(_to_numpy(detections.labels, torch.int64))
        usable = np.isfinite(scores) & np.isfinite(boxes).all(axis=-1)
        kept = has_category & usable & (scores > 0)
        corners = boxes[kept]  # [N, 4]
        self.merge(
            EvaluatorState(
                image_ids=ids,
                detection_image_ids=np.repeat(ids, kept.sum(axis=1)),
                category_ids=categories[kept],
                boxes=np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1),
                scores=scores[kept],
            )
        )

    def state(self) -> EvaluatorState:
        """All detections so far, as arrays that pickle."""
        states = [_EMPTY, *self._states]
        return EvaluatorState(*(np.concatenate(columns) for columns in zip(*states, strict=True)))

    def merge(self, state: EvaluatorState) -> None:
        """Add the detections of another evaluator.

        Raises:
            ValueError: an image was added before or is not in the table.
        """
        ids, counts = np.unique(state.image_ids, return_counts=True)
        added = set(ids.tolist())
        for image_id in [*(self._added_images & added), *ids[counts > 1].tolist()]:
            raise ValueError(
                f"image {image_id} was added twice; every image counts once: "
                "check that batches and processes do not share images"
            )
        for image_id in added - self._known_images:
            raise ValueError(f"{self._table.source} has no image with id {image_id}")
        self._added_images |= added
        self._states.append(state)

    def summarize(self) -> CocoResult:
        """Score all detections so far."""
        missing = len(self._known_images) - len(self._added_images)
        if missing:
            logger.warning(
                "%d of %d images were not added: their boxes count as missed",
                missing,
                len(self._known_images),
            )
        table, state = self._table, self.state()
        kept = np.isin(state.category_ids, table.category_ids.numpy())
        if not kept.all():
            logger.warning(
                "%d detections have categories that %s lacks (ids %s): they are not scored",
                np.count_nonzero(~kept),
                table.source,
                np.unique(state.category_ids[~kept]).tolist(),
            )
        curves = compute_curves(
            table,
            np.searchsorted(table.image_ids.numpy(), state.detection_image_ids[kept]),
            np.searchsorted(table.category_ids.numpy(), state.category_ids[kept]),
            state.boxes[kept],
            state.scores[kept],
        )
        return CocoResult.from_curves(table, curves)

    def results(self) -> Iterator[dict[str, Any]]:
        """Detections in COCO's result format, by ascending image id and best first.

        Numbers are not rounded, so that the file scores as the run did: rounding scores to three
        digits, as COCO proposes to save space, makes ties and moves AP.
        """
        state = self.state()
        for row in np.argsort(state.detection_image_ids, kind="stable"):
            yield {
                "image_id": int(state.detection_image_ids[row]),
                "category_id": int(state.category_ids[row]),
                "bbox": state.boxes[row].tolist(),
                "score": float(state.scores[row]),
            }

    def write_results(self, path: Path) -> None:
        """Write `results()` as JSON, one detection per line; `path` is complete or absent."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with partial.open("w", encoding="utf-8") as file:
                separator = "[\n"
                for detection in self.results():
                    file.write(separator + json.dumps(detection))
                    separator = ",\n"
                file.write("\n]\n" if separator == ",\n" else "[]\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _categories(self, labels: Ints) -> tuple[Ints, Bools]:
        """Category ids of labels, and which labels have one; both of the labels' shape."""
        distinct, inverse = np.unique(labels.ravel(), return_inverse=True)
        categories = [self._label_map.category_of(label) for label in distinct.tolist()]
        ids = np.array([0 if category is None else category for category in categories], np.int64)
        has_category = np.array([category is not None for category in categories], np.bool_)
        return ids[inverse].reshape(labels.shape), has_category[inverse].reshape(labels.shape)


def _to_numpy(tensor: Tensor, dtype: torch.dtype) -> NDArray[Any]:
    return tensor.detach().to("cpu", dtype).numpy()
