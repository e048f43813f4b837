"""Loss terms as sums per layer; division by the number of targets is the criterion's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from msdetr.boxes import at_least_float32, cxcywh_to_xyxy, generalized_box_iou
from msdetr.structures import Assignment, Targets


def focal_loss(logits: Tensor, target_class: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss (Lin et al., ICCV 2017) over all queries and classes, without a one-hot
    target: every logit counts as background, then each query's own class is corrected.

    Args:
        logits: [N, B, Q, K]
        target_class: [N, B, Q] int64, -1 = background.
        alpha: weight of positives; negatives have 1 - alpha.
        gamma: focusing exponent.

    Returns:
        [N], float32 at least.
    """
    logits = at_least_float32(logits)

    def background(x: Tensor) -> Tensor:
        return (1 - alpha) * x.sigmoid() ** gamma * F.softplus(x)

    own = logits.gather(-1, target_class.clamp(min=0)[..., None])[..., 0]
    foreground = alpha * (-own).sigmoid() ** gamma * F.softplus(-own)
    correction = torch.where(target_class >= 0, foreground - background(own), 0.0)
    return background(logits).sum((1, 2, 3)) + correction.sum((1, 2))


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
