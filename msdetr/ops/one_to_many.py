"""One-to-many assignment: several queries per target (MS-DETR, section 3.3; after DETA).

Every query goes to its best target if it scores well enough, every target keeps at least its best
query, and each target then takes as many of its best queries as went to it, k at most.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from msdetr.ops.dispatch import Impl, register_kernel, resolve_impl
from msdetr.ops.one_to_many_reference import WORST_SCORE, Pairs, find_pairs
from msdetr.structures import Targets

_MAX_QUERIES = 16384  # A program of the kernel holds a row of scores.

_LIBRARY = torch.library.Library("msdetr", "FRAGMENT")
_LIBRARY.define(
    "one_to_many(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor count, "
    "Tensor priority, int k, float threshold, int limit, float cost_box, float cost_class, "
    "str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class OneToMany(NamedTuple):
    """Pairs of targets and queries; a query may serve several targets."""

    query_index: Tensor
    """[N, B, T, k] int64, best first; 0 where `mask` is False."""
    mask: Tensor
    """[N, B, T, k] bool"""
    score: Tensor
    """[N, B, T, k] score of the pair; -inf where `mask` is False."""
    best_target: Tensor
    """[N, B, Q] int64, of each query's pairs the target of the highest score, the lowest of equals;
    T where the query is in no pair."""
    best_class: Tensor
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
    queries = logits.shape[2]
    unsupported = None
    if boxes.dtype == torch.float64:
        unsupported = "the kernel computes in float32, got float64 boxes"
    elif queries > _MAX_QUERIES:
        unsupported = f"the kernel takes up to {_MAX_QUERIES} queries, got {queries}"
    found = torch.ops.msdetr.one_to_many(
        logits.detach(),
        boxes.detach(),
        *targets,
        priority,
        min(k, queries),
        threshold,
        int(positive_fraction * queries),
        cost_box,
        cost_class,
        resolve_impl("one_to_many", impl, boxes.device, unsupported),
    )
    return OneToMany(*found)


def _best_of_queries(pairs: Pairs, targets: Targets, num_queries: int) -> tuple[Tensor, Tensor]:
    """`best_target` and `best_class` of `OneToMany`."""
    num_layers, batch, slots, _ = pairs.query_index.shape
    query, score = pairs.query_index.flatten(2), pairs.score.flatten(2)
    best = score.new_full((num_layers, batch, num_queries), float("-inf"))
    best.scatter_reduce_(2, query, score, "amax")
    wins = (score > float("-inf")) & (score == best.gather(2, query))
    slot = torch.arange(slots, device=score.device)[:, None].expand_as(pairs.query_index)
    target = query.new_full(best.shape, slots)
    target.scatter_reduce_(2, query, torch.where(wins, slot.flatten(2), slots), "amin")
    labels = torch.cat((targets.labels, targets.labels.new_full((batch, 1), -1)), dim=1)
    return target, labels.expand(num_layers, -1, -1).gather(2, target)


def _assign(
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if impl == "reference":
        targets = Targets(labels, target_boxes, count)
        pairs = find_pairs(
            logits,
            boxes,
            targets,
            priority,
            k=k,
            threshold=threshold,
            limit=limit,
            cost_box=cost_box,
            cost_class=cost_class,
        )
        return *pairs, *_best_of_queries(pairs, targets, logits.shape[2])
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
        logits.new_empty(pairs, dtype=torch.promote_types(boxes.dtype, torch.float32)),
        logits.new_empty(logits.shape[:3], dtype=torch.int64),
        logits.new_empty(logits.shape[:3], dtype=torch.int64),
    )


# An operator for either implementation: compiled code takes the reference as it is, too. Its many
# small operations on a CPU are slower where they are compiled, and take long to compile.
register_kernel(_LIBRARY, "one_to_many", _assign)
torch.library.register_fake("msdetr::one_to_many", _fake, lib=_LIBRARY)
