"""Checks of a data set before hours are spent on it: every annotation, every image file.

The checks of annotations are those of training. The checks of image files, which training meets one
by one as it decodes them, are made here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.concurrent import process_map

from msdetr.annotations.checks import check_table, read_annotations
from msdetr.annotations.file_names import resolve_image_path
from msdetr.annotations.findings import Finding, Severity
from msdetr.annotations.labels import LabelLayout
from msdetr.annotations.table import AnnotationTable
from msdetr.data.images import MODES_WITHOUT_RANGE, ExifPolicy, exif_orientation, oriented_size

_FILES_PER_TASK = 32


@dataclass(frozen=True, kw_only=True)
class Report:
    """Findings and counts of one annotation file and its images."""

    annotation_file: Path
    image_folder: Path
    num_images: int
    """Sound entries of the annotation file."""
    num_annotations: int
    """Sound entries of the annotation file."""
    num_crowds: int
    """Sound annotations of crowds: not trained on."""
    num_images_without_boxes: int
    """Images without a box to train on."""
    class_histogram: dict[str, int]
    """Boxes to train on, by category name, in the order of category ids."""
    findings: tuple[Finding, ...]

    def count(self, severity: Severity) -> int:
        """Number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            **vars(self),
            "annotation_file": str(self.annotation_file),
            "image_folder": str(self.image_folder),
            "num_errors": self.count("error"),
            "num_warnings": self.count("warning"),
            "findings": [finding.to_dict() for finding in self.findings],
        }


class _ImageEntry(NamedTuple):
    image_id: int
    file_name: str
    height: int
    width: int


def inspect_splits(
    splits: Sequence[tuple[Path, Path]],
    *,
    label_layout: LabelLayout = "auto",
    exif: ExifPolicy = "ignore",
    num_workers: int = 0,
    show_progress: bool = False,
) -> Iterator[Report]:
    """Checks annotation files and decodes every image that they name; one report per split.

    Args:
        splits: (image folder, annotation file) pairs; the first file decides about the labels.
        label_layout: how category ids are to become labels.
        exif: the policy that sizes are compared under.
        num_workers: processes that decode; 0 decodes in this one.
        show_progress: a progress bar on standard error, if that is a terminal.

    Raises:
        ValueError: a file cannot be read, is not JSON or lacks one of the three lists.
    """
    results = read_annotations([file for _, file in splits], label_layout)
    for (folder, _), (table, _, errors) in zip(splits, results, strict=True):
        findings = [*errors, *check_table(table)]
        # Names that were refused are not looked up.
        refused = {f.image_id for f in findings if f.code == "unsafe_file_name"}
        entries = [
            _ImageEntry(image_id, table.file_name(index), *table.sizes[index].tolist())
            for index, image_id in enumerate(table.image_ids.tolist())
            if image_id not in refused
        ]
        check = partial(_inspect_file, folder, exif)
        for file_findings in _map(check, entries, num_workers, show_progress):
            findings += file_findings
        yield _report(table, folder, findings)


def _report(table: AnnotationTable, folder: Path, findings: Sequence[Finding]) -> Report:
    _, is_used = table.clipped_boxes()
    num_boxes = np.bincount(table.category_index.numpy()[is_used], minlength=len(table.categories))
    class_histogram: Counter[str] = Counter()  # categories may share a name
    for name, count in zip(table.category_names, num_boxes.tolist(), strict=True):
        class_histogram[name] += count
    return Report(
        annotation_file=table.source,
        image_folder=folder,
        num_images=len(table),
        num_annotations=len(table.boxes),
        num_crowds=int(table.is_crowd.sum()),
        num_images_without_boxes=sum(f.code == "image_without_boxes" for f in findings),
        class_histogram=dict(class_histogram),
        findings=tuple(findings),
    )


def _map(
    check: partial[list[Finding]], entries: list[_ImageEntry], num_workers: int, show_progress: bool
) -> Iterable[list[Finding]]:
    # None: only where standard error is a terminal.
    hidden = None if show_progress else True
    if num_workers < 1 or len(entries) <= _FILES_PER_TASK:
        return tqdm(map(check, entries), total=len(entries), unit="image", disable=hidden)
    results: list[list[Finding]] = process_map(
        check,
        entries,
        max_workers=num_workers,
        chunksize=_FILES_PER_TASK,
        unit="image",
        disable=hidden,
    )
    return results


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
