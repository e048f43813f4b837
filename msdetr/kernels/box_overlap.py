"""Device functions on boxes, with the arithmetic of `msdetr.boxes`: safe on degenerate boxes."""

from __future__ import annotations

import triton
import triton.language as tl

_SMALLEST_AREA = tl.constexpr(1e-30)


@triton.jit
def load_box(pointer, stride, mask):
    """(x, y, width, height) in float32 of boxes whose first coordinate is at `pointer`."""
    x = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(pointer + stride, mask=mask, other=0.0).to(tl.float32)
    width = tl.load(pointer + 2 * stride, mask=mask, other=0.0).to(tl.float32)
    height = tl.load(pointer + 3 * stride, mask=mask, other=0.0).to(tl.float32)
    return x, y, width, height


@triton.jit
def to_corners(x, y, width, height):
    """(x0, y0, x1, y1)"""
    return x - 0.5 * width, y - 0.5 * height, x + 0.5 * width, y + 0.5 * height


@triton.jit
def intersection_and_union(ax0, ay0, ax1, ay1, bx0, by0, bx1, by1):
    """Areas of the intersection and union of corner boxes."""
    width = tl.maximum(tl.minimum(ax1, bx1) - tl.maximum(ax0, bx0), 0.0)
    height = tl.maximum(tl.minimum(ay1, by1) - tl.maximum(ay0, by0), 0.0)
    intersection = width * height
    area_a = (ax1 - ax0) * (ay1 - ay0)
    area_b = (bx1 - bx0) * (by1 - by0)
    return intersection, area_a + area_b - intersection


@triton.jit
def quotient(numerator, area):
    """numerator / area, rounded to nearest; areas below the smallest are replaced by 1."""
    return tl.div_rn(numerator, tl.where(area > _SMALLEST_AREA, area, 1.0))


@triton.jit
def is_finite(x):
    """Whether x is neither NaN nor infinite."""
    return tl.abs(x) < float("inf")
