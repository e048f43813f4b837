"""Image files: decoding to RGB, one EXIF policy.

Pillow decodes. A photograph may be stored rotated, with an EXIF tag that says how to turn it: the
policy `ignore` takes the stored pixels (COCO's boxes are drawn on those), `apply` turns them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

ExifPolicy = Literal["ignore", "apply"]

_TRANSPOSING_ORIENTATIONS = (5, 6, 7, 8)
_DRAFT_SCALES = (1, 2, 4, 8)
MODES_WITHOUT_RANGE = ("I", "F")
"""Pillow's modes whose values have no 8- or 16-bit range, so that white is not defined."""


class DecodedImage(NamedTuple):
    """An image, perhaps decoded smaller than it is stored."""

    image: Image.Image
    """RGB."""
    scale: int
    """Pixel (x, y) covers the stored pixels `[x * scale, (x + 1) * scale)` and the same in y."""


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 where the file does not say."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in range(1, 9) else 1


def oriented_size(image: Image.Image, exif: ExifPolicy) -> tuple[int, int]:
    """(height, width) that an opened image has under the policy."""
    width, height = image.size
    if exif == "apply" and exif_orientation(image) in _TRANSPOSING_ORIENTATIONS:
        return width, height
    return height, width


def decode_image(
    path: Path,
    *,
    exif: ExifPolicy = "ignore",
    expected_size: tuple[int, int] | None = None,
    max_scale: int = 1,
) -> DecodedImage:
    """Decodes an image file to 8-bit RGB.

    Args:
        path: the file; any format that Pillow reads.
        exif: whether to turn a photograph as its EXIF tag says.
        expected_size: (height, width) that the annotation file gives, after turning.
        max_scale: at least 1. JPEG files are reduced while decoding by the largest factor of 1, 2,
            4, 8 up to this, which is several times faster than decoding all pixels.

    Raises:
        ValueError: missing, unreadable or truncated file, a size other than `expected_size`, or
            pixels without an 8- or 16-bit range.
    """
    try:
        with Image.open(path) as image:
            size = oriented_size(image, exif)
            if expected_size is None or size == expected_size:
                return _decode(image, exif, max_scale)
    except FileNotFoundError:
        raise ValueError(f"{path}: the image does not exist") from None
    except Exception as error:  # decoders raise whatever they like on broken files
        raise ValueError(f"{path}: cannot decode the image: {error}") from error
    raise ValueError(
        f"{path}: the image is {size[1]} x {size[0]} (width x height), but the annotation file "
        f"says {expected_size[1]} x {expected_size[0]}; run `msdetr doctor` on the data set"
    )


def _decode(image: Image.Image, exif: ExifPolicy, max_scale: int) -> DecodedImage:
    turned = exif == "apply" and exif_orientation(image) != 1
    # The last row and column of a scaled image may cover less than `scale` pixels. Turning would
    # put them first, so that `scale` alone could not say which pixels they cover.
    scale = 1 if turned else _draft(image, max_scale)
    if turned:
        image = ImageOps.exif_transpose(image)
    if image.mode in MODES_WITHOUT_RANGE:
        raise ValueError(f"mode {image.mode!r} has no 8- or 16-bit range; convert it to 8 bits")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode != "RGB":  # `convert` would copy it.
        image = image.convert("RGB")
    image.load()
    return DecodedImage(image, scale)


def _draft(image: Image.Image, max_scale: int) -> int:
    """Asks the decoder for a smaller image and returns the scale that it chose."""
    scale = max(s for s in _DRAFT_SCALES if s <= max_scale)
    width, height = image.size
    answer = image.draft("RGB", (max(width // scale, 1), max(height // scale, 1)))
    return 1 if answer is None else round(width / answer[1][2])
