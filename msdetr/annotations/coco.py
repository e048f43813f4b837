"""Reader of COCO's instances format: JSON with `images`, `annotations` and `categories`."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Iterable
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msdetr.annotations.file_names import check_file_name
from msdetr.annotations.findings import Finding
from msdetr.annotations.table import AnnotationTable, Bools, Floats, Ints

# Polygons are nine tenths of COCO's file, and nothing here reads them.
_POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[[\s\d.,\[\]eE+-]*\]')
_MAX_NUMBER = float(np.finfo(np.float32).max)
_IS_CROWD = {None: False, 0: False, 1: True, "0": False, "1": True}
"""Every value that `iscrowd` may have; also false, true, 0.0 and 1.0, which equal 0 and 1."""
_Code = str | Callable[[dict[str, Any]], str]


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
    boxes = _read_annotations(annotations, image_entries, images, categories)
    table = AnnotationTable.build(annotation_file, categories=categories, **images, **boxes)
    return table, findings


def _load(annotation_file: Path) -> Any:
    """The content of an annotation file without polygons."""
    is_collecting = gc.isenabled()
    # The collector would walk all objects again and again while millions are made: twice the time.
    gc.disable()
    try:
        return json.loads(_POLYGONS.sub(b'"segmentation":0', annotation_file.read_bytes()))
    except OSError as error:
        raise ValueError(f"cannot read the file: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"invalid JSON, perhaps an incomplete download: {error}") from error
    finally:
        if is_collecting:
            gc.enable()


class _Entries:
    """The objects of one list of the file: columns of their values, and findings about them."""

    def __init__(self, content: Any, name: str, malformed: str, findings: list[Finding]) -> None:
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"there is no list {name!r} at the top: not an instances file of COCO")
        self.records: list[dict[str, Any]] = [entry for entry in entries if type(entry) is dict]
        self.sound = np.ones(len(self.records), np.bool_)
        """False for entries with an error, which stay out of the table."""
        self.place: Callable[[dict[str, Any]], dict[str, Any]] = lambda record: {}
        """Fields of a finding that say where the entry is."""
        self._name = name
        self._malformed = malformed
        self._findings = findings
        findings += [
            Finding(code=malformed, message=f"not an object: {_excerpt(entry)}")
            for entry in entries
            if type(entry) is not dict
        ]

    def column(
        self,
        key: str,
        is_valid: Callable[[Any], bool],
        expected: str,
        default: Any,
        *,
        code: _Code | None = None,
        keep: bool = False,
    ) -> tuple[list[Any], Bools]:
        """One field of all entries, and where it is valid.

        Other entries are reported with `code`, and their value is `default`. They are dropped
        unless `keep` is set.
        """
        values = [record.get(key) for record in self.records]
        valid = np.fromiter(map(is_valid, values), np.bool_, len(values))
        if valid.all():
            return values, valid

        def message(record: dict[str, Any]) -> str:
            value = _excerpt(record[key]) if key in record else "missing"
            return f"{key!r} is {value}, it must be {expected}"

        self.report(~valid, code or self._malformed, message, keep=keep)
        return [value if ok else default for value, ok in zip(values, valid, strict=True)], valid

    def integers(self, key: str, *, minimum: int = -(2**63)) -> tuple[Ints, Bools]:
        """One field [n], 0 where it is no integer, and where it is one."""

        def is_valid(value: Any) -> bool:
            # Not isinstance: true and false are no numbers.
            return type(value) is int and minimum <= value < 2**63

        expected = "an integer" if minimum < 0 else f"an integer of at least {minimum}"
        values, valid = self.column(key, is_valid, expected, 0)
        return np.array(values, np.int64), valid

    def report(
        self, where: Bools, code: _Code, message: Callable[[dict[str, Any]], str], *, keep: bool
    ) -> None:
        """Adds a finding for each entry that a mask selects; drops these entries, or keeps them."""
        for row in np.flatnonzero(where):
            record = self.records[row]
            key = code if isinstance(code, str) else code(record)
            place, text = self.place(record), message(record)
            if not any(value is not None for value in place.values()):
                text += f", in the entry {_excerpt(record)} of {self._name!r}"
            self._findings.append(Finding(code=key, message=text, **place))
        if not keep:
            self.sound &= ~where

    def report_repeated(self, ids: Ints, valid: Bools, code: str) -> None:
        """Reports valid ids that equal an earlier one, and drops these entries."""
        rows = np.flatnonzero(valid)
        is_repeated = valid.copy()
        is_repeated[rows[np.unique(ids[rows], return_index=True)[1]]] = False
        self.report(is_repeated, code, lambda r: f"id {r['id']} appears more than once", keep=False)


def _read_categories(entries: _Entries) -> dict[int, str]:
    """Names by id. A category without a name is reported, but its annotations may stay."""
    ids, has_id = entries.integers("id")
    entries.report_repeated(ids, has_id, "invalid_categories")
    names, _ = entries.column("name", _is_text, "a text", "", keep=True)
    rows = np.flatnonzero(entries.sound)
    return {int(ids[row]): names[row] for row in rows}


def _read_images(entries: _Entries) -> dict[str, Any]:
    """Columns of the table by name. Of entries with the same id, the first counts."""

    def place(record: dict[str, Any]) -> dict[str, Any]:
        name = record.get("file_name")
        return {"image_id": _id(record, "id"), "file_name": name if _is_text(name) else None}

    entries.place = place
    ids, _ = entries.integers("id")
    (heights, _), (widths, _) = (entries.integers(key, minimum=1) for key in ("height", "width"))
    names, _ = entries.column("file_name", _is_text, "a text", "-")
    problems = [_file_name_problem(name) for name in names]
    is_unsafe = np.array([problem is not None for problem in problems], np.bool_)
    entries.report(
        is_unsafe,
        "unsafe_file_name",
        lambda r: str(_file_name_problem(r["file_name"])),
        keep=True,  # so that its annotations are not reported, too
    )
    entries.report_repeated(ids, entries.sound, "duplicate_image_id")
    rows = np.flatnonzero(entries.sound)
    return {
        "image_ids": ids[rows],
        "sizes": np.stack((heights, widths), axis=1)[rows],
        "file_names": [names[row] for row in rows],
    }


def _read_annotations(
    entries: _Entries, image_entries: _Entries, images: dict[str, Any], categories: dict[int, str]
) -> dict[str, Any]:
    """Columns of the table by name. Annotations of images that are unsound stay out, too."""
    file_names = dict(zip(images["image_ids"].tolist(), images["file_names"], strict=True))

    def place(record: dict[str, Any]) -> dict[str, Any]:
        image_id = _id(record, "image_id")
        ids = {"annotation_id": _id(record, "id"), "image_id": image_id}
        return {**ids, "file_name": file_names.get(image_id)}

    entries.place = place
    annotation_ids, has_id = entries.integers("id")
    entries.report_repeated(annotation_ids, has_id, "duplicate_annotation_id")
    listed = {_id(record, "id") for record in image_entries.records} - {None}
    image_ids = _read_references(entries, "image", listed)
    boxes = _read_boxes(entries)
    columns: dict[str, NDArray[Any]] = {
        "annotation_ids": annotation_ids,
        "box_image_ids": image_ids,
        "box_category_ids": _read_references(entries, "category", categories),
        "boxes": boxes,
        "is_crowd": _read_crowd_flags(entries),
        "areas": _read_areas(entries, boxes),
    }
    kept = entries.sound & np.isin(image_ids, images["image_ids"])
    return {name: column[kept] for name, column in columns.items()}


def _read_references(entries: _Entries, kind: str, known: Iterable[Any]) -> Ints:
    """[n], ids of images or categories. Reports those that are not known."""
    key = f"{kind}_id"
    ids, valid = entries.integers(key)
    entries.report(
        valid & ~np.isin(ids, list(known)),
        f"unknown_{kind}",
        lambda record: f"there is no {kind} with id {record[key]}",
        keep=False,
    )
    return ids


def _read_boxes(entries: _Entries) -> Floats:
    """[n, 4] as in the file; 0 where there is no sound box."""
    expected = "four finite numbers [x, y, width, height]"
    boxes, _ = entries.column("bbox", _is_box, expected, [0, 0, 0, 0], code=_box_code)
    return np.array(boxes, np.float64).reshape(-1, 4)


def _read_crowd_flags(entries: _Entries) -> Bools:
    """[n]. Texts are read as the number that they spell."""
    flags, _ = entries.column("iscrowd", _is_crowd_flag, "0 or 1", 0)
    is_text = np.array([_is_text(flag) for flag in flags], np.bool_)
    message = "'iscrowd' is a text: it is read as a number"
    entries.report(is_text, "crowd_flag_text", lambda record: message, keep=True)
    return np.array([_IS_CROWD[flag] for flag in flags], np.bool_)


def _read_areas(entries: _Entries, boxes: Floats) -> Floats:
    """[n], width * height where the file has no usable area."""
    expected = "a number: width * height is taken"
    areas, _ = entries.column("area", _is_area, expected, None, code="malformed_area", keep=True)
    annotated = np.array(areas, np.float64)  # None becomes NaN, and a text its number
    return np.where(np.isnan(annotated), boxes[:, 2] * boxes[:, 3], annotated)


def _id(record: dict[str, Any], key: str) -> int | None:
    value = record.get(key)
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    """Whether `value` is a finite number that float32 holds. Comparisons with NaN are false."""
    return type(value) in (int, float) and -_MAX_NUMBER <= value <= _MAX_NUMBER


def _is_box(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and all(map(_is_number, value))


def _box_code(record: dict[str, Any]) -> str:
    box = record.get("bbox")
    numbers = box if isinstance(box, list) else []
    has_nan = any(type(x) is float and not isfinite(x) for x in numbers)
    return "nan_box" if has_nan else "malformed_annotation"


def _is_area(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return False
    return value is None or _is_number(value)


def _is_crowd_flag(value: Any) -> bool:
    return not isinstance(value, list | dict) and value in _IS_CROWD


def _file_name_problem(name: str) -> str | None:
    try:
        check_file_name(name)
    except ValueError as error:
        return str(error)
    return None


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
