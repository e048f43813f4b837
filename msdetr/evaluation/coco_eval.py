"""COCO metrics of detections that arrive batch by batch, in one process or in several."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msdetr.evaluation.backends import (
    AREA_RANGES,
    IOU_THRESHOLDS,
    MAX_DETECTIONS,
    Backend,
    Curves,
    ScoredBoxes,
    score_boxes,
)
from msdetr.evaluation.ground_truth import Bools, Floats, GroundTruth, Ints, read_ground_truth
from msdetr.structures import Detections

logger = logging.getLogger(__name__)

NO_GROUND_TRUTH = -1.0
"""COCO's value of a metric that no annotated box takes part in."""


class LabelNames(Protocol):
    """What the evaluator asks of a label map."""

    def category_of(self, label: int) -> int | None:
        """The category id of a label, None for a label that no category uses."""


class EvaluatorState(NamedTuple):
    """Images added to an evaluator and their detections, as arrays: cheap to send to another rank.

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


_EMPTY = EvaluatorState(
    image_ids=np.zeros(0, np.int64),
    detection_image_ids=np.zeros(0, np.int64),
    category_ids=np.zeros(0, np.int64),
    boxes=np.zeros((0, 4)),
    scores=np.zeros(0),
)


class ClassResult(NamedTuple):
    """Scores of one category; -1 where it has no ground truth."""

    category_id: int
    name: str
    ap: float
    ap50: float
    num_boxes: int
    """Annotated boxes, crowds not counted."""


@dataclass(frozen=True, kw_only=True)
class CocoResult:
    """COCO's twelve numbers and the average precision of every category."""

    metrics: dict[str, float]
    """AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl; -1 without ground truth."""
    per_class: list[ClassResult]
    """Every category of the annotation file, by ascending id."""
    num_images: int
    """Images that were scored."""

    def __getitem__(self, name: str) -> float:
        """The metric of that name: `result["AP50"]`."""
        return self.metrics[name]

    def table(self) -> str:
        """COCO's summary: twelve aligned lines; "-" where there is no ground truth."""
        return "\n".join(
            f"{metric.title:<17}  {metric.name:<5}  IoU {metric.iou_text:<9}  "
            f"area {metric.area:<6}  detections {metric.max_detections:>3}  "
            f"{_shown(self.metrics[metric.name])}"
            for metric in _METRICS
        )

    def per_class_table(self) -> str:
        """One aligned line per category; "-" where it has no ground truth."""
        width = max([len("class"), *(len(result.name) for result in self.per_class)])
        lines = [f"{'id':>5}  {'class':<{width}}  {'boxes':>7}  {'AP':>6}  {'AP50':>6}"]
        lines += [
            f"{result.category_id:>5}  {result.name:<{width}}  {result.num_boxes:>7}  "
            f"{_shown(result.ap)}  {_shown(result.ap50)}"
            for result in self.per_class
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {
            "metrics": dict(self.metrics),
            "per_class": [
                {
                    "category_id": result.category_id,
                    "name": result.name,
                    "AP": result.ap,
                    "AP50": result.ap50,
                    "num_boxes": result.num_boxes,
                }
                for result in self.per_class
            ],
            "num_images": self.num_images,
        }


class CocoEvaluator:
    """Collects detections and scores them against a COCO annotation file.

    Several processes each add their own images; one of them merges the others' `state()`:

        for state in gathered_states_of_other_ranks:
            evaluator.merge(state)
        result = evaluator.summarize()
    """

    def __init__(
        self,
        annotation_file: Path,
        label_map: LabelNames,
        *,
        image_ids: Iterable[int] | None = None,
        backend: Backend = "hotcoco",
    ) -> None:
        """Read the annotations.

        Args:
            annotation_file: COCO JSON.
            label_map: which category a label stands for.
            image_ids: score these images only. By default all images of the file are scored, also
                those that were never added: their boxes then count as missed.
            backend: the library that matches; the numbers are the same.

        Raises:
            ValueError: as `read_ground_truth`.
        """
        self._ground_truth = read_ground_truth(annotation_file, image_ids)
        self._annotation_file = annotation_file
        self._label_map = label_map
        self._backend = backend
        self._known_images = frozenset(self._ground_truth.image_ids.tolist())
        self._added_images: set[int] = set()
        self._parts: list[EvaluatorState] = []

    def add(self, image_ids: Tensor | Sequence[int], detections: Detections) -> None:
        """Add the detections of some images, on any device.

        Places with score 0 (left empty by suppression) and labels without a category are dropped,
        and so is what is not finite.

        Args:
            image_ids: B ids of the annotation file.
            detections: [B, D].

        Raises:
            ValueError: an image was added before or is not among those to score, or the number of
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
        """All that was added, as arrays that pickle."""
        parts = [_EMPTY, *self._parts]
        return EvaluatorState(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def merge(self, state: EvaluatorState) -> None:
        """Add what another evaluator collected.

        Raises:
            ValueError: an image was added before or is not among those to score.
        """
        new: set[int] = set()
        for image_id in state.image_ids.tolist():
            if image_id in self._added_images or image_id in new:
                raise ValueError(
                    f"image {image_id} was added twice; every image counts once: "
                    "check that batches and processes do not share images"
                )
            if image_id not in self._known_images:
                raise ValueError(
                    f"image {image_id} is not among those to score of {self._annotation_file}"
                )
            new.add(image_id)
        self._added_images |= new
        self._parts.append(state)

    def summarize(self) -> CocoResult:
        """Score all that was added so far."""
        truth = self._ground_truth
        missing = len(self._known_images) - len(self._added_images)
        if missing:
            logger.warning(
                "%d of %d images were not added: their boxes count as missed",
                missing,
                len(self._known_images),
            )
        curves = score_boxes(truth, self._scored_boxes(), self._backend)
        return CocoResult(
            metrics={metric.name: _value(metric, curves) for metric in _METRICS},
            per_class=_per_class(truth, curves),
            num_images=len(truth.image_ids),
        )

    def results(self) -> list[dict[str, Any]]:
        """Detections in COCO's result format, by ascending image id and best first.

        Numbers are not rounded, so that the file scores as the run did: rounding scores to three
        digits, as COCO proposes to save space, makes ties and moves AP.
        """
        return list(self._entries())

    def write_results(self, path: Path) -> None:
        """Write `results()` as JSON, one detection per line; `path` is complete or absent."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with part.open("w", encoding="utf-8") as file:
                separator = "[\n"
                for entry in self._entries():
                    file.write(separator + json.dumps(entry))
                    separator = ",\n"
                file.write("\n]\n" if separator == ",\n" else "[]\n")
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _categories(self, labels: Ints) -> tuple[Ints, Bools]:
        """Category ids of labels, and which labels have one; both of the labels' shape."""
        distinct, inverse = np.unique(labels.ravel(), return_inverse=True)
        categories = [self._label_map.category_of(label) for label in distinct.tolist()]
        ids = np.array([0 if category is None else category for category in categories], np.int64)
        has_category = np.array([category is not None for category in categories], np.bool_)
        return ids[inverse].reshape(labels.shape), has_category[inverse].reshape(labels.shape)

    def _scored_boxes(self) -> ScoredBoxes:
        """The detections whose category the annotation file has."""
        truth, state = self._ground_truth, self.state()
        kept = np.isin(state.category_ids, truth.category_ids)
        if not kept.all():
            logger.warning(
                "%d detections have categories that %s lacks (ids %s): they are not scored",
                np.count_nonzero(~kept),
                self._annotation_file,
                np.unique(state.category_ids[~kept]).tolist(),
            )
        return ScoredBoxes(
            image_index=np.searchsorted(truth.image_ids, state.detection_image_ids[kept]),
            category_index=np.searchsorted(truth.category_ids, state.category_ids[kept]),
            boxes=state.boxes[kept],
            scores=state.scores[kept],
        )

    def _entries(self) -> Iterator[dict[str, Any]]:
        state = self.state()
        for row in np.argsort(state.detection_image_ids, kind="stable"):
            yield {
                "image_id": int(state.detection_image_ids[row]),
                "category_id": int(state.category_ids[row]),
                "bbox": state.boxes[row].tolist(),
                "score": float(state.scores[row]),
            }


class _Metric(NamedTuple):
    """One line of COCO's summary."""

    name: str
    title: str
    iou: float | None
    """One IoU threshold, or the mean over all."""
    area: str
    max_detections: int

    @property
    def iou_text(self) -> str:
        return "0.50:0.95" if self.iou is None else f"{self.iou:.2f}"


_PRECISION, _RECALL = "Average Precision", "Average Recall"
_METRICS = (
    _Metric("AP", _PRECISION, None, "all", 100),
    _Metric("AP50", _PRECISION, 0.5, "all", 100),
    _Metric("AP75", _PRECISION, 0.75, "all", 100),
    _Metric("APs", _PRECISION, None, "small", 100),
    _Metric("APm", _PRECISION, None, "medium", 100),
    _Metric("APl", _PRECISION, None, "large", 100),
    _Metric("AR1", _RECALL, None, "all", 1),
    _Metric("AR10", _RECALL, None, "all", 10),
    _Metric("AR100", _RECALL, None, "all", 100),
    _Metric("ARs", _RECALL, None, "small", 100),
    _Metric("ARm", _RECALL, None, "medium", 100),
    _Metric("ARl", _RECALL, None, "large", 100),
)


def _value(metric: _Metric, curves: Curves) -> float:
    curve = curves.precision if metric.title == _PRECISION else curves.recall
    values = curve[
        ..., AREA_RANGES.index(metric.area), MAX_DETECTIONS.index(metric.max_detections)
    ]  # [T, R, K] or [T, K]
    return _mean(values if metric.iou is None else values[_threshold_index(metric.iou)])


def _per_class(truth: GroundTruth, curves: Curves) -> list[ClassResult]:
    counted = truth.category_index[~truth.is_crowd]
    num_boxes = np.bincount(counted, minlength=len(truth.category_ids))
    precision = curves.precision[..., AREA_RANGES.index("all"), MAX_DETECTIONS.index(100)]
    return [
        ClassResult(
            category_id=category_id,
            name=truth.category_names[index],
            ap=_mean(precision[:, :, index]),
            ap50=_mean(precision[_threshold_index(0.5), :, index]),
            num_boxes=int(num_boxes[index]),
        )
        for index, category_id in enumerate(truth.category_ids.tolist())
    ]


def _threshold_index(iou: float) -> int:
    return int(np.argmin(np.abs(np.array(IOU_THRESHOLDS) - iou)))


def _mean(values: Floats) -> float:
    """Mean of those entries that have ground truth."""
    values = values[values > NO_GROUND_TRUTH]
    return float(values.mean()) if values.size else NO_GROUND_TRUTH


def _shown(value: float) -> str:
    return f"{'-':>6}" if value == NO_GROUND_TRUTH else f"{value:>6.3f}"


def _to_numpy(tensor: Tensor, dtype: torch.dtype) -> NDArray[Any]:
    return tensor.detach().to("cpu", dtype).numpy()
