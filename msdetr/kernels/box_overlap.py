"""Device functions on boxes, with the arithmetic of `msdetr.boxes`: safe on degenerate boxes."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

_SMALLEST_AREA = tl.constexpr(1e-30)


class Box(NamedTuple):
    """Boxes in float32, by centre and by corners."""

    x: Any
    y: Any
    width: Any
    height: Any
    x0: Any
    y0: Any
    x1: Any
    y1: Any


@triton.jit
def load_box(pointer, stride, mask):
    """Boxes whose first coordinate (cxcywh) is at `pointer`."""
    x = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(pointer + stride, mask=mask, other=0.0).to(tl.float32)
    width = tl.load(pointer + 2 * stride, mask=mask, other=0.0).to(tl.float32)
    height = tl.load(pointer + 3 * stride, mask=mask, other=0.0).to(tl.float32)
    x0, y0 = x - 0.5 * width, y - 0.5 * height
    return Box(x, y, width, height, x0, y0, x + 0.5 * width, y + 0.5 * height)


@triton.jit
def intersection_and_union(a, b):
    """Areas of the intersection and union of boxes."""
    width = tl.maximum(tl.minimum(a.x1, b.x1) - tl.maximum(a.x0, b.x0), 0.0)
    height = tl.maximum(tl.minimum(a.y1, b.y1) - tl.maximum(a.y0, b.y0), 0.0)
    intersection = width * height
    area_a = (a.x1 - a.x0) * (a.y1 - a.y0)
    area_b = (b.x1 - b.x0) * (b.y1 - b.y0)
    return intersection, area_a + area_b - intersection


@triton.jit
def quotient(numerator, area, EPS: tl.constexpr = 0.0):
    """numerator / (area + EPS), rounded to nearest; a sum below the smallest area counts as 1."""
    if EPS != 0.0:
        area += EPS
    return tl.div_rn(numerator, tl.where(area > _SMALLEST_AREA, area, 1.0))


@triton.jit
def is_finite(x):
    """Whether x is neither NaN nor infinite."""
    return tl.abs(x) < float("inf")
