"""Reader of COCO's instances format: JSON with `images`, `annotations` and `categories`."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from msdetr.annotations.file_names import check_file_name
from msdetr.annotations.findings import Finding
from msdetr.annotations.table import AnnotationTable, Bools, Floats, Ints

# Polygons are nine tenths of COCO's file, and nothing here reads them.
_POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[[\s\d.,\[\]eE+-]*\]')
_MAX_NUMBER = float(np.finfo(np.float32).max)
_IS_CROWD = {None: False, 0: False, 1: True, "0": False, "1": True}
"""Every value that `iscrowd` may have; also false, true, 0.0 and 1.0, which equal 0 and 1."""


def read_coco(annotation_file: Path) -> tuple[AnnotationTable, list[Finding]]:
    """Reads an annotation file, goes through broken entries and reports all of them.

    Returns:
        The table of the entries that are sound, and the findings. Without errors, the table holds
        everything.

    Raises:
        ValueError: the file cannot be read, is not JSON, or lacks one of the three lists.
    """
    try:
        content = _load(annotation_file)
        findings: list[Finding] = []
        image_entries = _Entries(content, "images", "malformed_image", findings)
        annotations = _Entries(content, "annotations", "malformed_annotation", findings)
        category_entries = _Entries(content, "categories", "invalid_categories", findings)
    except ValueError as error:
        raise ValueError(f"{annotation_file}: {error}") from error
    categories = _read_categories(category_entries)
    images = _read_images(image_entries)
    boxes = _read_annotations(annotations, images, categories)
    table = AnnotationTable.build(annotation_file, categories=categories, **images, **boxes)
    return table, findings


def _load(annotation_file: Path) -> Any:
    """The content of an annotation file without polygons."""
    try:
        text = _POLYGONS.sub(b'"segmentation":0', annotation_file.read_bytes())
        with _paused_garbage_collection():
            return json.loads(text)
    except OSError as error:
        raise ValueError(f"cannot read the file: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"invalid JSON, perhaps an incomplete download: {error}") from error


@contextmanager
def _paused_garbage_collection() -> Iterator[None]:
    # The collector would walk all objects again and again while millions are made: twice the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Entries:
    """The objects of one list of the file: columns of their values, and findings about them.

    Checks work on whole columns. Only entries that fail one are looked at one by one.
    """

    def __init__(self, content: Any, name: str, malformed: str, findings: list[Finding]) -> None:
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"there is no list {name!r} at the top: not an instances file of COCO")
        self.records: list[dict[str, Any]] = [entry for entry in entries if type(entry) is dict]
        self.sound = np.ones(len(self.records), np.bool_)
        """False for entries with an error, which stay out of the table."""
        self.place: Callable[[dict[str, Any]], dict[str, Any]] = lambda record: {}
        """Fields of a finding that say where the entry is."""
        self._malformed = malformed
        self._findings = findings
        findings += [
            Finding(code=malformed, message=f"not an object: {_excerpt(entry)}")
            for entry in entries
            if type(entry) is not dict
        ]

    def values(self, key: str) -> list[Any]:
        """One field of all entries, None where it is missing."""
        return [record.get(key) for record in self.records]

    def integers(self, key: str) -> tuple[Ints, Bools]:
        """One field [n], and where it is an integer. Reports the other entries."""
        values = self.values(key)
        if set(map(type, values)) <= {int}:
            with suppress(OverflowError):
                return np.array(values, np.int64), np.ones(len(values), np.bool_)
        valid = np.array([_is_integer(value) for value in values], np.bool_)
        self.report_malformed(~valid, f"{key!r} is missing or not an integer")
        numbers = [value if ok else 0 for value, ok in zip(values, valid, strict=True)]
        return np.array(numbers, np.int64), valid

    def report_malformed(self, where: Bools, problem: str) -> None:
        """Reports entries with a field of the wrong type or range, and drops them."""
        self.report(where, self._malformed, lambda record: f"{problem}: {_excerpt(record)}")

    def report(
        self, where: Bools, code: str, message: Callable[[dict[str, Any]], str], keep: bool = False
    ) -> None:
        """Adds a finding for each entry that a mask selects; drops these entries, or keeps them."""
        for row in np.flatnonzero(where):
            record = self.records[row]
            finding = Finding(code=code, message=message(record), **self.place(record))
            self._findings.append(finding)
        if not keep:
            self.sound &= ~where


def _read_categories(entries: _Entries) -> dict[int, str]:
    """Names by id. A category without a name is reported, but its annotations may stay."""
    ids, has_id = entries.integers("id")
    entries.report(
        _repeated(ids, has_id), "invalid_categories", lambda r: f"category id {r['id']} repeats"
    )
    is_known = entries.sound.copy()
    has_name = np.array([isinstance(name, str) for name in entries.values("name")], np.bool_)
    entries.report_malformed(~has_name, "'name' of a category is missing or not a text")
    names = zip(ids.tolist(), entries.values("name"), is_known, strict=True)
    return {category_id: str(name) for category_id, name, known in names if known}


def _read_images(entries: _Entries) -> dict[str, Any]:
    """Columns of the table by name. Of entries with the same id, the first counts."""
    entries.place = lambda record: {
        "image_id": _integer_or_none(record, "id"),
        "file_name": record["file_name"] if isinstance(record.get("file_name"), str) else None,
    }
    ids, _ = entries.integers("id")
    (heights, has_height), (widths, has_width) = map(entries.integers, ("height", "width"))
    is_empty = has_height & has_width & ((heights < 1) | (widths < 1))
    entries.report_malformed(is_empty, "'height' and 'width' must be at least 1")
    names = entries.values("file_name")
    has_name = np.array([isinstance(name, str) for name in names], np.bool_)
    entries.report_malformed(~has_name, "'file_name' is missing or not a text")
    problems = [_file_name_problem(name) for name in names]
    is_unsafe = np.array([problem is not None for problem in problems], np.bool_)
    entries.report(
        is_unsafe, "unsafe_file_name", lambda r: str(_file_name_problem(r["file_name"])), keep=True
    )
    entries.report(
        _repeated(ids, entries.sound),
        "duplicate_image_id",
        lambda r: f"image id {r['id']} appears more than once",
    )
    rows = np.flatnonzero(entries.sound)
    return {
        "image_ids": ids[rows],
        "sizes": np.stack((heights, widths), axis=1)[rows],
        "file_names": [names[row] for row in rows],
    }


def _read_annotations(
    entries: _Entries, images: dict[str, Any], categories: dict[int, str]
) -> dict[str, Any]:
    """Columns of the table by name."""

    @cache
    def file_names() -> dict[int, str]:
        return dict(zip(images["image_ids"].tolist(), images["file_names"], strict=True))

    def place(record: dict[str, Any]) -> dict[str, Any]:
        image_id = _integer_or_none(record, "image_id")
        return {
            "annotation_id": _integer_or_none(record, "id"),
            "image_id": image_id,
            "file_name": None if image_id is None else file_names().get(image_id),
        }

    entries.place = place
    ids, has_id = entries.integers("id")
    image_ids, has_image = entries.integers("image_id")
    category_ids, has_category = entries.integers("category_id")
    entries.report(
        _repeated(ids, has_id),
        "duplicate_annotation_id",
        lambda r: f"annotation id {r['id']} appears more than once",
    )
    entries.report(
        has_image & ~np.isin(image_ids, images["image_ids"]),
        "unknown_image",
        lambda r: f"image {r['image_id']} is not among the (sound) images",
    )
    entries.report(
        has_category & ~np.isin(category_ids, list(categories)),
        "unknown_category",
        lambda r: f"category {r['category_id']} is not among the categories",
    )
    boxes = _read_boxes(entries)
    is_crowd = _read_crowd_flags(entries)
    areas = _read_areas(entries, boxes)
    kept = entries.sound
    return {
        "box_image_ids": image_ids[kept],
        "box_category_ids": category_ids[kept],
        "annotation_ids": ids[kept],
        "boxes": boxes[kept],
        "areas": areas[kept],
        "is_crowd": is_crowd[kept],
    }


def _read_boxes(entries: _Entries) -> Floats:
    """[n, 4] as in the file; 0 where there is no sound box."""
    values = entries.values("bbox")
    if set(map(type, values)) <= {list} and set(map(len, values)) <= {4}:
        numbers = list(chain.from_iterable(values))
        if set(map(type, numbers)) <= {int, float}:
            with suppress(OverflowError):
                boxes = np.array(numbers, np.float64).reshape(-1, 4)
                if (np.abs(boxes) <= _MAX_NUMBER).all():
                    return boxes
    is_box = np.array([_is_box(value) for value in values], np.bool_)
    is_nan = np.array([_has_nan(value) for value in values], np.bool_)
    entries.report(is_nan, "nan_box", lambda r: f"bbox {r['bbox']} has numbers that are not finite")
    entries.report(
        ~is_box & ~is_nan,
        "malformed_annotation",
        lambda r: f"bbox {_excerpt(r.get('bbox'))} is not [x, y, width, height]",
    )
    sound = [value if ok else [0] * 4 for value, ok in zip(values, is_box, strict=True)]
    return np.array(sound, np.float64).reshape(-1, 4)


def _read_crowd_flags(entries: _Entries) -> Bools:
    """[n]. Texts are read as the number that they spell; other values are errors."""
    values = entries.values("iscrowd")
    try:
        valid = np.array([value in _IS_CROWD for value in values], np.bool_)
    except TypeError:  # a list or an object
        valid = np.array([not isinstance(v, (list, dict)) and v in _IS_CROWD for v in values])
    entries.report(
        ~valid,
        "malformed_annotation",
        lambda r: f"'iscrowd' must be 0 or 1, it is {_excerpt(r['iscrowd'])}",
    )
    entries.report(
        valid & np.array([isinstance(value, str) for value in values], np.bool_),
        "crowd_flag_text",
        lambda r: f"'iscrowd' is the text {r['iscrowd']!r}: it is read as a number",
        keep=True,
    )
    return np.array([ok and _IS_CROWD[v] for v, ok in zip(values, valid, strict=True)], np.bool_)


def _read_areas(entries: _Entries, boxes: Floats) -> Floats:
    """[n], width * height where the file has no usable area."""
    values = entries.values("area")
    valid = np.array([value is None or _is_number(value) for value in values], np.bool_)
    entries.report(
        ~valid,
        "malformed_area",
        lambda r: f"area {_excerpt(r['area'])} is not a number: width * height is taken",
        keep=True,
    )
    usable = [value if ok else None for value, ok in zip(values, valid, strict=True)]
    areas = np.array(usable, np.float64)  # None becomes NaN
    return np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)


def _repeated(ids: Ints, valid: Bools) -> Bools:
    """[n], where a valid id equals an earlier valid one."""
    repeated = np.zeros(len(ids), np.bool_)
    rows = np.flatnonzero(valid)
    repeated[rows] = True
    repeated[rows[np.unique(ids[rows], return_index=True)[1]]] = False
    return repeated


def _is_integer(value: Any) -> bool:
    # Not isinstance: true and false are no numbers. Ids are 64 bits wide in training.
    return type(value) is int and -(2**63) <= value < 2**63


def _integer_or_none(record: dict[str, Any], key: str) -> int | None:
    return record[key] if _is_integer(record.get(key)) else None


def _is_number(value: Any) -> bool:
    """Whether `value` is a finite number that float32 holds. Comparisons with NaN are false."""
    return type(value) in (int, float) and -_MAX_NUMBER <= value <= _MAX_NUMBER


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _has_nan(value: Any) -> bool:
    return isinstance(value, list) and any(type(x) is float and not isfinite(x) for x in value)


def _file_name_problem(name: Any) -> str | None:
    try:
        if isinstance(name, str):
            check_file_name(name)
    except ValueError as error:
        return str(error)
    return None


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
