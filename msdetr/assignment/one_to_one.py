"""One-to-one assignment: the queries that answer for the targets at least total cost (DETR)."""

from __future__ import annotations

import torch
from torch import Tensor

from msdetr.ops.dispatch import Impl
from msdetr.ops.linear_assignment import linear_assignment_of_layers
from msdetr.ops.matching_cost import matching_cost
from msdetr.structures import Assignment, Targets


@torch.no_grad()
def assign_one_to_one(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    *,
    cost_class: float,
    cost_bbox: float,
    cost_giou: float,
    class_agnostic: bool = False,
    impl: Impl = "auto",
) -> Assignment:
    """Match each target with one query, in every layer and image.

    Args:
        logits: [N, B, Q, K]
        boxes: [N, B, Q, 4] cxcywh
        targets: T slots.
        cost_class, cost_bbox, cost_giou: see `msdetr.ops.matching_cost`.
        class_agnostic: all targets are of class 0, whatever their labels.
        impl: see `msdetr.ops.dispatch`.

    Returns:
        An assignment with one place per target.
    """
    cost = matching_cost(
        logits,
        boxes,
        targets,
        cost_class=cost_class,
        cost_bbox=cost_bbox,
        cost_giou=cost_giou,
        class_agnostic=class_agnostic,
        impl=impl,
    )
    labels = None if class_agnostic else targets.labels
    query_index, mask, target_class = linear_assignment_of_layers(
        cost, targets.count, labels, impl=impl
    )
    return Assignment(query_index[..., None], mask[..., None], target_class)
