"""Checks of a data set before hours are spent on it: every annotation, every image file.

The reader for training stops at the first thing that is wrong. These checks go through broken
entries, list everything, and also report what training copes with but its owner may not know.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image
from tqdm import tqdm

from msdetr.data.coco import is_box, read_instances_json, records_of
from msdetr.data.images import (
    MODES_WITHOUT_RANGE,
    ExifPolicy,
    exif_orientation,
    oriented_size,
    resolve_image_path,
)
from msdetr.data.labels import LabelLayout, LabelMap

Severity = Literal["error", "warning", "note"]

SEVERITIES: dict[str, Severity] = {
    # Training refuses these.
    "invalid_categories": "error",
    "malformed_image": "error",
    "malformed_annotation": "error",
    "duplicate_image_id": "error",
    "duplicate_annotation_id": "error",
    "unknown_image": "error",
    "unknown_category": "error",
    "nan_box": "error",
    "unsafe_file_name": "error",
    "missing_image": "error",
    "unreadable_image": "error",
    "wrong_size": "error",
    "unsupported_mode": "error",
    # Training goes on: boxes are clipped or left out, pixels are converted.
    "degenerate_box": "warning",
    "box_outside": "warning",
    "duplicate_file_name": "warning",
    "exif_rotated": "warning",
    "cmyk_image": "warning",
    "sixteen_bit_image": "warning",
    # Good to know.
    "grayscale_image": "note",
    "image_without_boxes": "note",
}
"""What is looked for, and how grave it is."""

_OUTSIDE_TOLERANCE = 1.0  # pixels; less comes from rounding
_FILES_PER_TASK = 32


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing in one place."""

    code: str
    """Key of `SEVERITIES`."""
    message: str
    """What is wrong, with the values."""
    file_name: str | None = None
    """Image file, as the annotation file names it."""
    image_id: int | None = None
    """Image concerned, where its id is known."""
    annotation_id: int | None = None
    """Annotation concerned, where its id is known."""

    @property
    def severity(self) -> Severity:
        """How grave it is."""
        return SEVERITIES[self.code]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found in one annotation file and its images."""

    annotation_file: Path
    image_folder: Path
    num_images: int
    """Entries of the annotation file."""
    num_annotations: int
    """Entries of the annotation file."""
    num_crowds: int
    """Sound annotations of crowds: not trained on."""
    num_images_without_boxes: int
    """Images that no box is left of for training."""
    class_histogram: dict[str, int]
    """Boxes to train on, by category name, in the order of category ids."""
    findings: tuple[Finding, ...]

    def count(self, severity: Severity) -> int:
        """Number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; every finding with its severity."""
        fields = {name: value for name, value in vars(self).items() if name != "findings"}
        return {
            **fields,
            "annotation_file": str(self.annotation_file),
            "image_folder": str(self.image_folder),
            "num_errors": self.count("error"),
            "num_warnings": self.count("warning"),
            "findings": [{"severity": f.severity, **asdict(f)} for f in self.findings],
        }


class _ImageEntry(NamedTuple):
    image_id: int
    file_name: str
    height: int
    width: int


def inspect_dataset(
    annotation_file: Path,
    image_folder: Path,
    *,
    label_layout: LabelLayout = "auto",
    exif: ExifPolicy = "ignore",
    num_workers: int = 0,
    show_progress: bool = False,
) -> Report:
    """Checks an annotation file and decodes every image that it names.

    Args:
        annotation_file: JSON with `images`, `annotations` and `categories`.
        image_folder: folder that the file names are relative to.
        label_layout: how category ids are to become labels.
        exif: the policy that sizes are compared under.
        num_workers: processes that decode; 0 decodes in this one.
        show_progress: a progress bar on standard error, if that is a terminal.

    Raises:
        ValueError: the file cannot be read, is not JSON or has not the three lists.
    """
    try:
        content = read_instances_json(annotation_file)
        raw_images, raw_annotations, raw_categories = (
            records_of(content, key) for key in ("images", "annotations", "categories")
        )
    except ValueError as error:
        raise ValueError(f"{annotation_file}: {error}") from error

    findings: list[Finding] = []
    names = _inspect_categories(raw_categories, label_layout, findings)
    images = _inspect_images(raw_images, findings)
    boxes_per_category, image_ids_with_boxes, num_crowds = _inspect_annotations(
        raw_annotations, images, names, findings
    )
    without_boxes = [entry for key, entry in images.items() if key not in image_ids_with_boxes]
    findings += [
        Finding(
            code="image_without_boxes",
            message="no box to train on: the image counts as background",
            file_name=entry.file_name,
            image_id=entry.image_id,
        )
        for entry in without_boxes
    ]
    check = partial(_inspect_file, image_folder, exif)
    for file_findings in _map(check, list(images.values()), num_workers, show_progress):
        findings += file_findings
    class_histogram: Counter[str] = Counter()
    for category_id, name in sorted(names.items()):
        class_histogram[name] += boxes_per_category[category_id]
    return Report(
        annotation_file=annotation_file,
        image_folder=image_folder,
        num_images=len(raw_images),
        num_annotations=len(raw_annotations),
        num_crowds=num_crowds,
        num_images_without_boxes=len(without_boxes),
        class_histogram=dict(class_histogram),
        findings=tuple(findings),
    )


def _inspect_categories(
    categories: list[Any], layout: LabelLayout, findings: list[Finding]
) -> dict[int, str]:
    """Names of the sound categories by id."""
    try:
        LabelMap.from_categories(categories, layout)
    except ValueError as error:
        findings.append(Finding(code="invalid_categories", message=str(error)))
    return {
        category["id"]: str(category.get("name"))
        for category in categories
        if isinstance(category, dict) and _is_integer(category.get("id"))
    }


def _inspect_images(images: list[Any], findings: list[Finding]) -> dict[int, _ImageEntry]:
    """The sound entries by id; of entries with the same id the first."""
    entries: dict[int, _ImageEntry] = {}
    first_with_name: dict[str, int] = {}
    for image in images:
        problem = _image_problem(image)
        if problem is not None:
            findings.append(
                Finding(
                    code="malformed_image",
                    message=f"{problem}: {_excerpt(image)}",
                    image_id=_integer_or_none(image, "id"),
                )
            )
            continue
        entry = _ImageEntry(image["id"], image["file_name"], image["height"], image["width"])
        finding = partial(Finding, file_name=entry.file_name, image_id=entry.image_id)
        if entry.image_id in entries:
            message = f"also the id of {entries[entry.image_id].file_name}"
            findings.append(finding(code="duplicate_image_id", message=message))
            continue
        entries[entry.image_id] = entry
        if entry.file_name in first_with_name:
            message = f"also the file of image {first_with_name[entry.file_name]}"
            findings.append(finding(code="duplicate_file_name", message=message))
        first_with_name.setdefault(entry.file_name, entry.image_id)
    return entries


def _image_problem(image: Any) -> str | None:
    if not isinstance(image, dict):
        return "not an object"
    for key in ("id", "height", "width"):
        if not _is_integer(image.get(key)):
            return f"{key!r} is missing or not an integer"
    if image["height"] < 1 or image["width"] < 1:
        return "'height' and 'width' must be at least 1"
    if not isinstance(image.get("file_name"), str):
        return "'file_name' is missing or not a text"
    return None


def _inspect_annotations(
    annotations: list[Any],
    images: dict[int, _ImageEntry],
    names: dict[int, str],
    findings: list[Finding],
) -> tuple[Counter[int], set[int], int]:
    """Boxes to train on per category id, ids of the images that have any, and number of crowds."""
    boxes_per_category: Counter[int] = Counter()
    image_ids_with_boxes: set[int] = set()
    num_crowds = 0
    seen: set[int] = set()
    for annotation in annotations:
        problems = list(_annotation_problems(annotation, images, names, seen))
        annotation_id = _integer_or_none(annotation, "id")
        image_id = _integer_or_none(annotation, "image_id")
        entry = None if image_id is None else images.get(image_id)
        findings += [
            Finding(
                code=code,
                message=message,
                file_name=None if entry is None else entry.file_name,
                image_id=image_id,
                annotation_id=annotation_id,
            )
            for code, message in problems
        ]
        if annotation_id is not None:
            seen.add(annotation_id)
        is_kept = not any(SEVERITIES[code] == "error" for code, _ in problems)
        if is_kept and annotation.get("iscrowd", 0):
            num_crowds += 1
        elif is_kept and entry is not None and _has_area_inside(annotation["bbox"], entry):
            boxes_per_category[annotation["category_id"]] += 1
            image_ids_with_boxes.add(entry.image_id)
    return boxes_per_category, image_ids_with_boxes, num_crowds


def _annotation_problems(
    annotation: Any, images: dict[int, _ImageEntry], names: dict[int, str], seen: set[int]
) -> Iterator[tuple[str, str]]:
    """(code, message) of everything that is wrong with an annotation."""
    if not isinstance(annotation, dict):
        yield "malformed_annotation", f"not an object: {_excerpt(annotation)}"
        return
    keys = ("id", "image_id", "category_id")
    annotation_id, image_id, category_id = (_integer_or_none(annotation, key) for key in keys)
    for key, value in zip(keys, (annotation_id, image_id, category_id), strict=True):
        if value is None:
            yield "malformed_annotation", f"{key!r} is missing or not an integer"
    if annotation_id in seen:
        yield "duplicate_annotation_id", f"id {annotation_id} appears more than once"
    if image_id is not None and image_id not in images:
        yield "unknown_image", f"image {image_id} is not among the (sound) images"
    if category_id is not None and category_id not in names:
        yield "unknown_category", f"category {category_id} is not among the categories"
    entry = None if image_id is None else images.get(image_id)
    yield from _box_problems(annotation.get("bbox"), entry)


def _box_problems(box: Any, entry: _ImageEntry | None) -> Iterator[tuple[str, str]]:
    if not is_box(box):
        numbers = box if isinstance(box, list) else []
        if any(type(x) is float and not math.isfinite(x) for x in numbers):
            yield "nan_box", f"bbox {box} has numbers that are not finite"
        else:
            yield "malformed_annotation", f"bbox {box!r} is not [x, y, width, height]"
        return
    x, y, width, height = box
    if width <= 0 or height <= 0:
        yield "degenerate_box", f"bbox {box} has no area: it is left out"
    elif entry is not None:
        excess = max(-x, -y, x + width - entry.width, y + height - entry.height)
        if not _has_area_inside(box, entry):
            yield "box_outside", f"bbox {box} is all outside {_size(entry)}: it is left out"
        elif excess > _OUTSIDE_TOLERANCE:
            yield "box_outside", f"bbox {box} leaves {_size(entry)} by {excess:g}: it is clipped"


def _has_area_inside(box: list[float], entry: _ImageEntry) -> bool:
    x, y, width, height = box
    return min(x + width, entry.width) > max(x, 0) and min(y + height, entry.height) > max(y, 0)


def _map(
    check: partial[list[Finding]],
    entries: list[_ImageEntry],
    num_workers: int,
    show_progress: bool,
) -> Iterator[list[Finding]]:
    def with_progress(results: Iterable[list[Finding]]) -> Iterator[list[Finding]]:
        # None: only where standard error is a terminal.
        hidden = None if show_progress else True
        yield from tqdm(results, total=len(entries), unit="image", disable=hidden)

    if num_workers < 1 or len(entries) <= _FILES_PER_TASK:
        yield from with_progress(map(check, entries))
        return
    with ProcessPoolExecutor(num_workers) as executor:
        yield from with_progress(executor.map(check, entries, chunksize=_FILES_PER_TASK))


def _inspect_file(folder: Path, exif: ExifPolicy, entry: _ImageEntry) -> list[Finding]:
    """Opens and decodes one image."""
    problems = _file_problems(folder, exif, entry)
    return [
        Finding(code=code, message=message, file_name=entry.file_name, image_id=entry.image_id)
        for code, message in problems
    ]


def _file_problems(folder: Path, exif: ExifPolicy, entry: _ImageEntry) -> Iterator[tuple[str, str]]:
    try:
        path = resolve_image_path(folder, entry.file_name)
    except ValueError as error:
        yield "unsafe_file_name", str(error)
        return
    if not path.is_file():
        yield "missing_image", f"{path} does not exist"
        return
    try:
        with Image.open(path) as image:
            image.load()
            problems = list(_image_properties(image, exif, entry))
    except Exception as error:  # decoders raise whatever they like on broken files
        yield "unreadable_image", f"{path}: {error}"
        return
    yield from problems


def _image_properties(
    image: Image.Image, exif: ExifPolicy, entry: _ImageEntry
) -> Iterator[tuple[str, str]]:
    height, width = oriented_size(image, exif)
    if (height, width) != (entry.height, entry.width):
        message = f"the file is {width} x {height}, the annotation file says {_size(entry)}"
        other: ExifPolicy = "ignore" if exif == "apply" else "apply"
        if oriented_size(image, other) == (entry.height, entry.width):
            message += f"; the sizes agree with --data.exif {other}"
        yield "wrong_size", message
    orientation = exif_orientation(image)
    if orientation != 1:
        handling = "turned" if exif == "apply" else "not turned"
        message = f"EXIF orientation {orientation}; with --data.exif {exif} it is {handling}"
        yield "exif_rotated", message
    if image.mode in MODES_WITHOUT_RANGE:
        yield "unsupported_mode", f"pixels of mode {image.mode!r} have no 8- or 16-bit range"
    elif image.mode.startswith("I;16"):
        yield "sixteen_bit_image", "16-bit pixels are scaled to 8 bits"
    elif image.mode == "CMYK":
        yield "cmyk_image", "CMYK is converted to RGB without its colour profile"
    elif image.mode in ("1", "L", "LA"):
        yield "grayscale_image", "one channel is copied to three"


def _size(entry: _ImageEntry) -> str:
    return f"{entry.width} x {entry.height}"


def _is_integer(value: Any) -> bool:
    # Not isinstance: true and false are no numbers. Ids are 64 bits wide in training.
    return type(value) is int and -(2**63) <= value < 2**63


def _integer_or_none(record: Any, key: str) -> int | None:
    value = record.get(key) if isinstance(record, dict) else None
    return value if _is_integer(value) else None


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
