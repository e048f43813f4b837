"""A small generated data set: coloured shapes on cluttered backgrounds, in COCO layout.

It serves to try the whole path from files to mAP within minutes, on a machine without data. Classes
differ in form only, not in colour or size. Shapes are tilted and overlap a little, among lines and
dots that belong to no class.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

CLASS_NAMES = ("circle", "square", "triangle", "star")
"""Category ids are 1 to 4, in this order."""

_MARKER = "synthetic.json"
_VERSION = 1  # raised when the same parameters give other files
_SIZES = (20, 60)  # minimum and maximum extent of a shape before rotation, in pixels
_MAX_SHAPES = 5
_MIN_VISIBLE = 0.65  # share of a shape that later shapes must leave uncovered
_MIN_CONTRAST = 90.0  # distance in RGB between a shape and its background
_MAX_TILT = math.radians(20)
_SUPERSAMPLING = 4
_PLACEMENT_ATTEMPTS = 20

Mask = NDArray[np.bool_]
Pixels = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class _Parameters:
    """What decides the files; written into the set, to recognise it."""

    num_train: int
    num_val: int
    size: int
    seed: int
    version: int = _VERSION


class _Shape(NamedTuple):
    label: int
    """Position in `CLASS_NAMES`."""
    mask: Mask
    """[size, size], the pixels that are at least half inside, visible or not."""


def write_synthetic_dataset(
    root: Path, *, num_train: int, num_val: int, size: int = 128, seed: int = 0
) -> None:
    """Writes the set to `root` in the layout of the COCO download, unless it is there already.

    The same arguments give the same bytes. The set is written to `<root>.partial` and renamed when
    it is complete; another synthetic set in `root` is replaced.

    Args:
        root: folder to write, with `train2017/`, `val2017/` and `annotations/`.
        num_train: training images.
        num_val: validation images.
        size: height and width of the images, at least 64.
        seed: decides everything else.

    Raises:
        ValueError: `root` holds something else, or a number is out of range.
    """
    if size < 64 or num_train < 1 or num_val < 1:
        raise ValueError(
            f"a synthetic set needs images of at least 64 pixels and at least one per split, got "
            f"size={size}, num_train={num_train}, num_val={num_val}"
        )
    parameters = _Parameters(num_train=num_train, num_val=num_val, size=size, seed=seed)
    marker = root / _MARKER
    if marker.is_file() and json.loads(marker.read_text()) == asdict(parameters):
        return
    if root.is_file() or (root.exists() and not marker.is_file() and any(root.iterdir())):
        raise ValueError(f"{root}: holds something other than a synthetic set; name another folder")

    partial = root.with_name(f"{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "annotations").mkdir(parents=True)
    for split_index, (split, count) in enumerate((("train", num_train), ("val", num_val))):
        _write_split(partial, split, count, size, (seed, split_index))
    (partial / _MARKER).write_text(json.dumps(asdict(parameters)))
    if root.exists():
        shutil.rmtree(root)
    partial.rename(root)


def _write_split(root: Path, split: str, count: int, size: int, key: tuple[int, int]) -> None:
    folder = root / f"{split}2017"
    folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, count + 1):
        rng = np.random.default_rng(np.random.SeedSequence((*key, image_id)))
        pixels, shapes = _draw_image(size, rng)
        file_name = f"{image_id:012d}.jpg"
        Image.fromarray(pixels).save(folder / file_name, quality=92)
        images.append({"id": image_id, "file_name": file_name, "width": size, "height": size})
        for shape in shapes:
            annotation = _annotation(shape)
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
    content = {
        "info": {"description": f"synthetic shapes, {split} split, made by msdetr"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASS_NAMES, start=1)],
    }
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def _annotation(shape: _Shape) -> dict[str, Any]:
    """Category, tight box and area of the visible part of a shape."""
    rows, columns = (np.flatnonzero(shape.mask.any(axis=axis)) for axis in (1, 0))
    x, y = int(columns[0]), int(rows[0])
    width, height = int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y
    return {
        "category_id": shape.label + 1,
        "bbox": [x, y, width, height],
        "area": int(shape.mask.sum()),
        "iscrowd": 0,
    }


def _draw_image(size: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], list[_Shape]]:
    """Pixels [size, size, 3] and the visible part of every shape."""
    pixels = _draw_background(size, rng)
    shapes: list[_Shape] = []
    full_areas: list[int] = []
    for _ in range(rng.integers(1, _MAX_SHAPES, endpoint=True)):
        for _ in range(_PLACEMENT_ATTEMPTS):
            label, coverage = _draw_shape(size, rng)
            mask = coverage >= 0.5
            visible = [_Shape(shape.label, shape.mask & ~mask) for shape in shapes]
            if all(
                shape.mask.sum() >= _MIN_VISIBLE * area
                for shape, area in zip(visible, full_areas, strict=True)
            ):
                _paint(pixels, coverage, rng)
                shapes = [*visible, _Shape(label, mask)]
                full_areas.append(int(mask.sum()))
                break
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * rng.uniform(2, 10)
    return (pixels + noise).clip(0, 255).astype(np.uint8), shapes


def _draw_background(size: int, rng: np.random.Generator) -> Pixels:
    """A gradient between two colours, blotches, and clutter of thin lines and dots."""
    first, second = rng.uniform(30, 225, (2, 3)).astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    ramp = 0.5 + axis[:, None] * np.float32(math.sin(angle)) + axis * np.float32(math.cos(angle))
    gradient = first + (second - first) * ramp[..., None].clip(0, 1)
    blotches = Image.fromarray(rng.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8))
    texture = np.asarray(blotches.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    pixels = gradient + (texture - 128) * np.float32(rng.uniform(0.05, 0.3))

    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 6, endpoint=True)):
        line = tuple(rng.integers(0, size, 4).tolist())
        draw.line(line, fill=_random_color(rng), width=int(rng.integers(1, 2, endpoint=True)))
    for _ in range(rng.integers(0, 15, endpoint=True)):
        x, y = rng.integers(0, size, 2).tolist()
        radius = int(rng.integers(1, 3, endpoint=True))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_random_color(rng))
    return np.array(image, dtype=np.float32)


def _draw_shape(size: int, rng: np.random.Generator) -> tuple[int, Pixels]:
    """A class and how much of each pixel its shape covers, [size, size] in [0, 1]."""
    label = int(rng.integers(len(CLASS_NAMES)))
    # Uniform in the logarithm: small shapes are as frequent as large ones.
    low, high = _SIZES
    extent = math.exp(rng.uniform(math.log(low), math.log(high)))
    outline = _outline(CLASS_NAMES[label], rng.uniform(-_MAX_TILT, _MAX_TILT))
    outline *= extent / np.ptp(outline, axis=0).max()
    # The outline's bounding box lies inside the image, at any place.
    low_corner, high_corner = outline.min(axis=0), outline.max(axis=0)
    outline += rng.uniform(-low_corner, size - high_corner)

    first = np.maximum(np.floor(outline.min(axis=0)).astype(int) - 1, 0)
    last = np.minimum(np.ceil(outline.max(axis=0)).astype(int) + 1, size)
    width, height = (last - first).tolist()
    patch = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    points = ((outline - first) * _SUPERSAMPLING).ravel().tolist()
    ImageDraw.Draw(patch).polygon(points, fill=255)
    coverage = np.zeros((size, size), dtype=np.float32)
    window = np.asarray(patch.reduce(_SUPERSAMPLING), dtype=np.float32) / 255
    coverage[first[1] : last[1], first[0] : last[0]] = window
    return label, coverage


def _outline(name: str, tilt: float) -> NDArray[np.float64]:
    """Corners of a shape, upright but for `tilt` in radians."""
    num_corners = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[name]
    # The first corner points up, a square lies on its side.
    first = -math.pi / 2 + (math.pi / 4 if name == "square" else 0.0)
    angle = first + tilt + np.arange(num_corners) * (2 * math.pi / num_corners)
    radius = np.ones(num_corners)
    if name == "star":
        radius[1::2] = 0.42
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1)


def _paint(pixels: Pixels, coverage: Pixels, rng: np.random.Generator) -> None:
    """Blends a shape into `pixels` in a colour that stands out, with a little shading."""
    behind = pixels[coverage > 0].mean(axis=0)
    color = np.array(_random_color(rng), dtype=np.float32)
    while np.linalg.norm(color - behind) < _MIN_CONTRAST:
        color = np.array(_random_color(rng), dtype=np.float32)
    size = len(pixels)
    shading = np.linspace(-1, 1, size, dtype=np.float32) * np.float32(rng.uniform(-25, 25))
    pixels += coverage[..., None] * (color + shading[:, None, None] - pixels)


def _random_color(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue
