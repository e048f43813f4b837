"""Findings: problems of a data set with severity, place and cure.

Training and the doctor share one list of checks. Training refuses every finding of severity
`error`. The doctor also reports warnings and notes, and decodes the image files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

Severity = Literal["error", "warning", "note"]

_MAX_SHOWN = 5


class Check(NamedTuple):
    """A kind of finding."""

    severity: Severity
    cure: str
    """The cure: what to do about it."""


_CURE_ENTRY = "correct the entry or remove it"
_CURE_FILE = "replace the file, or remove the image and its boxes"
CHECKS: dict[str, Check] = {
    # Training refuses these.
    "invalid_categories": Check("error", "give every category a unique integer id and a name"),
    "category_mismatch": Check("error", "use the same ids and names in all splits"),
    "malformed_image": Check("error", _CURE_ENTRY),
    "malformed_annotation": Check("error", _CURE_ENTRY),
    "duplicate_image_id": Check("error", "number the images anew"),
    "duplicate_annotation_id": Check("error", "number the annotations anew"),
    "unknown_image": Check("error", "add the image or remove the annotation"),
    "unknown_category": Check("error", "add the category or remove the annotation"),
    "nan_box": Check("error", _CURE_ENTRY),
    "unsafe_file_name": Check("error", "use paths relative to the image folder, without links"),
    "missing_image": Check("error", "copy the file to the image folder, or correct its name"),
    "unreadable_image": Check("error", _CURE_FILE),
    "wrong_size": Check("error", "write the size of the file, or see --data.exif"),
    "unsupported_mode": Check("error", "convert the image to 8 bits per channel"),
    # Training goes on: boxes are clipped or left out, pixels are converted.
    "degenerate_box": Check("warning", "none needed if the box may be left out"),
    "box_outside": Check("warning", "compare the boxes with the image; [x, y, width, height]?"),
    "crowd_flag_text": Check("warning", "write iscrowd as the number 0 or 1"),
    "malformed_area": Check("warning", "write the area as a number"),
    "duplicate_file_name": Check("warning", "list each file once, with all its boxes"),
    "exif_rotated": Check("warning", "check whether the boxes are those of the turned image"),
    "cmyk_image": Check("warning", "convert the image to RGB"),
    "sixteen_bit_image": Check("warning", "convert the image to 8 bits yourself"),
    # For information.
    "grayscale_image": Check("note", "none needed"),
    "image_without_boxes": Check("note", "none needed if the image shows background only"),
}
"""All checks by code, the most severe first."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One problem in one place."""

    code: str
    """Key of `CHECKS`."""
    message: str
    """Description of the problem, with the values."""
    file_name: str | None = None
    """Image file, as the annotation file names it."""
    image_id: int | None = None
    """Image concerned, where its id is known."""
    annotation_id: int | None = None
    """Annotation concerned, where its id is known."""

    @property
    def severity(self) -> Severity:
        """Severity of the check."""
        return CHECKS[self.code].severity

    @property
    def cure(self) -> str:
        """The cure: what to do about it."""
        return CHECKS[self.code].cure

    def __str__(self) -> str:
        """Place and message in one line."""
        places = {
            "image": self.image_id,
            "annotation": self.annotation_id,
            "file": self.file_name,
        }
        known = [f"{kind} {value}" for kind, value in places.items() if value is not None]
        return ": ".join([*([", ".join(known)] if known else []), self.message])

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, with severity and cure."""
        return {"severity": self.severity, **asdict(self), "cure": self.cure}


def refuse_errors(findings: Sequence[tuple[Path, Sequence[Finding]]]) -> None:
    """Reports all errors of all files at once.

    Args:
        findings: annotation files with their findings.

    Raises:
        ValueError: there are findings of severity `error`. The message shows the first ones of each
            file, counts the others by code, and names the command that lists all.
    """
    lines = []
    num_errors = 0
    for file, of_file in findings:
        errors = [finding for finding in of_file if finding.severity == "error"]
        num_errors += len(errors)
        more = Counter(finding.code for finding in errors[_MAX_SHOWN:])
        lines += [f"{file}: {finding}" for finding in errors[:_MAX_SHOWN]]
        lines += [f"{file}: {count} more of {code}" for code, count in more.items()]
    if num_errors:
        title = f"{num_errors} error(s) in the annotations; `msdetr doctor` lists all findings"
        raise ValueError("\n  ".join([title, *lines]))
