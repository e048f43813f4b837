"""Box formats and overlaps. Safe on degenerate boxes: no division by zero, no assertion."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_AREA = 1e-30
"""Smaller areas, in units of the image's, count as none."""


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if it is float64. Geometry and losses never run in half
    precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(centre x, centre y, width, height) [..., 4] to corners (x0, y0, x1, y1)."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((center - 0.5 * size, center + 0.5 * size), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Corners (x0, y0, x1, y1) [..., 4] to (centre x, centre y, width, height)."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((top_left + bottom_right) / 2, bottom_right - top_left), dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Area [...] of corner boxes [..., 4]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def box_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """IoU of corner boxes, shapes broadcast: [..., 4] and [..., 4] give [...].

    Pairs without area have IoU 0.
    """
    intersection, union = _intersection_union(boxes_a, boxes_b)
    return intersection / _nonzero(union)


def pairwise_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """IoU of every corner box of a [..., A, 4] with every one of b [..., B, 4]: [..., A, B]."""
    return box_iou(boxes_a[..., :, None, :], boxes_b[..., None, :, :])


def generalized_box_iou(boxes_a: Tensor, boxes_b: Tensor, eps: float = 0.0) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019) of corner boxes, shapes broadcast.

    In [-1, 1] for proper boxes. Degenerate pairs give a finite value and a finite gradient.
    `eps`, an area, is added to both denominators (DN-DETR and DINO: 1e-6).
    """
    intersection, union = _intersection_union(boxes_a, boxes_b)
    top_left = torch.minimum(boxes_a[..., :2], boxes_b[..., :2])
    bottom_right = torch.maximum(boxes_a[..., 2:], boxes_b[..., 2:])
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    hull = width * height
    return intersection / _nonzero(union, eps) - (hull - union) / _nonzero(hull, eps)


def pairwise_generalized_iou(boxes_a: Tensor, boxes_b: Tensor, eps: float = 0.0) -> Tensor:
    """Generalised IoU of every corner box of a [..., A, 4] with every one of b [..., B, 4].

    `eps`: see `generalized_box_iou`.
    """
    return generalized_box_iou(boxes_a[..., :, None, :], boxes_b[..., None, :, :], eps)


def _intersection_union(boxes_a: Tensor, boxes_b: Tensor) -> tuple[Tensor, Tensor]:
    top_left = torch.maximum(boxes_a[..., :2], boxes_b[..., :2])
    bottom_right = torch.minimum(boxes_a[..., 2:], boxes_b[..., 2:])
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    intersection = width * height
    return intersection, box_area(boxes_a) + box_area(boxes_b) - intersection


def _nonzero(area: Tensor, eps: float = 0.0) -> Tensor:
    if eps:
        area = area + eps
    # Proper boxes keep their exact quotient. Below, and for inverted boxes, the gradient of the
    # quotient would overflow.
    return torch.where(area > SMALLEST_AREA, area, torch.ones_like(area))
