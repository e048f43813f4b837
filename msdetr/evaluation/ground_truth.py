"""The part of a COCO annotation file that scoring boxes needs, as flat arrays."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """Annotated boxes of I images and K categories, M boxes in the order of the file.

    Images and categories are referred to by their place in `image_ids` and `category_ids`.
    """

    image_ids: Ints
    """[I], ascending."""
    category_ids: Ints
    """[K], ascending."""
    category_names: tuple[str, ...]
    """K names."""
    image_index: Ints
    """[M], into `image_ids`."""
    category_index: Ints
    """[M], into `category_ids`."""
    boxes: Floats
    """[M, 4] (x, y, width, height) in pixels."""
    area: Floats
    """[M] annotated area in square pixels, width * height where the file has none."""
    is_crowd: Bools
    """[M]"""


def read_ground_truth(annotation_file: Path, image_ids: Iterable[int] | None = None) -> GroundTruth:
    """Read a COCO annotation file, or the part of it that concerns `image_ids`.

    Annotations of images or categories that the file does not list are left out, as COCO's own
    evaluation does.

    Raises:
        ValueError: the file is missing, no JSON, or lacks a field; or it lists an image or category
            id twice, or lacks an id of `image_ids`.
    """
    content = _load_object(annotation_file)
    images, categories, annotations = (
        _entries(content, name, annotation_file) for name in ("images", "categories", "annotations")
    )
    known_images = _ids(images, "images", annotation_file)
    if image_ids is not None:
        known_images = _restrict(known_images, image_ids, annotation_file)
    category_ids = _ids(categories, "categories", annotation_file)
    names = {int(entry["id"]): str(entry.get("name", entry["id"])) for entry in categories}

    box_images = _column(annotations, "image_id", np.int64, annotation_file)
    box_categories = _column(annotations, "category_id", np.int64, annotation_file)
    boxes = _boxes(annotations, annotation_file)
    areas = _areas(annotations, boxes, annotation_file)
    is_crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in annotations], np.bool_)

    kept = np.isin(box_images, known_images) & np.isin(box_categories, category_ids)
    return GroundTruth(
        image_ids=known_images,
        category_ids=category_ids,
        category_names=tuple(names[category] for category in category_ids.tolist()),
        image_index=np.searchsorted(known_images, box_images[kept]),
        category_index=np.searchsorted(category_ids, box_categories[kept]),
        boxes=boxes[kept],
        area=areas[kept],
        is_crowd=is_crowd[kept],
    )


def _load_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read annotation file {file}: {error.strerror}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{file} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds a JSON {type(content).__name__}; a COCO annotation file is an object "
            "with 'images', 'annotations' and 'categories'"
        )
    return content


def _entries(content: dict[str, Any], name: str, file: Path) -> list[dict[str, Any]]:
    entries = content.get(name)
    if not isinstance(entries, list):
        raise ValueError(
            f"{file} has no list '{name}'; a COCO annotation file has 'images', 'annotations' "
            "and 'categories' (empty lists where there are none)"
        )
    return entries


def _column(entries: list[dict[str, Any]], field: str, dtype: type, file: Path) -> NDArray[Any]:
    for entry in entries:
        if field not in entry:
            raise ValueError(f"{file}: no '{field}' in {_shortened(entry)}")
    try:
        return np.array([entry[field] for entry in entries], dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: unusable value in field '{field}': {error}") from error


def _boxes(annotations: list[dict[str, Any]], file: Path) -> Floats:
    for entry in annotations:
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4:
            raise ValueError(f"{file}: 'bbox' is not [x, y, width, height] in {_shortened(entry)}")
    return _column(annotations, "bbox", np.float64, file).reshape(-1, 4)


def _areas(annotations: list[dict[str, Any]], boxes: Floats, file: Path) -> Floats:
    areas = [{"area": entry.get("area")} for entry in annotations]
    annotated = _column(areas, "area", np.float64, file)  # None has become NaN
    return np.where(np.isnan(annotated), boxes[:, 2] * boxes[:, 3], annotated)


def _ids(entries: list[dict[str, Any]], name: str, file: Path) -> Ints:
    ids, counts = np.unique(_column(entries, "id", np.int64, file), return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{file}: id {ids[counts > 1][0]} occurs more than once in '{name}'")
    return ids


def _restrict(known: Ints, wanted: Iterable[int], file: Path) -> Ints:
    chosen = np.unique(np.array(list(wanted), np.int64))
    unknown = np.setdiff1d(chosen, known)
    if unknown.size:
        raise ValueError(f"{file} has no image with id {unknown[0]}")
    return chosen


def _shortened(entry: dict[str, Any]) -> str:
    text = repr(entry)
    return text if len(text) <= 200 else f"{text[:200]}..."
