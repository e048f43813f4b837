"""Detections drawn on images, and beside the ground truth, for people to look at."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PANEL_SIZE = 448
"""Longer side of a drawn image in pixels: small images are enlarged until their text is legible."""

_FONT_SIZE = 16
_MARGIN = 20
_BACKGROUND = (250, 250, 250)
_INK = (30, 30, 30)

_Rectangle = tuple[float, float, float, float]
_Color = tuple[int, int, int]
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class _Mark(NamedTuple):
    """A box to draw, in pixels of the panel, and what is written at it."""

    box: _Rectangle
    text: str
    color: _Color


def draw_detections(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    scores: Tensor | None,
    name_of: Callable[[int], str],
    *,
    panel_size: int = PANEL_SIZE,
) -> Image.Image:
    """Draw boxes with class names, and scores where there are any, on one image.

    Args:
        image: [3, H, W] uint8 RGB.
        boxes: [n, 4] (x0, y0, x1, y1) in pixels of `image`.
        labels: [n]; a label has the same colour in every image.
        scores: [n] or None. Better boxes are drawn over worse ones.
        name_of: class name of a label.
        panel_size: longer side of the result in pixels; the image is scaled to it.

    Raises:
        ValueError: `image` is not [3, H, W] uint8.
    """
    panel, scale = _enlarged(image, panel_size)
    order = range(len(boxes)) if scores is None else scores.argsort().tolist()
    marks = [
        _Mark(
            box=_inside(boxes[index].tolist(), scale, panel.size),
            text=name_of(int(labels[index]))
            + ("" if scores is None else f" {float(scores[index]):.2f}"),
            color=_color(int(labels[index])),
        )
        for index in order
    ]
    _draw_marks(panel, marks)
    return panel


def draw_comparison(
    path: Path,
    images: Sequence[Tensor],
    truth: Sequence[tuple[Tensor, Tensor]],
    detections: Sequence[tuple[Tensor, Tensor, Tensor]],
    name_of: Callable[[int], str],
    *,
    score_threshold: float = 0.3,
    panel_size: int = PANEL_SIZE,
    columns: int = 2,
) -> None:
    """Write a PNG of image pairs: ground truth on the left, predictions on the right.

    Args:
        path: the PNG; its folder is made.
        images: [3, H, W] uint8 RGB each, of any sizes.
        truth: boxes [n, 4] and labels [n] of each image.
        detections: boxes [m, 4], labels [m] and scores [m] of each image. All boxes are
            (x0, y0, x1, y1) in pixels of their image.
        name_of: class name of a label.
        score_threshold: detections below are left out.
        panel_size: longer side of each drawn image in pixels.
        columns: pairs side by side.

    Raises:
        ValueError: there is no image, or not one truth and one set of detections for each.
    """
    if not images or not len(images) == len(truth) == len(detections):
        raise ValueError(
            "draw_comparison needs at least one image and as many truths and detections, got "
            f"{len(images)} images, {len(truth)} truths and {len(detections)} detections"
        )
    pairs = []
    for image, annotated, found in zip(images, truth, detections, strict=True):
        left = draw_detections(image, *annotated, None, name_of, panel_size=panel_size)
        boxes, labels, scores = (column[found[2] >= score_threshold] for column in found)
        right = draw_detections(image, boxes, labels, scores, name_of, panel_size=panel_size)
        pairs.append(_pair(left, right, f"predictions, score >= {score_threshold:g}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    _grid(pairs, columns).save(path, format="PNG")


def _enlarged(image: Tensor, panel_size: int) -> tuple[Image.Image, float]:
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
        raise ValueError(
            f"an image to draw on is [3, H, W] uint8, got {list(image.shape)} {image.dtype}"
        )
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    scale = panel_size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC), scale


def _inside(box: Sequence[float], scale: float, panel: tuple[int, int]) -> _Rectangle:
    """A box of the image in pixels of its panel, cut at the panel's edges to show all its sides."""
    x0, x1 = (max(0.0, min(x * scale, panel[0] - 1)) for x in sorted(box[0::2]))
    y0, y1 = (max(0.0, min(y * scale, panel[1] - 1)) for y in sorted(box[1::2]))
    return x0, y0, x1, y1


def _color(label: int) -> _Color:
    """Hues a golden angle apart: neighbouring labels differ clearly, whatever their number."""
    hue = (0.02 + label * 0.618034) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def _draw_marks(panel: Image.Image, marks: Sequence[_Mark]) -> None:
    """Boxes first, in order; then the texts, the last mark's first, where they hide no other."""
    draw = ImageDraw.Draw(panel)
    for mark in marks:
        # A dark edge keeps a box visible on a ground of its own colour.
        draw.rectangle(_grown(mark.box, 1), outline=_INK, width=4)
        draw.rectangle(mark.box, outline=mark.color, width=2)
    font = ImageFont.load_default(_FONT_SIZE)
    taken: list[_Rectangle] = []
    for mark in reversed(marks):
        place = _text_place(mark, _text_size(mark.text, font), panel.size, taken)
        taken.append(place)
        draw.rectangle(place, fill=mark.color)
        middle = (place[1] + place[3]) / 2
        ink = _INK if _luminance(mark.color) > 0.5 else _BACKGROUND
        draw.text((place[0] + 3, middle), mark.text, fill=ink, font=font, anchor="lm")


def _text_size(text: str, font: _Font) -> tuple[float, float]:
    left, _, right, _ = font.getbbox(text)
    return right - left + 6, _FONT_SIZE + 4


def _text_place(
    mark: _Mark, size: tuple[float, float], panel: tuple[int, int], taken: Sequence[_Rectangle]
) -> _Rectangle:
    """The first place at the box, inside the panel, that overlaps no text placed before."""
    (x0, y0, x1, y1), (width, height) = mark.box, size
    candidates = [
        (x0, y0 - height),  # above
        (x0, y1),  # below
        (x0, y0),  # inside, top
        (x0, y1 - height),  # inside, bottom
        (x1 - width, y0 - height),  # above, right edge
        (x1 - width, y1),
        (x1, y0),  # beside
        (x0 - width, y0),
    ]
    places = []
    for left, top in candidates:
        left = max(0.0, min(left, panel[0] - width))
        top = max(0.0, min(top, panel[1] - height))
        places.append((left, top, left + width, top + height))
    return min(places, key=lambda place: sum(_overlap(place, other) for other in taken))


def _overlap(a: _Rectangle, b: _Rectangle) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _grown(box: _Rectangle, by: float) -> _Rectangle:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def _luminance(color: _Color) -> float:
    red, green, blue = color
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255


def _pair(truth: Image.Image, detections: Image.Image, caption: str) -> Image.Image:
    """Two panels of one size side by side, with a caption over each."""
    font = ImageFont.load_default(_FONT_SIZE)
    header = _FONT_SIZE + 8
    gap = _MARGIN // 4
    size = (truth.width + gap + detections.width, header + truth.height)
    pair = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(pair)
    for panel, left, text in (
        (truth, 0, "ground truth"),
        (detections, truth.width + gap, caption),
    ):
        draw.text((left, header / 2), text, fill=_INK, font=font, anchor="lm")
        pair.paste(panel, (left, header))
    return pair


def _grid(pairs: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pairs row by row, `columns` in a row, each row as high as its highest pair."""
    rows = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    cell_width = max(pair.width for pair in pairs)
    heights = [max(pair.height for pair in row) for row in rows]
    width = _MARGIN + min(columns, len(pairs)) * (cell_width + _MARGIN)
    height = _MARGIN + sum(row_height + _MARGIN for row_height in heights)
    grid = Image.new("RGB", (width, height), _BACKGROUND)
    top = _MARGIN
    for row, row_height in zip(rows, heights, strict=True):
        for column, pair in enumerate(row):
            grid.paste(pair, (_MARGIN + column * (cell_width + _MARGIN), top))
        top += row_height + _MARGIN
    return grid
