"""One-to-many assignment as the losses need it, and its union with the one-to-one pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from msdetr.config import AssignmentConfig
from msdetr.ops.dispatch import Impl
from msdetr.ops.one_to_many import one_to_many
from msdetr.structures import Assignment, Predictions, Targets


@torch.no_grad()
def assign_one_to_many(
    predictions: Predictions,
    targets: Targets,
    config: AssignmentConfig,
    *,
    priority: Tensor | None = None,
    generator: torch.Generator | None = None,
    one_to_one: Assignment | None = None,
    impl: Impl = "auto",
) -> Assignment:
    """Match each target with up to k queries, in every layer and image.

    A query that serves several targets stands in all their places and learns the class of the
    pair with the highest score.

    Args:
        predictions: of the one-to-many branch.
        targets: T slots.
        config: k, threshold, positive fraction, score weights, `indices_merge`.
        priority: [N, B, Q] or [B, Q]; which positives are kept (default: drawn from `generator`).
        generator: on the device of the predictions; None uses the global one.
        one_to_one: with `indices_merge`, the assignment of the other branch.
        impl: see `msdetr.ops.dispatch`.

    Returns:
        An assignment with k places per target. With `indices_merge`, k + 1: the last is the
        one-to-one query, unless one-to-many took that query too, and every query keeps only the
        target it scores highest for.

    Raises:
        ValueError: `indices_merge` is set and `one_to_one` is missing.
    """
    logits, boxes = predictions
    if priority is None:
        priority = torch.rand(logits.shape[:3], device=logits.device, generator=generator)
    pairs = one_to_many(
        logits,
        boxes,
        targets,
        priority,
        k=config.one_to_many_k,
        threshold=config.one_to_many_threshold,
        positive_fraction=config.positive_fraction,
        cost_box=config.one_to_many_iou_weight,
        cost_class=config.one_to_many_class_score_weight,
        impl=impl,
    )
    if not config.indices_merge:
        return Assignment(pairs.query_index, pairs.mask, pairs.best_class)
    if one_to_one is None:
        raise ValueError("indices_merge needs the one-to-one assignment")

    num_slots = targets.labels.shape[1]
    slots = torch.arange(num_slots, device=logits.device)[:, None]
    wins = pairs.mask & (_of_pairs(pairs.best_target, pairs.query_index) == slots)
    joins = one_to_one.mask & (_of_pairs(pairs.best_target, one_to_one.query_index) == num_slots)
    return Assignment(
        torch.cat((pairs.query_index, one_to_one.query_index), dim=-1),
        torch.cat((wins, joins), dim=-1),
        torch.where(pairs.best_target < num_slots, pairs.best_class, one_to_one.target_class),
    )


def _of_pairs(per_query: Tensor, query_index: Tensor) -> Tensor:
    """Values [N, B, Q] at the queries of pairs [N, B, T, k]."""
    return per_query.gather(2, query_index.flatten(2)).view_as(query_index)
