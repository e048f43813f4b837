"""One-to-many assignment: several queries per target (MS-DETR, section 3.3; after DETA).

Every query goes to its best target if it scores well enough, every target keeps at least its best
query, and each target then takes as many of its best queries as went to it, k at most.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from msdetr.boxes import at_least_float32, box_iou, cxcywh_to_xyxy
from msdetr.ops.dispatch import Impl, register_kernel, resolve_impl
from msdetr.structures import Targets

WORST_SCORE = -1.0
"""Stands for a score that is not finite, below any score."""


_MAX_QUERIES = 16384  # A program of the kernel holds a row of scores.

_LIBRARY = torch.library.Library("msdetr", "FRAGMENT")
_LIBRARY.define(
    "one_to_many(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor count, "
    "Tensor priority, int k, float threshold, int limit, float cost_box, float cost_class) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class OneToMany(NamedTuple):
    """Pairs of targets and queries; a query may serve several targets."""

    query_index: Tensor
    """[N, B, T, k] int64, best first; 0 where `mask` is False."""
    mask: Tensor
    """[N, B, T, k] bool"""
    score: Tensor
    """[N, B, T, k] score of the pair; -inf where `mask` is False."""


class BestPairs(NamedTuple):
    """Of each query, the pair of highest score, that of the lowest target of equals."""

    target: Tensor
    """[N, B, Q] int64, its target; T where the query is in no pair."""
    target_class: Tensor
    """[N, B, Q] int64, the class of that target, -1 where there is none."""


def one_to_many(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    priority: Tensor,
    *,
    k: int,
    threshold: float,
    positive_fraction: float,
    cost_box: float = 0.7,
    cost_class: float = 0.3,
    impl: Impl = "auto",
) -> OneToMany:
    """Assign queries to targets, for all layers and images at once.

    The score of a pair is `cost_box * IoU + cost_class * probability of the target's class`. A
    query is positive where its best score reaches `threshold`, or where it is the best query of
    some target. Of the positives of an image, the `int(positive_fraction * Q)` of lowest priority
    value are kept. A target with n kept queries takes the `min(n, k)` best of its whole score row:
    not necessarily the kept ones. Ties go to the lowest index.

    Args:
        logits: [N, B, Q, K]
        boxes: [N, B, Q, 4] cxcywh
        targets: T slots.
        priority: [N, B, Q] or [B, Q], random numbers in training.
        k: most queries per target.
        threshold: least score of a positive query.
        positive_fraction: share of the queries that may be kept.
        cost_box: weight of the IoU in the score.
        cost_class: weight of the class probability in the score.
        impl: see `msdetr.ops.dispatch`.

    Returns:
        Pairs with k = min(k, Q) places per target.

    Raises:
        NotImplementedError: `impl` is "triton" and the kernel cannot serve the arguments.
    """
    found = _on_kernel(
        logits,
        boxes,
        targets,
        priority,
        k=k,
        threshold=threshold,
        positive_fraction=positive_fraction,
        cost_box=cost_box,
        cost_class=cost_class,
        impl=impl,
    )
    if found is not None:
        return found[0]
    num_layers, batch, queries, _ = logits.shape
    slots = targets.labels.shape[1]
    k = min(k, queries)
    limit = int(positive_fraction * queries)
    score = _score(logits, boxes, targets, cost_box, cost_class)  # [N, B, T, Q]
    if not slots:
        nothing = torch.zeros(num_layers, batch, 0, k, dtype=torch.int64, device=score.device)
        return OneToMany(nothing, nothing.bool(), nothing.to(score.dtype))

    best_score, best_target = score.max(dim=2)  # [N, B, Q]
    best_query = score.argmax(dim=3)  # [N, B, T]
    # An empty slot's best query means nothing; it must not become positive.
    is_best = torch.zeros_like(best_target).scatter_add_(
        2, best_query, targets.mask.expand_as(best_query).long()
    )
    positive = (best_score >= threshold) | (is_best > 0)
    kept = positive & _lowest(priority, positive, limit)

    count = torch.zeros_like(best_query).scatter_add_(2, best_target, kept.long())  # [N, B, T]
    top_score, top_query = _top_k(score, k)
    taken = torch.arange(k, device=score.device) < count[..., None]
    taken = taken & targets.mask[:, :, None]
    return OneToMany(
        top_query.masked_fill(~taken, 0), taken, top_score.masked_fill(~taken, float("-inf"))
    )


def one_to_many_with_classes(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    priority: Tensor,
    *,
    impl: Impl = "auto",
    **options: Any,
) -> tuple[OneToMany, BestPairs]:
    """`one_to_many`, and what each query is to predict; the arguments are the same."""
    found = _on_kernel(logits, boxes, targets, priority, impl=impl, **options)
    if found is not None:
        return found
    pairs = one_to_many(logits, boxes, targets, priority, impl="reference", **options)
    return pairs, _best_pairs(pairs, targets, logits.shape[2])


def _on_kernel(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    priority: Tensor,
    *,
    k: int,
    threshold: float,
    positive_fraction: float,
    cost_box: float = 0.7,
    cost_class: float = 0.3,
    impl: Impl,
) -> tuple[OneToMany, BestPairs] | None:
    """What the kernel finds, or None where the reference is to run."""
    queries = logits.shape[2]
    unsupported = None
    if boxes.dtype == torch.float64:
        unsupported = "the kernel computes in float32, got float64 boxes"
    elif queries > _MAX_QUERIES:
        unsupported = f"the kernel takes up to {_MAX_QUERIES} queries, got {queries}"
    if resolve_impl("one_to_many", impl, boxes.device, unsupported) == "reference":
        return None
    *pairs, target, target_class = torch.ops.msdetr.one_to_many(
        logits.detach(),
        boxes.detach(),
        *targets,
        priority,
        min(k, queries),
        threshold,
        int(positive_fraction * queries),
        cost_box,
        cost_class,
    )
    return OneToMany(*pairs), BestPairs(target, target_class)


def _best_pairs(pairs: OneToMany, targets: Targets, num_queries: int) -> BestPairs:
    num_layers, batch, slots, _ = pairs.query_index.shape
    query, score = pairs.query_index.flatten(2), pairs.score.flatten(2)
    best = score.new_full((num_layers, batch, num_queries), float("-inf"))
    best.scatter_reduce_(2, query, score, "amax")
    wins = (score > float("-inf")) & (score == best.gather(2, query))
    slot = torch.arange(slots, device=score.device)[:, None].expand_as(pairs.query_index)
    target = query.new_full(best.shape, slots)
    target.scatter_reduce_(2, query, torch.where(wins, slot.flatten(2), slots), "amin")
    labels = torch.cat((targets.labels, targets.labels.new_full((batch, 1), -1)), dim=1)
    return BestPairs(target, labels.expand(num_layers, -1, -1).gather(2, target))


def _score(
    logits: Tensor, boxes: Tensor, targets: Targets, cost_box: float, cost_class: float
) -> Tensor:
    """[N, B, T, Q]; -inf in empty slots."""
    boxes = cxcywh_to_xyxy(at_least_float32(boxes))
    target_boxes = cxcywh_to_xyxy(targets.boxes.to(boxes.dtype))
    iou = box_iou(boxes[:, :, None], target_boxes[:, :, None])
    index = targets.labels[None, :, None].expand(*logits.shape[:3], -1)
    probability = at_least_float32(logits.gather(3, index)).sigmoid().transpose(2, 3)
    score = cost_box * iou + cost_class * probability
    score = torch.where(score.isfinite(), score, WORST_SCORE)
    return score.masked_fill(~targets.mask[:, :, None], float("-inf"))


def _lowest(priority: Tensor, among: Tensor, limit: int) -> Tensor:
    """[N, B, Q] bool, True for the `limit` lowest priorities of those in `among`."""
    order = priority.expand_as(among).masked_fill(~among, float("inf")).argsort(dim=-1, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    return rank < limit


def _top_k(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # `max` is documented to return the first of equal values; `topk` promises no order among them.
    score = score.clone()
    scores, indices = [], []
    for _ in range(k):
        best = score.max(dim=-1, keepdim=True)
        score.scatter_(-1, best.indices, float("-inf"))
        scores.append(best.values)
        indices.append(best.indices)
    return torch.cat(scores, dim=-1), torch.cat(indices, dim=-1)


def _kernel(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    count: Tensor,
    priority: Tensor,
    k: int,
    threshold: float,
    limit: int,
    cost_box: float,
    cost_class: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from msdetr.kernels import one_to_many as kernel

    return kernel.one_to_many(
        logits,
        boxes,
        labels.contiguous(),
        target_boxes.contiguous(),
        count.contiguous(),
        priority,
        k=k,
        threshold=threshold,
        limit=limit,
        cost_box=cost_box,
        cost_class=cost_class,
        worst=WORST_SCORE,
    )


def _fake(
    logits: Tensor, boxes: Tensor, labels: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    k = rest[3]
    pairs = (*logits.shape[:2], labels.shape[1], k)
    return (
        logits.new_empty(pairs, dtype=torch.int64),
        logits.new_empty(pairs, dtype=torch.bool),
        logits.new_empty(pairs, dtype=torch.float32),
        logits.new_empty(logits.shape[:3], dtype=torch.int64),
        logits.new_empty(logits.shape[:3], dtype=torch.int64),
    )


register_kernel(_LIBRARY, "one_to_many", _kernel)
torch.library.register_fake("msdetr::one_to_many", _fake, lib=_LIBRARY)
