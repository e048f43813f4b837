"""One-to-one assignment: the queries that answer for the targets at least total cost (DETR)."""

from __future__ import annotations

import torch
from torch import Tensor

from msdetr.ops.dispatch import Impl
from msdetr.ops.linear_assignment import linear_assignment
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
    impl: Impl = "auto",
) -> Assignment:
    """Match each target with one query, in every layer and image.

    Args:
        logits: [N, B, Q, K]
        boxes: [N, B, Q, 4] cxcywh
        targets: T slots.
        cost_class, cost_bbox, cost_giou: see `msdetr.ops.matching_cost`.
        impl: see `msdetr.ops.dispatch`.

    Returns:
        An assignment with one place per target.
    """
    num_layers, batch, queries, _ = logits.shape
    cost = matching_cost(
        logits,
        boxes,
        targets,
        cost_class=cost_class,
        cost_bbox=cost_bbox,
        cost_giou=cost_giou,
        impl=impl,
    )
    query_index, matched = linear_assignment(
        cost.flatten(0, 1), targets.count.repeat(num_layers), impl=impl
    )
    query_index = query_index.unflatten(0, (num_layers, batch))
    matched = matched.unflatten(0, (num_layers, batch))
    # One slot more than there are queries takes what unmatched targets would write.
    target_class = query_index.new_full((num_layers, batch, queries + 1), -1)
    target_class.scatter_(
        2,
        query_index.masked_fill(~matched, queries),
        targets.labels.expand(num_layers, -1, -1),
    )
    return Assignment(query_index[..., None], matched[..., None], target_class[..., :queries])
