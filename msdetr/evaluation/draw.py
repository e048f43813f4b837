"""Detections drawn on images, alone or beside the ground truth."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from msdetr.evaluation.fonts import Font, readable_text

PANEL_SIZE = 448
"""Longer side of a drawn image in pixels: small images are enlarged until their text is legible."""

_FONT_SIZE = 16
_MARGIN = 10
_HEADER = _FONT_SIZE + 8
_BACKGROUND = (250, 250, 250)
_INK = (30, 30, 30)

_Rectangle = tuple[float, float, float, float]
_Color = tuple[int, int, int]


class _Mark(NamedTuple):
    """A box to draw, in pixels of the panel, and its text."""

    box: _Rectangle
    text: str
    font: Font
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
    marks = []
    for index in range(len(boxes)) if scores is None else scores.argsort().tolist():
        label = int(labels[index])
        text, font = readable_text(name_of(label), label, _FONT_SIZE)
        if scores is not None:
            text += f" {float(scores[index]):.2f}"
        box = _inside(boxes[index].tolist(), scale, panel.size)
        marks.append(_Mark(box, text, font, _color(label)))
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
            "draw_comparison needs one or more images and as many truths and detections, got "
            f"{len(images)} images, {len(truth)} truths and {len(detections)} detections"
        )
    panels = []
    caption = f"predictions, score >= {score_threshold:g}"
    for image, annotated, detected in zip(images, truth, detections, strict=True):
        left = draw_detections(image, *annotated, None, name_of, panel_size=panel_size)
        boxes, labels, scores = (column[detected[2] >= score_threshold] for column in detected)
        right = draw_detections(image, boxes, labels, scores, name_of, panel_size=panel_size)
        panels += [(left, "ground truth"), (right, caption)]
    width = max(panel.width for panel, _ in panels)
    height = max(panel.height for panel, _ in panels) + _HEADER
    tiles = [_tile(panel, caption, (width, height)) for panel, caption in panels]
    grid = make_grid(tiles, nrow=2 * columns, padding=_MARGIN, pad_value=_BACKGROUND[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(grid).save(path, format="PNG")


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
    """Draws boxes in order, then texts from the last mark to the first, so that none hides another
    if there is a free place.

    torchvision's `draw_bounding_boxes` would write all texts at the same corner of their boxes.
    """
    draw = ImageDraw.Draw(panel)
    for mark in marks:
        # A dark edge keeps a box visible on a background of its own colour.
        x0, y0, x1, y1 = mark.box
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=_INK, width=4)
        draw.rectangle(mark.box, outline=mark.color, width=2)
    taken: list[_Rectangle] = []
    for mark in reversed(marks):
        place = _text_place(mark, panel.size, taken)
        taken.append(place)
        draw.rectangle(place, fill=mark.color)
        middle = (place[1] + place[3]) / 2
        ink = _INK if _luminance(mark.color) > 0.5 else _BACKGROUND
        draw.text((place[0] + 3, middle), mark.text, fill=ink, font=mark.font, anchor="lm")


def _text_place(mark: _Mark, panel: tuple[int, int], taken: Sequence[_Rectangle]) -> _Rectangle:
    """The first place at the box, inside the panel, that overlaps no text placed before."""
    x0, y0, x1, y1 = mark.box
    left, _, right, _ = mark.font.getbbox(mark.text)
    width, height = right - left + 6, _FONT_SIZE + 4
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


def _luminance(color: _Color) -> float:
    red, green, blue = color
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255


def _tile(panel: Image.Image, caption: str, size: tuple[int, int]) -> Tensor:
    """[3, height, width] uint8, the panel with a caption over it."""
    tile = Image.new("RGB", size, _BACKGROUND)
    font = ImageFont.load_default(_FONT_SIZE)
    ImageDraw.Draw(tile).text((0, _HEADER / 2), caption, fill=_INK, font=font, anchor="lm")
    tile.paste(panel, (0, _HEADER))
    tensor: Tensor = pil_to_tensor(tile)
    return tensor
