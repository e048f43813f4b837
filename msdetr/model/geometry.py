"""Geometry of boxes and levels, from padded and valid sizes alone: no masks, no device reads."""

from __future__ import annotations

import torch
from torch import Tensor

from msdetr.boxes import at_least_float32
from msdetr.structures import SpatialShapes, spatial_shapes_tensor


def level_valid_sizes(
    sizes: Tensor, padded_size: tuple[int, int], spatial_shapes: SpatialShapes
) -> Tensor:
    """Valid (height, width) of each level: the cells whose top left corner lies on the image.

    Args:
        sizes: [B, 2] int64, valid (height, width) in pixels.
        padded_size: (height, width) of the padded batch in pixels.
        spatial_shapes: L pairs (height, width).

    Returns:
        [B, L, 2] int64
    """
    padded_height, padded_width = padded_size
    height, width = sizes.unbind(-1)
    levels = [
        torch.stack(
            (
                (height * level_height + padded_height - 1) // padded_height,
                (width * level_width + padded_width - 1) // padded_width,
            ),
            dim=-1,
        )
        for level_height, level_width in spatial_shapes
    ]
    return torch.stack(levels, dim=1)


def level_valid_ratios(spatial_shapes: SpatialShapes, valid_sizes: Tensor) -> Tensor:
    """[B, L, 2] float32, valid share of (width, height) of each padded level."""
    shapes = spatial_shapes_tensor(spatial_shapes, dtype=torch.float32, device=valid_sizes.device)
    return (valid_sizes / shapes).flip(-1)


def cell_centers(spatial_shapes: SpatialShapes, valid_sizes: Tensor) -> Tensor:
    """[B, S, 2] float32, (x, y) centres of all cells as fractions of the valid part of their
    level: beyond 1 in the padding."""
    centers = []
    for level, (height, width) in enumerate(spatial_shapes):
        device = valid_sizes.device
        y = (torch.arange(height, device=device) + 0.5) / valid_sizes[:, level, 0, None]
        x = (torch.arange(width, device=device) + 0.5) / valid_sizes[:, level, 1, None]
        x, y = x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)
        centers.append(torch.stack((x, y), dim=-1).flatten(1, 2))
    return torch.cat(centers, dim=1)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of a fraction; values closer than `eps` to 0 or 1 count as `eps` away from it."""
    x = x.clamp(0.0, 1.0)
    return torch.log(x.clamp(min=eps) / (1.0 - x).clamp(min=eps))


def refine_boxes(delta: Tensor, reference: Tensor, eps: float = 1e-5) -> Tensor:
    """Move reference boxes by predicted steps in logit space (Deformable DETR, eq. 4).

    Args:
        delta: [..., 4] raw output of a box head.
        reference: [..., 4] boxes (cxcywh), or [..., 2] points: the size is then `delta`'s alone.
        eps: see `inverse_sigmoid`.

    Returns:
        [..., 4] boxes in [0, 1], float32 at least.
    """
    delta = at_least_float32(delta)
    logits = inverse_sigmoid(reference, eps)
    if reference.shape[-1] == 4:
        return (delta + logits).sigmoid()
    center, size = delta[..., :2], delta[..., 2:]
    return torch.cat((center + logits, size), dim=-1).sigmoid()
