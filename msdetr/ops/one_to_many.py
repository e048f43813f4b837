"""One-to-many assignment: several queries per target (MS-DETR, section 3.3; after DETA).

Each query votes for its best target if its score is high enough or if it is the best query of some
target. Each target then takes as many of its best queries as voted for it, k at maximum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msdetr.boxes import at_least_float32, cxcywh_to_xyxy, pairwise_iou
from msdetr.ops.dispatch import Impl, resolve_impl
from msdetr.ops.one_to_many_chunked import Pairs, find_pairs
from msdetr.ops.registration import register_op
from msdetr.structures import Targets

_MAX_QUERIES = 16384  # A program of the kernel holds a row of scores.

WORST_SCORE = -1.0
"""Replaces scores that are not finite. It is lower than every score."""


class OneToMany(NamedTuple):
    """Pairs of targets and queries; a query may be in pairs with several targets."""

    query_index: Tensor
    """[N, B, T, k] int64, best first; 0 where `mask` is False."""
    mask: Tensor
    """[N, B, T, k] bool"""
    score: Tensor
    """[N, B, T, k] score of the pair; -inf where `mask` is False."""
    best_target: Tensor
    """[N, B, Q] int64, the target of each query's pair with the highest score, the lowest index of
    equals; T if the query is in no pair."""
    best_class: Tensor
    """[N, B, Q] int64, the class of that target, -1 if there is none."""


def one_to_many(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    priority: Tensor,
    *,
    k: int,
    threshold: float,
    positive_fraction: float,
    iou_weight: float = 0.7,
    class_weight: float = 0.3,
    impl: Impl = "auto",
) -> OneToMany:
    """Assign queries to targets, for all layers and images at once.

    The score of a pair is `iou_weight * IoU + class_weight * probability of the target's class`. A
    query is positive if its best score is at least `threshold`, or if it is the best query of some
    target. Of the positives of an image, the `int(positive_fraction * Q)` with the lowest priority
    values are kept. A target that is the best target of n kept queries takes the `min(n, k)` best
    queries of its whole score row, which may differ from the kept ones. Ties go to the lowest
    index.

    Args:
        logits: [N, B, Q, K]
        boxes: [N, B, Q, 4] cxcywh
        targets: T slots.
        priority: [N, B, Q] or [B, Q], random numbers in training.
        k: maximum number of queries per target.
        threshold: minimum score of a positive query.
        positive_fraction: maximum share of the queries that is kept.
        iou_weight: weight of the IoU in the score.
        class_weight: weight of the class probability in the score.
        impl: see `msdetr.ops.dispatch`.

    Returns:
        Pairs with k = min(k, Q) places per target.

    Raises:
        NotImplementedError: `impl` is "triton" and the kernel cannot serve the arguments.
    """
    queries = logits.shape[2]
    unsupported = None
    if boxes.dtype == torch.float64:
        unsupported = "the kernel computes in float32, got float64 boxes"
    elif queries > _MAX_QUERIES:
        unsupported = f"the kernel takes up to {_MAX_QUERIES} queries, got {queries}"
    implementations: dict[str, Callable[..., tuple[Tensor, ...]]] = {
        "reference": _reference,
        "chunked": torch.ops.msdetr.one_to_many_chunked,
        "triton": torch.ops.msdetr.one_to_many,
    }
    result = implementations[resolve_impl("one_to_many", impl, boxes.device, unsupported)](
        logits.detach(),
        boxes.detach(),
        *targets,
        priority,
        min(k, queries),
        threshold,
        int(positive_fraction * queries),
        iou_weight,
        class_weight,
    )
    return OneToMany(*result)


def _reference(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    count: Tensor,
    priority: Tensor,
    k: int,
    threshold: float,
    limit: int,
    iou_weight: float,
    class_weight: float,
) -> OneToMany:
    """`limit` is the maximum number of positives of an image."""
    targets = Targets(labels, target_boxes, count)
    boxes = at_least_float32(boxes)
    corners = cxcywh_to_xyxy(target_boxes.to(boxes.dtype))
    iou = pairwise_iou(corners, cxcywh_to_xyxy(boxes))  # [N, B, T, Q]
    index = labels[None, :, None].expand(*logits.shape[:3], -1)
    probability = at_least_float32(logits.gather(3, index)).sigmoid().transpose(2, 3)
    score = iou_weight * iou + class_weight * probability
    score = score.nan_to_num(WORST_SCORE, WORST_SCORE, WORST_SCORE)
    score = score.masked_fill(~targets.mask[..., None], -math.inf)
    ranked_score, ranked_query = score.sort(dim=3, descending=True, stable=True)
    top_score, top_query = ranked_score[..., :k], ranked_query[..., :k]
    kept_count = torch.zeros_like(score[..., 0], dtype=torch.int64)
    if score.numel():
        best_score, best_target = score.max(dim=2)  # [N, B, Q]
        # The best query of an empty slot is arbitrary: it does not become positive.
        is_target = targets.mask.long().expand_as(kept_count)
        is_best = torch.zeros_like(best_target).scatter_add(2, ranked_query[..., 0], is_target)
        positive = (best_score >= threshold) | (is_best > 0)
        order = torch.where(positive, priority, math.inf).argsort(dim=2, stable=True)
        kept = positive & (order.argsort(dim=2) < limit)
        kept_count = kept_count.scatter_add(2, best_target, kept.long()) * is_target
    mask = torch.arange(k, device=score.device) < kept_count[..., None]
    pairs = Pairs(top_query.where(mask, 0), mask, top_score.where(mask, -math.inf))
    return OneToMany(*pairs, *_best_of_queries(pairs, labels, logits.shape[2]))


def _best_of_queries(pairs: Pairs, labels: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
    """`best_target` and `best_class` of `OneToMany`."""
    num_layers, batch, slots, _ = pairs.query_index.shape
    query, score = pairs.query_index.flatten(2), pairs.score.flatten(2)
    best = score.new_full((num_layers, batch, num_queries), -math.inf)
    best.scatter_reduce_(2, query, score, "amax")
    wins = (score > -math.inf) & (score == best.gather(2, query))
    slot = torch.arange(slots, device=score.device)[:, None].expand_as(pairs.query_index)
    target = query.new_full(best.shape, slots)
    target.scatter_reduce_(2, query, torch.where(wins, slot.flatten(2), slots), "amin")
    labels = torch.cat((labels, labels.new_full((batch, 1), -1)), dim=1)
    return target, labels.expand(num_layers, -1, -1).gather(2, target)


def _chunked(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    count: Tensor,
    priority: Tensor,
    *options: Any,
) -> OneToMany:
    targets = Targets(labels, target_boxes, count)
    pairs = find_pairs(logits, boxes, targets, priority, WORST_SCORE, *options)
    return OneToMany(*pairs, *_best_of_queries(pairs, labels, logits.shape[2]))


def _kernel(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    count: Tensor,
    priority: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from msdetr.kernels import one_to_many as kernel

    targets = (labels.contiguous(), target_boxes.contiguous(), count.contiguous())
    return kernel.one_to_many(logits, boxes, *targets, priority, WORST_SCORE, *options)


def _fake(
    logits: Tensor, boxes: Tensor, labels: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    k = rest[3]
    pairs = (*logits.shape[:2], labels.shape[1], k)
    return (
        logits.new_empty(pairs, dtype=torch.int64),
        logits.new_empty(pairs, dtype=torch.bool),
        logits.new_empty(pairs, dtype=torch.promote_types(boxes.dtype, torch.float32)),
        logits.new_empty(logits.shape[:3], dtype=torch.int64),
        logits.new_empty(logits.shape[:3], dtype=torch.int64),
    )


_SCHEMA = (
    "(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor count, "
    "Tensor priority, int k, float threshold, int limit, float iou_weight, float class_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
register_op(f"one_to_many{_SCHEMA}", _kernel, fake=_fake)
# Compiled, its many small operations would be slower, and would take long to compile.
register_op(f"one_to_many_chunked{_SCHEMA}", _chunked, fake=_fake, devices=("CPU",))
