"""`msdetr doctor DATASET`: check a data set before hours are spent on it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from msdetr.cli.options import parse_options, user_errors
from msdetr.config import DataConfig

if TYPE_CHECKING:
    from msdetr.data.inspect import Report

_EXAMPLES = 3
"""Findings of each kind that are printed in full."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Check annotations and images, and decode every file.

    Training refuses errors. It continues after warnings, and clips, converts or drops the entry.
    Notes are for information. The exit status is 0 without errors, 1 with errors, and 2 if the data
    set cannot be checked.
    """

    dataset: tyro.conf.Positional[Path | None] = None
    """Folder in the layout of the COCO download: `train2017/`, `val2017/`, `annotations/`."""
    split: Literal["train", "val", "both"] = "both"
    """Splits of DATASET to check."""
    images: Path | None = None
    """Folder of images, with `annotations` instead of DATASET."""
    annotations: Path | None = None
    """Annotation file (COCO JSON), with `images` instead of DATASET."""
    report: Path | None = None
    """Write every finding into this JSON file."""
    label_layout: Literal["auto", "coco", "contiguous"] = "auto"
    """How category ids are to become labels, as in training."""
    exif: Literal["ignore", "apply"] = "ignore"
    """EXIF rotation of photographs, as in training."""
    num_workers: int = os.cpu_count() or 1
    """Processes that decode images; 0 decodes in the main process."""

    def __post_init__(self) -> None:
        has_files = (self.images is not None, self.annotations is not None)
        if any(has_files) != all(has_files):
            raise ValueError("--images and --annotations belong together: give both or none")
        if any(has_files) == (self.dataset is not None):
            raise ValueError("give either DATASET, or --images and --annotations")


def main(arguments: Sequence[str] | None = None, *, prog: str = "msdetr doctor") -> int:
    """Check, print a summary, write the report, and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_options(DoctorOptions, arguments, prog=prog)
    from msdetr.data.inspect import inspect_splits

    reports = []
    with user_errors():
        for report in inspect_splits(
            _splits(options),
            label_layout=options.label_layout,
            exif=options.exif,
            num_workers=options.num_workers,
            show_progress=True,
        ):
            reports.append(report)
            print(summary(report))
        if options.report is not None:
            content = {"splits": [report.to_dict() for report in reports]}
            options.report.write_text(json.dumps(content, indent=2) + "\n")
            print(f"wrote {options.report}")
    return 1 if any(report.count("error") for report in reports) else 0


def summary(report: Report) -> str:
    """Counts, class histogram and examples of each kind of finding, for the terminal."""
    lines = [
        f"{report.annotation_file}",
        f"  {report.num_images} images ({report.num_images_without_boxes} without boxes), "
        f"{report.num_annotations} annotations ({report.num_crowds} crowds)",
        *_histogram(report.class_histogram),
        *_findings(report),
        f"  {report.count('error')} errors, {report.count('warning')} warnings, "
        f"{report.count('note')} notes",
    ]
    # Names may hold surrogates, which no terminal can show.
    return "\n".join(lines).encode(errors="backslashreplace").decode()


def _splits(options: DoctorOptions) -> list[tuple[Path, Path]]:
    """(image folder, annotation file) of each split to check."""
    from msdetr.data.paths import Split, resolve_split

    if options.images is not None and options.annotations is not None:
        config = DataConfig(val_images=options.images, val_annotations=options.annotations)
        splits: tuple[Split, ...] = ("val",)
    else:
        config = DataConfig(root=options.dataset)
        splits = ("train", "val") if options.split == "both" else (options.split,)
    try:
        return [resolve_split(config, split) for split in splits]
    except ValueError as error:
        raise ValueError(
            f"{error} (for the doctor: DATASET, or --images and --annotations; --split train or "
            "--split val checks one split)"
        ) from None


def _histogram(boxes: dict[str, int]) -> Iterator[str]:
    width = max(map(len, boxes), default=0)
    largest = max(boxes.values(), default=0)
    for name, count in boxes.items():
        bar = "#" * round(30 * count / largest) if largest else ""
        yield f"  {name:<{width}} {count:>8} {bar}".rstrip()


def _findings(report: Report) -> Iterator[str]:
    from msdetr.annotations.findings import CHECKS

    for code, check in CHECKS.items():  # in order of severity
        same = [finding for finding in report.findings if finding.code == code]
        if not same:
            continue
        yield f"  {check.severity}: {code} ({len(same)}): {check.cure}"
        yield from (f"    {finding}" for finding in same[:_EXAMPLES])
        if len(same) > _EXAMPLES:
            yield "    ..."
