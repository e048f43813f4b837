"""COCO's twelve metrics and the average precision per class, from precision and recall curves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from msdetr.annotations.table import AnnotationTable, Floats
from msdetr.evaluation.curves import AREA_RANGES, IOU_THRESHOLDS, MAX_DETECTIONS, Curves

NO_GROUND_TRUTH = -1.0
"""COCO's value of a metric that no annotated box takes part in."""


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

    @classmethod
    def from_curves(cls, annotations: AnnotationTable, curves: Curves) -> CocoResult:
        """Summarizes the curves of all images of a table."""
        return cls(
            metrics={metric.name: _value(metric, curves) for metric in _METRICS},
            per_class=_per_class(annotations, curves),
            num_images=len(annotations),
        )

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
        names = ("category_id", "name", "AP", "AP50", "num_boxes")
        return {
            "metrics": dict(self.metrics),
            "per_class": [dict(zip(names, row, strict=True)) for row in self.per_class],
            "num_images": self.num_images,
        }


class _Metric(NamedTuple):
    """One line of COCO's summary."""

    name: str
    iou: float | None
    """One IoU threshold, or the mean over all."""
    area: str
    max_detections: int

    @property
    def title(self) -> str:
        return f"Average {'Precision' if self.is_precision else 'Recall'}"

    @property
    def is_precision(self) -> bool:
        return self.name.startswith("AP")

    @property
    def iou_text(self) -> str:
        return "0.50:0.95" if self.iou is None else f"{self.iou:.2f}"


_METRICS = (
    _Metric("AP", None, "all", 100),
    _Metric("AP50", 0.5, "all", 100),
    _Metric("AP75", 0.75, "all", 100),
    _Metric("APs", None, "small", 100),
    _Metric("APm", None, "medium", 100),
    _Metric("APl", None, "large", 100),
    _Metric("AR1", None, "all", 1),
    _Metric("AR10", None, "all", 10),
    _Metric("AR100", None, "all", 100),
    _Metric("ARs", None, "small", 100),
    _Metric("ARm", None, "medium", 100),
    _Metric("ARl", None, "large", 100),
)


def _value(metric: _Metric, curves: Curves) -> float:
    curve = curves.precision if metric.is_precision else curves.recall
    values = curve[
        ..., AREA_RANGES.index(metric.area), MAX_DETECTIONS.index(metric.max_detections)
    ]  # [T, R, K] or [T, K]
    return _mean(values if metric.iou is None else values[_threshold_index(metric.iou)])


def _per_class(table: AnnotationTable, curves: Curves) -> list[ClassResult]:
    counted = table.category_index[~table.is_crowd].numpy()
    num_boxes = np.bincount(counted, minlength=len(table.category_ids))
    precision = curves.precision[..., AREA_RANGES.index("all"), MAX_DETECTIONS.index(100)]
    return [
        ClassResult(
            category_id=category_id,
            name=table.category_names[index],
            ap=_mean(precision[:, :, index]),
            ap50=_mean(precision[_threshold_index(0.5), :, index]),
            num_boxes=int(num_boxes[index]),
        )
        for index, category_id in enumerate(table.category_ids.tolist())
    ]


def _threshold_index(iou: float) -> int:
    return int(np.argmin(np.abs(np.array(IOU_THRESHOLDS) - iou)))


def _mean(values: Floats) -> float:
    """Mean of those entries that have ground truth."""
    values = values[values > NO_GROUND_TRUTH]
    return float(values.mean()) if values.size else NO_GROUND_TRUTH


def _shown(value: float) -> str:
    return f"{'-':>6}" if value == NO_GROUND_TRUTH else f"{value:>6.3f}"
