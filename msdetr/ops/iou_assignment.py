"""Assignment by the IoU of boxes that a query starts from: several queries per target (DETA).

DETA (Ouyang-Zhang et al., arXiv:2212.06137) assigns the initial boxes of its queries once for all
decoder layers, and the anchors of the encoder's proposals. In contrast to
`msdetr.ops.one_to_many`, scores are IoUs alone, and all of equally good boxes count as the best of
a target.

There is no kernel: a step assigns one layer, where the one-to-many operator has all of them, and
`torch.compile` fuses the elementwise passes. Nothing is read from the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from msdetr.boxes import at_least_float32, cxcywh_to_xyxy, pairwise_iou
from msdetr.structures import Targets


class IoUPairs(NamedTuple):
    """Pairs of targets and queries; a query may be in pairs with several targets."""

    query_index: Tensor
    """[B, T, k] int64, best first; 0 where `mask` is False."""
    mask: Tensor
    """[B, T, k] bool"""
    target: Tensor
    """[B, Q] int64, the last target that has the query; -1 if there is none."""


def assign_by_iou(
    boxes: Tensor,
    targets: Targets,
    priority: Tensor,
    *,
    k: int,
    threshold: float,
    max_positives: int,
) -> IoUPairs:
    """Assign boxes to targets.

    A box is positive if its highest IoU is at least `threshold`, or if no other box has a higher
    IoU with some target: where nothing overlaps a target, all boxes without overlap are. Of the
    positives of an image, the `max_positives` with the lowest priority values are kept. A target
    that is the best target of n kept boxes takes the `min(n, k)` boxes that overlap it most, which
    may differ from the kept ones.

    Args:
        boxes: [B, Q, 4] cxcywh
        targets: T slots, at least 1.
        priority: [B, Q], random numbers in training.
        k: maximum number of boxes per target.
        threshold: minimum IoU of a positive box.
        max_positives: at most this many positives are kept per image.

    Returns:
        Pairs with min(k, Q) places per target.
    """
    boxes = at_least_float32(boxes)
    num_queries = boxes.shape[1]
    corners = cxcywh_to_xyxy(targets.boxes.to(boxes.dtype))
    iou = pairwise_iou(corners, cxcywh_to_xyxy(boxes))  # [B, T, Q]
    iou = iou.nan_to_num(0.0).masked_fill(~targets.mask[..., None], -math.inf)
    best_iou, best_target = iou.max(dim=1)  # [B, Q]
    is_best = (iou == iou.amax(dim=2, keepdim=True)) & targets.mask[..., None]
    positive = (best_iou >= threshold) | is_best.any(dim=1)
    if max_positives < num_queries:
        order = torch.where(positive, at_least_float32(priority), math.inf)
        first = order.topk(max_positives, dim=1, largest=False).indices
        positive = positive & torch.zeros_like(positive).scatter(1, first, True)
    kept = torch.zeros_like(targets.labels).scatter_add(1, best_target, positive.long())  # [B, T]

    query_index = iou.topk(min(k, num_queries), dim=2).indices
    mask = torch.arange(query_index.shape[2], device=boxes.device) < kept[..., None]
    mask = mask & targets.mask[..., None]
    query_index = query_index.where(mask, 0)
    slot = torch.arange(kept.shape[1], device=boxes.device)[:, None].where(mask, -1)
    target = torch.full_like(best_target, -1).scatter_reduce(
        1, query_index.flatten(1), slot.flatten(1), "amax"
    )
    return IoUPairs(query_index, mask, target)
