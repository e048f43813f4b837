"""Loss terms of boxes as sums per layer; division by the number of targets is the criterion's."""

from __future__ import annotations

import torch
from torch import Tensor

from msdetr.boxes import at_least_float32, cxcywh_to_xyxy, generalized_box_iou
from msdetr.structures import Assignment, Targets


def box_losses(boxes: Tensor, targets: Targets, assignment: Assignment) -> tuple[Tensor, Tensor]:
    """L1 and GIoU losses of the assigned pairs; a query with two targets counts for both.

    Args:
        boxes: [N, B, Q, 4] cxcywh
        targets: T slots.
        assignment: k places per target.

    Returns:
        [N] sum of L1 distances and [N] sum of 1 - GIoU, float32 at least.
    """
    boxes = at_least_float32(boxes)
    query_index, mask = assignment.query_index, assignment.mask  # [N, B, T, k]
    index = query_index.flatten(2)[..., None].expand(-1, -1, -1, 4)
    matched = boxes.gather(2, index).view(*query_index.shape, 4)
    target_boxes = targets.boxes.to(boxes.dtype)[:, :, None].expand_as(matched)
    l1 = (matched - target_boxes).abs().sum(-1)
    giou = generalized_box_iou(cxcywh_to_xyxy(matched), cxcywh_to_xyxy(target_boxes))
    return (
        torch.where(mask, l1, 0.0).sum((1, 2, 3)),
        torch.where(mask, 1.0 - giou, 0.0).sum((1, 2, 3)),
    )
