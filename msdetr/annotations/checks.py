"""Reading annotation files with all checks that need no image: for training and for the doctor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msdetr.annotations.coco import read_coco
from msdetr.annotations.findings import Finding
from msdetr.annotations.labels import LabelLayout, LabelMap
from msdetr.annotations.table import AnnotationTable, Bools

_OUTSIDE_TOLERANCE = 1.0  # pixels; less comes from rounding


class Annotations(NamedTuple):
    """One annotation file."""

    table: AnnotationTable
    """Its sound entries."""
    label_map: LabelMap | None
    """Labels of its categories; None where they are invalid."""
    findings: list[Finding]
    """All errors, and warnings about single entries."""


def read_annotations(
    files: Sequence[Path], layout: LabelLayout = "auto", *, label_map: LabelMap | None = None
) -> list[Annotations]:
    """Reads the annotation files of one run, whose labels must agree.

    Args:
        files: JSON files in COCO's format; the first decides about the labels.
        layout: how category ids become labels, see `LabelMap.from_categories`.
        label_map: labels of a model to use instead; the categories of all files must be in it.

    Raises:
        ValueError: files cannot be read at all, see `read_coco`. The message names all of them.
    """
    results, unreadable = [], []
    for file in files:
        try:
            table, findings = read_coco(file)
        except ValueError as error:
            unreadable.append(str(error))
            continue
        if label_map is None or not table.categories:
            try:
                label_map = LabelMap.from_categories(table.categories, layout)
            except ValueError as error:
                findings.append(Finding(code="invalid_categories", message=str(error)))
        if label_map is not None:
            findings += _category_mismatches(table, label_map)
        results.append(Annotations(table, label_map, findings))
    if unreadable:
        raise ValueError("\n  ".join(unreadable))
    return results


def check_table(table: AnnotationTable) -> list[Finding]:
    """Warnings and notes: training accepts these, but they may be mistakes in the data."""
    sizes, image_index = table.sizes.numpy(), table.image_index
    findings: list[Finding] = []

    def report(code: str, message: str, index: int, annotation_id: int | None = None) -> None:
        finding = Finding(
            code=code,
            message=message,
            file_name=table.file_name(index),
            image_id=int(table.image_ids[index]),
            annotation_id=annotation_id,
        )
        findings.append(finding)

    def report_boxes(where: Bools, code: str, problem: str) -> None:
        for row in np.flatnonzero(where):
            height, width = sizes[image_index[row]]
            numbers = ", ".join(f"{number:.10g}" for number in table.boxes[row].tolist())
            message = f"bbox [{numbers}] in {width} x {height} pixels {problem}"
            report(code, message, int(image_index[row]), int(table.annotation_ids[row]))

    clipped, is_used = table.clipped_boxes()
    first, extent = np.split(table.boxes.numpy(), 2, axis=1)
    excess = np.maximum(-first, first + extent - sizes[image_index, ::-1]).max(axis=1)
    is_degenerate = extent.min(axis=1) <= 0
    is_inside = (clipped[:, 2:] - clipped[:, :2]).min(axis=1) > 0
    is_cut = ~is_degenerate & is_inside & (excess > _OUTSIDE_TOLERANCE)
    report_boxes(is_degenerate, "degenerate_box", "has no area: it is left out")
    report_boxes(~is_degenerate & ~is_inside, "box_outside", "is all outside: it is left out")
    report_boxes(is_cut, "box_outside", "leaves the image: it is clipped")

    first_index: dict[str, int] = {}
    has_boxes = np.bincount(image_index[is_used], minlength=len(table)) > 0
    for index in range(len(table)):
        earlier = first_index.setdefault(table.file_name(index), index)
        if earlier != index:
            message = f"also the file of image {table.image_ids[earlier]}"
            report("duplicate_file_name", message, index)
        if not has_boxes[index]:
            message = "no box to train on: the image counts as background"
            report("image_without_boxes", message, index)
    return findings


def _category_mismatches(table: AnnotationTable, label_map: LabelMap) -> Iterator[Finding]:
    known = dict(zip(label_map.category_ids, label_map.names, strict=True))
    for category_id, name in table.categories.items():
        if known.get(category_id) != name:
            yield Finding(
                code="category_mismatch",
                message=f"category {category_id} is {name!r} here, but {known.get(category_id)!r} "
                "in the label map of the model or training set",
            )
